//! Unequal ranks: what each was measured at, who gets how much, and which mode is cheaper.
//!
//! ```text
//! fleet  = calibrate(…)                 measures; all ranks together
//! fleet.save(path)                      the fleet file, TOML
//! chosen = choose(&fleet, &workload)    modes and shares, with predicted time and memory
//! ```

mod calibrate;
mod choose;
mod cost;
mod error;
mod file;
mod fit;
mod probe;
mod shape;
mod shares;
mod table;

pub use calibrate::{Calibration, MeasuredStep, calibrate};
pub use choose::{balanced_plan, choose};
pub use cost::{LayerPrediction, Prediction, RankMemory, RankPrediction, predict};
pub use error::{FleetError, Result};
pub use file::{FLEET_VERSION, FfnCost, Fleet, LinkCost, Links, RankProfile, StepCost};
pub use shape::{FfnShape, LayerShape, Workload};
pub use shares::{AffineTime, balanced_shares, width_multiple};
pub use table::PlanTable;
