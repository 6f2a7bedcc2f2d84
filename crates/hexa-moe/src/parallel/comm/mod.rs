//! Collectives between ranks, over host memory: ranks on different back-ends form one job.
//!
//! Every collective is started and waited for; between the two, other work can be done. Before
//! any data move, ranks compare what they are about to do: a rank that disagrees about the
//! tensor, the operation or the counts is an error on all ranks, never a hang. Sums are in f32 and,
//! but for NCCL's, in the order of ranks, so that results do not depend on timing.
//!
//! | engine | ranks are | needs |
//! |---|---|---|
//! | [`local`] | threads of one process | nothing |
//! | `mpi` (feature) | processes, on one or many machines | OpenMPI, `mpirun` |
//! | `nccl` (feature) | either of these, each with a CUDA GPU of its own | libnccl |

mod agreement;
mod device;
mod error;
pub mod local;
mod metered;
#[cfg(feature = "mpi")]
pub mod mpi;
#[cfg(feature = "nccl")]
pub mod nccl;
#[cfg(any(feature = "mpi", test))]
mod wire;

pub use agreement::Announcement;
pub(crate) use agreement::part;
pub use device::{DeviceCollective, DeviceTensor};
pub use error::CommError;
pub use metered::{Meter, Metered, Traffic};

use core::fmt;

/// Result of a collective.
pub type CommResult<T> = core::result::Result<T, CommError>;

/// Elements on their way between ranks.
#[derive(Debug, Clone, PartialEq)]
pub enum Payload {
    /// Floats; element types below f32 are widened.
    F32(Vec<f32>),
    /// Ids and counts.
    U32(Vec<u32>),
    /// Floats that did not leave the device: what [`Collective::OnDevice`] yields.
    Device(DeviceTensor),
}

impl Payload {
    /// Number of elements.
    pub fn len(&self) -> usize {
        match self {
            Payload::F32(data) => data.len(),
            Payload::U32(data) => data.len(),
            Payload::Device(tensor) => tensor.len(),
        }
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The floats; of other elements, none.
    pub fn into_f32(self) -> Vec<f32> {
        match self {
            Payload::F32(data) => data,
            Payload::U32(_) | Payload::Device(_) => Vec::new(),
        }
    }

    /// The integers; of other elements, none.
    pub fn into_u32(self) -> Vec<u32> {
        match self {
            Payload::U32(data) => data,
            Payload::F32(_) | Payload::Device(_) => Vec::new(),
        }
    }
}

/// An operation that all ranks take part in.
#[derive(Debug, Clone, PartialEq)]
pub enum Collective {
    /// Everybody receives everybody's `data`, concatenated in the order of ranks.
    AllGatherV {
        /// This rank's part: `counts[rank]` elements.
        data: Payload,
        /// Elements of each rank.
        counts: Vec<usize>,
    },
    /// Rank `q` receives part `q` of the sum over ranks.
    ReduceScatterV {
        /// This rank's addend: the parts for all ranks, one after the other; `None` for zeros.
        data: Option<Vec<f32>>,
        /// Elements of each part.
        counts: Vec<usize>,
    },
    /// Everybody receives the sum over ranks.
    AllReduce {
        /// This rank's addend.
        data: Vec<f32>,
    },
    /// Everybody receives what `root` has.
    Broadcast {
        /// At `root`, `len` elements; elsewhere, an empty payload of the same type.
        data: Payload,
        /// Who sends.
        root: usize,
        /// Number of elements.
        len: usize,
    },
    /// Nobody goes on before all have come.
    Barrier,
    /// A collective of tensors on a device, for engines that [take](Communicator::takes) them.
    OnDevice(DeviceCollective),
    /// Ranks only compare what they are about to do, for an engine that moves the data itself.
    Announce(Announcement),
}

/// A started collective.
#[must_use = "a collective that was started must be waited for"]
pub struct Pending(Box<dyn FnOnce() -> CommResult<Payload> + Send>);

impl Pending {
    /// A collective that `finish` waits for.
    pub fn new(finish: impl FnOnce() -> CommResult<Payload> + Send + 'static) -> Self {
        Self(Box::new(finish))
    }

