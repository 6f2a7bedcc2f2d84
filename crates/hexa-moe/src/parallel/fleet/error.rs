//! Why a fleet cannot be read, measured or planned for.

use std::path::PathBuf;

use super::shape::FfnShape;
use crate::error::MoeError;

/// Failure of calibration or planning.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FleetError {
    /// The file cannot be read or written.
    #[error("the fleet file {}: {reason}; check --fleet, or write one with `swin-moe calibrate`", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The system's words.
        reason: String,
    },
    /// The text is no fleet: its syntax, a name or a type.
    #[error("{origin} is no fleet file: {reason}; write one with `swin-moe calibrate`")]
    Syntax {
        /// The file.
        origin: String,
        /// The parser's words, with line and column.
        reason: String,
    },
    /// A value outside its range.
    #[error("{origin}: {field} is {got}, allowed is {allowed}; calibrate again, or correct it")]
    Value {
        /// The file.
        origin: String,
        /// The field, with the name of its rank.
        field: String,
        /// What stands there.
        got: String,
        /// What is allowed.
        allowed: &'static str,
    },
    /// A layer that was not measured.
    #[error(
        "rank `{rank}` was not measured on experts of {wanted}, only on {measured}; calibrate with the configuration that is planned"
    )]
    Shape {
        /// Name of the rank.
        rank: String,
        /// The layer's experts.
        wanted: FfnShape,
        /// What the fleet file has, in words.
        measured: String,
    },
    /// The step was measured on another model.
    #[error(
        "the fleet was calibrated on a model with {measured} replicated parameters, this one has {wanted}; calibrate with the configuration that is planned"
    )]
    Model {
        /// Replicated parameters of the calibrated model.
        measured: u64,
        /// Those of the model to be planned.
        wanted: u64,
    },
    /// The plan is for another number of ranks.
    #[error(
        "the fleet has {fleet} ranks, {wanted} are wanted; calibrate with that number of ranks"
    )]
    Ranks {
        /// Ranks of the fleet.
        fleet: usize,
        /// Ranks that are wanted.
        wanted: usize,
    },
    /// No choice of modes fits into the ranks' memory.
    #[error(
        "rank `{rank}` needs {needed} bytes in any mode and has {available}; lower the batch size or the model's widths, or add a rank"
    )]
    Memory {
        /// Name of the rank that lacks most.
        rank: String,
        /// Bytes that the most frugal choice takes there.
        needed: u64,
        /// Bytes that the fleet file grants it.
        available: u64,
    },
    /// More kinds of layers than choices can be enumerated for.
    #[error(
        "the model has {got} kinds of Mixture-of-Experts layers, the planner compares up to {limit}; give a mode with --mode"
    )]
    Kinds {
        /// Distinct shapes.
        got: usize,
        /// The most that are enumerated.
        limit: usize,
    },
    /// A step of the model failed while it was measured.
    #[error("the model's step failed while it was measured: {0}")]
    Step(String),
    /// The layer, a device or a rank failed.
    #[error(transparent)]
    Moe(#[from] MoeError),
}

/// Result of calibration and planning.
pub type Result<T> = core::result::Result<T, FleetError>;
