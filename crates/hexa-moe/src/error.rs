//! The one error type of this crate.

use hexa_ops::OpsError;

use crate::parallel::comm::CommError;

/// Why a layer could not be built, run or read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MoeError {
    /// A field of [`MoeConfig`](crate::MoeConfig) is outside its range.
    #[error("MoeConfig.{field} is {got}, allowed is {allowed}; {remedy}")]
    Config {
        /// The field's name.
        field: &'static str,
        /// What was given.
        got: String,
        /// What is allowed.
        allowed: String,
        /// What the caller can do.
        remedy: &'static str,
    },
    /// The layer's input is not made of tokens of the layer's width.
    #[error(
        "Moe: the input has shape {got:?}, expected [..., {d_model}]; its last dimension is the token width MoeConfig.d_model"
    )]
    Input {
        /// The shape that was given.
        got: Vec<usize>,
        /// The layer's token width.
        d_model: usize,
    },
    /// A tensor of a dense feed-forward is not of the layer's sizes.
    #[error(
        "upcycling: the dense {tensor} has shape {got:?}, expected {expected:?}, by MoeConfig.d_model, d_ff and activation; give them the dense feed-forward's sizes, and weights as [in, out]"
    )]
    DenseShape {
        /// Which tensor.
        tensor: &'static str,
        /// The shape that was given.
        got: Vec<usize>,
        /// The shape that the configuration asks for.
        expected: Vec<usize>,
    },
    /// The noise of upcycled experts is no standard deviation.
    #[error("upcycling: the noise is {got}, allowed is a finite number >= 0; use 0 for copies")]
    ExpertNoise {
        /// What was given.
        got: String,
    },
    /// Shares or slices do not fit what they divide.
    #[error("the split is given {got}; allowed is {allowed}")]
    Split {
        /// What was given.
        got: String,
        /// What is allowed.
        allowed: &'static str,
    },
    /// Ranks could not communicate.
    #[error(transparent)]
    Comm(CommError),
    /// An operator refused its arguments, or the device failed.
    #[error(transparent)]
    Ops(#[from] OpsError),
}

/// Result of the layer.
pub type Result<T> = core::result::Result<T, MoeError>;
