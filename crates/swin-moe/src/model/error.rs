//! The model's errors.

use hexa_moe::MoeError;
use hexa_ops::OpsError;

/// Why a model cannot be built or applied.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// A configuration value is outside its range, or does not fit the others.
    #[error("model: {key} is {got}, allowed is {allowed}; {remedy}")]
    Config {
        /// The field of [`super::SwinMoeConfig`].
        key: String,
        /// What was given.
        got: String,
        /// What is allowed.
        allowed: String,
        /// What the caller can do.
        remedy: String,
    },
    /// The images do not have the shape that the model was built for.
    #[error("images have shape {got:?}, expected [batch, {channels}, {size}, {size}]; {remedy}")]
    Images {
        /// The shape they have.
        got: Vec<usize>,
        /// The number of channels of the model.
        channels: usize,
        /// The image size of the model.
        size: usize,
        /// What the caller can do.
        remedy: &'static str,
    },
    /// An operator refused its input.
    #[error(transparent)]
    Ops(#[from] OpsError),
    /// A Mixture-of-Experts layer refused its configuration or input.
    #[error(transparent)]
    Moe(#[from] MoeError),
}

/// Result of building or applying the model.
pub type Result<T> = core::result::Result<T, ModelError>;
