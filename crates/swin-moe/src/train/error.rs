//! Why a run could not start, go on or be read.

use std::path::{Path, PathBuf};

/// Result of everything in [`crate::train`].
pub type Result<T> = std::result::Result<T, TrainError>;

/// Why a run could not start, go on or be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrainError {
    /// The file system said no.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried, as a verb.
        action: &'static str,
        /// On which file or directory.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A checkpoint cannot be trusted or does not fit.
    #[error("checkpoint {}: {reason}; {remedy}", path.display())]
    Checkpoint {
        /// The checkpoint's file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
        /// What the user can do.
        remedy: &'static str,
    },
    /// A run directory is not what the command needs.
    #[error("{}: {reason}; {remedy}", path.display())]
    RunDir {
        /// The directory.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
        /// What the user can do.
        remedy: String,
    },
    /// The loss is not a number any more.
    #[error(
        "the loss became {loss} by step {step} (lr {lr:.3e}); the last good checkpoint stands. \
         Try a lower train.lr, a longer warm-up or a smaller train.clip_grad_norm"
    )]
    Diverged {
        /// The step at which it was noticed.
        step: u64,
        /// The learning rate of that step.
        lr: f64,
        /// The loss, in words: NaN or infinite.
        loss: f32,
    },
    /// No loss scale makes gradients finite in half precision.
    #[error(
        "gradients were not finite at step {step} (lr {lr:.3e}), down to a loss scale of {scale:e}; \
         the last good checkpoint stands. Try a lower train.lr, a longer warm-up, or train.precision \
         = \"bf16\" or \"f32\""
    )]
    Overflow {
        /// The step at which it was noticed.
        step: u64,
        /// The learning rate of that step.
        lr: f64,
        /// The least scale that was tried.
        scale: f32,
    },
    /// A trained parameter had no part in the loss.
    #[error(
        "parameter {name} received no gradient; freeze it or connect it to the loss, it would \
         silently stay as it is"
    )]
    NoGradient {
        /// The parameter's path in the model.
        name: String,
    },
    /// The device failed, now or in an earlier asynchronous task.
    #[error(
        "the device failed {when}: {reason}; the last checkpoint stands, resume from it when the \
         device is well again"
    )]
    Device {
        /// During which activity it was noticed.
        when: String,
        /// The back-end's own words.
        reason: String,
    },
    /// The device has too little memory for a step.
    #[error("the device ran out of memory {when}: {reason}. {expected}; {remedy}")]
    OutOfMemory {
        /// During which activity it was noticed.
        when: String,
        /// The back-end's own words.
        reason: String,
        /// What was predicted, and what had been measured before.
        expected: String,
        /// What the user can do.
        remedy: String,
    },
    /// A rank failed, and with it the others.
    #[error("rank {rank}: {error}")]
    Rank {
        /// Which one.
        rank: usize,
        /// Why.
        error: Box<TrainError>,
    },
    /// A command was asked for something that the run or the data cannot give.
    #[error("{0}")]
    Request(String),
    /// The configuration was refused.
    #[error(transparent)]
    Config(#[from] crate::config::ConfigError),
    /// Images cannot be read.
    #[error(transparent)]
    Data(#[from] crate::data::DataError),
    /// Published weights cannot be read, written or applied.
    #[error(transparent)]
    Weights(#[from] crate::weights::WeightsError),
    /// The model refused its configuration or input.
    #[error(transparent)]
    Model(#[from] crate::model::ModelError),
    /// A Mixture-of-Experts layer's load cannot be read.
    #[error(transparent)]
    Load(#[from] hexa_moe::MoeError),
    /// The ranks cannot be measured or planned for.
    #[error(transparent)]
    Fleet(#[from] crate::fleet::FleetJobError),
    /// The chosen back-end is not available.
    #[error(transparent)]
    Backend(#[from] crate::backend::BackendError),
}

impl TrainError {
    /// For `map_err` on reads from a device.
    pub(crate) fn device(when: &'static str) -> impl FnOnce(String) -> TrainError {
        move |reason| TrainError::Device {
            when: when.to_owned(),
            reason,
        }
    }

    /// For `map_err` on file system calls.
    pub(crate) fn io(
        action: &'static str,
        path: impl AsRef<Path>,
    ) -> impl FnOnce(std::io::Error) -> TrainError {
        let path = path.as_ref().to_path_buf();
        move |source| TrainError::Io {
            action,
            path,
            source,
        }
    }
}
