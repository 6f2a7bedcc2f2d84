//! Training: loop, optimizer, schedule, metrics, checkpoints and report.

pub mod checkpoint;
mod error;
mod interrupt;
mod loss;
pub mod metrics;
pub mod optimizer;
pub mod params;
mod progress;
pub mod report;
pub mod run_dir;
pub mod schedule;

pub use error::{Result, TrainError};
pub use interrupt::StopFlag;
pub use loss::cross_entropy;
pub use progress::Progress;
