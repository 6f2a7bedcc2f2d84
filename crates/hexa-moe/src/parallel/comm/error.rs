//! Why ranks could not communicate.

/// Failure of a collective. A communicator that has failed once fails from then on, on all ranks.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CommError {
    /// Two ranks expected different numbers of elements.
    #[error(
        "collective `{tensor}`: rank {rank} expects the counts {got:?}, rank {other} expects {expected:?} (elements per rank); give all ranks the same split and configuration"
    )]
    Counts {
        /// The tensor, as the caller named it.
        tensor: String,
        /// A rank that disagrees with `other`.
        rank: usize,
        /// Its counts.
        got: Vec<usize>,
        /// The lowest rank.
        other: usize,
        /// Its counts.
        expected: Vec<usize>,
    },
    /// A rank brought another number of elements than all ranks expect of it.
    #[error(
        "collective `{tensor}`: rank {rank} brings {sent} elements, all ranks expect {expected}; its tensor does not fit the agreed split"
    )]
    Length {
        /// The tensor, as the caller named it.
        tensor: String,
        /// The rank.
        rank: usize,
        /// What it brought.
        sent: usize,
        /// What was expected of it.
        expected: usize,
    },
    /// The collective is not one for this number of ranks.
    #[error(
        "collective `{tensor}`: {collective} with counts {counts:?} in a job of {world_size} ranks; give one count per rank, and a root below the number of ranks"
    )]
    Shape {
        /// The tensor, as the caller named it.
        tensor: String,
        /// The operation.
        collective: String,
        /// The counts.
        counts: Vec<usize>,
        /// Number of ranks.
        world_size: usize,
    },
    /// Two ranks called different collectives.
    #[error(
        "rank {rank} calls {got}, while rank {other} calls {expected}; all ranks must run the same model in the same order"
    )]
    Order {
        /// A rank that disagrees with `other`.
        rank: usize,
        /// Its collective and tensor.
        got: String,
        /// The lowest rank.
        other: usize,
        /// Its collective and tensor.
        expected: String,
    },
    /// A rank is gone.
    #[error(
        "rank {rank} {reason}; `{tensor}` cannot complete without it. Look at that rank's own message, then resume from the last checkpoint"
    )]
    RankLost {
        /// The rank.
        rank: usize,
        /// What happened to it.
        reason: String,
        /// The tensor that was waited for.
        tensor: String,
    },
    /// Ranks did not call a collective in time.
    #[error(
        "rank(s) {ranks:?} did not reach `{tensor}` within {seconds} s; they hang, or are slower than the time limit of the communicator allows"
    )]
    Timeout {
        /// Those that were missing.
        ranks: Vec<usize>,
        /// The tensor that was waited for.
        tensor: String,
        /// The time limit.
        seconds: u64,
    },
    /// The engine itself failed.
    #[error("{engine}: {reason}")]
    Engine {
        /// `local`, `mpi` or `nccl`.
        engine: &'static str,
        /// What it says.
        reason: String,
    },
}

impl CommError {
    /// An engine was given what it had not said that it takes.
    pub(super) fn no_device_path(engine: &'static str) -> Self {
        Self::Engine {
            engine,
            reason: "it moves no tensors on devices; move them through the host".to_owned(),
        }
    }
}