    /// Waits for the result; empty for a barrier.
    ///
    /// # Errors
    /// [`CommError`], on all ranks.
    pub fn wait(self) -> CommResult<Payload> {
        (self.0)()
    }
}

impl fmt::Debug for Pending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Pending")
    }
}

/// One rank's end of a job.
///
/// All ranks call the same collectives in the same order. `tensor` names what is moved: ranks
/// compare it, and errors show it. Dropping the communicator is leaving.
pub trait Communicator: fmt::Debug + Send + Sync {
    /// This rank, in `0..world_size`.
    fn rank(&self) -> usize;

    /// Number of ranks.
    fn world_size(&self) -> usize;

    /// Starts a collective; errors come from waiting for it.
    fn start(&self, tensor: &str, collective: Collective) -> Pending;

    /// Tells the other ranks that this one takes no further part; what it has started completes.
    fn leave(&self);

    /// The failure after which this communicator no longer works.
    fn failure(&self) -> Option<CommError>;

    /// Whether [`Collective::OnDevice`] can move this tensor; if not, it goes through the host.
    fn takes(&self, tensor: &DeviceTensor) -> bool {
        let _ = tensor;
        false
    }

    /// [`Collective::AllGatherV`] of floats, waited for.
    ///
    /// # Errors
    /// [`CommError`], on all ranks.
    fn all_gather_v(&self, tensor: &str, data: Vec<f32>, counts: &[usize]) -> CommResult<Vec<f32>> {
        let data = Payload::F32(data);
        let counts = counts.to_vec();
        let pending = self.start(tensor, Collective::AllGatherV { data, counts });
        pending.wait().map(Payload::into_f32)
    }

    /// [`Collective::AllGatherV`] of integers, the same number of each rank, waited for.
    ///
    /// # Errors
    /// [`CommError`], on all ranks.
    fn all_gather_u32(&self, tensor: &str, data: Vec<u32>) -> CommResult<Vec<u32>> {
        let counts = vec![data.len(); self.world_size()];
        let data = Payload::U32(data);
        let pending = self.start(tensor, Collective::AllGatherV { data, counts });
        pending.wait().map(Payload::into_u32)
    }

    /// [`Collective::ReduceScatterV`], waited for.
    ///
    /// # Errors
    /// [`CommError`], on all ranks.
    fn reduce_scatter_v(
        &self,
        tensor: &str,
        data: Option<Vec<f32>>,
        counts: &[usize],
    ) -> CommResult<Vec<f32>> {
        let counts = counts.to_vec();
        let pending = self.start(tensor, Collective::ReduceScatterV { data, counts });
        pending.wait().map(Payload::into_f32)
    }

    /// [`Collective::AllReduce`], waited for.
    ///
    /// # Errors
    /// [`CommError`], on all ranks.
    fn all_reduce(&self, tensor: &str, data: Vec<f32>) -> CommResult<Vec<f32>> {
        let pending = self.start(tensor, Collective::AllReduce { data });
        pending.wait().map(Payload::into_f32)
    }

    /// [`Collective::Broadcast`] of `len` floats, waited for; only `root`'s data matter.
    ///
    /// # Errors
    /// [`CommError`], on all ranks.
    fn broadcast(
        &self,
        tensor: &str,
        data: Vec<f32>,
        root: usize,
        len: usize,
    ) -> CommResult<Vec<f32>> {
        let data = Payload::F32(if self.rank() == root {
            data
        } else {
            Vec::new()
        });
        let pending = self.start(tensor, Collective::Broadcast { data, root, len });
        pending.wait().map(Payload::into_f32)
    }

    /// [`Collective::Barrier`], waited for.
    ///
    /// # Errors
    /// [`CommError`], on all ranks.
    fn barrier(&self, name: &str) -> CommResult<()> {
        self.start(name, Collective::Barrier).wait().map(|_| ())
    }
}
