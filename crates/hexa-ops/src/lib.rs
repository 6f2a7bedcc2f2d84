//! Expert-specific operators for Mixture-of-Experts layers on Burn.

pub mod backend;
pub mod backends;
pub mod dropout;
mod error;
pub mod ops;
#[cfg(feature = "testing")]
pub mod testing;
mod types;

pub use backend::{ExpertKernels, ExpertOps, TrainingBackend};
pub use error::{OpsError, Result};
pub use types::{Activation, FfnOptions, MatmulPrecision, RowOrder};
