//! Training: loop, optimizer, schedule, metrics, checkpoints and report.
//!
//! [`train`] starts a run, [`resume`] continues one; [`Trained`] is what a checkpoint can be used
//! for. None of them is generic: the back-end is a value, see [`crate::backend`].

mod calibrate;
pub mod checkpoint;
pub mod classes;
mod device;
mod error;
mod evaluate;
mod faults;
mod finetune;
mod images;
mod inference;
mod inspect;
mod interrupt;
mod loss;
mod loss_scale;
pub mod metrics;
pub mod optimizer;
pub mod params;
pub mod pass;
mod probe;
mod progress;
mod random;
mod ranks;
pub mod report;
mod request;
mod reslice;
pub mod run_dir;
pub mod schedule;
mod session;
mod setup;
mod starvation;
mod step_memory;
pub mod tally;
mod tensorboard;
mod throughput;
mod upcycle;

pub use calibrate::{CalibrateProcessRequest, calibrate_process};
pub use error::{Result, TrainError};
pub use evaluate::{Evaluation, evaluate};
pub use faults::DeviceFaults;
pub use images::{Images, TestImages, TrainImages};
pub use inference::{ImportRequest, Prediction, Scores, Trained, import};
pub use inspect::Inspection;
pub use interrupt::StopFlag;
pub use loss::{Targets, cross_entropy};
pub use loss_scale::LossScale;
pub use probe::{MemoryProbe, ProbeRequest, probe_memory, probe_on, step_shape};
pub use progress::{Progress, Verbosity};
pub use request::{Control, End, Outcome, ParallelOverrides, ResumeRequest, TrainRequest};
pub use setup::{resume, train};
pub use throughput::{Throughput, ThroughputMode, ThroughputRequest, throughput};
pub use upcycle::{DenseSource, UpcycleRequest, Upcycled, upcycle};
