//! What can go wrong with a checkpoint file.

use std::path::PathBuf;

use super::report::ImportReport;
use crate::model::ModelError;

/// Why a checkpoint cannot be read, written or applied.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WeightsError {
    /// The file system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The reason.
        source: std::io::Error,
    },
    /// The file is not what its name says, or is damaged.
    #[error("{}: not a readable checkpoint: {reason}; {remedy}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
        /// What the caller can do.
        remedy: &'static str,
    },
    /// The file's name says nothing about its format.
    #[error(
        "{}: unknown kind of checkpoint, allowed are .pth, .pt, .bin and .safetensors; rename or convert the file",
        path.display()
    )]
    Extension {
        /// The file.
        path: PathBuf,
    },
    /// The checkpoint's tensors are not those of the model.
    #[error(
        "{}: the checkpoint does not fit the model; check the model's configuration, or allow a partial import\n{report}",
        path.display()
    )]
    Mismatch {
        /// The file.
        path: PathBuf,
        /// What does not fit.
        report: Box<ImportReport>,
    },
    /// A model cannot be made one with experts.
    #[error("{}: cannot be upcycled: {reason}; {remedy}", path.display())]
    Upcycle {
        /// The file, or the checkpoint's directory.
        path: PathBuf,
        /// What is wrong.
        reason: String,
        /// What the caller can do.
        remedy: &'static str,
    },
    /// The back-end could not hand out a tensor.
    #[error("reading {name} from the device failed: {reason}")]
    Device {
        /// The tensor's published name.
        name: String,
        /// The back-end's own words.
        reason: String,
    },
    /// The model refused its configuration.
    #[error(transparent)]
    Model(#[from] ModelError),
}

impl WeightsError {
    pub(crate) fn io(path: &std::path::Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| Self::Io { path, source }
    }

    pub(crate) fn format(path: &std::path::Path, reason: impl ToString) -> Self {
        Self::Format {
            path: path.to_path_buf(),
            reason: reason.to_string(),
            remedy: "fetch or export the file again",
        }
    }
}
