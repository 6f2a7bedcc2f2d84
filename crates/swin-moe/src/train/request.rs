//! What a run is asked to do, and what came of it.

use std::path::PathBuf;

use super::faults::DeviceFaults;
use super::interrupt::StopFlag;
use super::metrics::EvalRecord;
use super::progress::Verbosity;
use super::run_dir::RunDir;
use crate::backend::BackendKind;
use crate::config::Config;

/// A new run.
#[derive(Debug, Clone)]
pub struct TrainRequest {
    /// The name in the report and in the default output directory.
    pub name: String,
    /// The settings.
    pub config: Config,
    /// Where to compute.
    pub backend: BackendKind,
    /// The run's directory: new, or empty.
    pub output: PathBuf,
    /// When to stop early and whom to tell.
    pub control: Control,
}

/// An earlier run, to be continued.
#[derive(Debug, Clone)]
pub struct ResumeRequest {
    /// The run's directory.
    pub run: PathBuf,
    /// Where to compute; the back-end that the run used if `None`.
    pub backend: Option<BackendKind>,
    /// The image folder, if it has moved.
    pub data: Option<PathBuf>,
    /// When to stop early and whom to tell.
    pub control: Control,
}

/// When to stop early and whom to tell.
#[derive(Debug, Clone, Default)]
pub struct Control {
    /// Stop once this many steps are done, counted from the run's start.
    pub max_steps: Option<u64>,
    /// Stop after the current step once it is raised.
    pub stop: StopFlag,
    /// What the device's thread has reported.
    pub faults: DeviceFaults,
    /// What to print while running.
    pub verbosity: Verbosity,
}

/// Why a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// All epochs are done.
    Finished,
    /// `max_steps` is reached.
    MaxSteps,
    /// It was asked to stop.
    Interrupted,
}

/// What came of a run.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// Its directory.
    pub run: RunDir,
    /// Why it ended.
    pub end: End,
    /// Steps done since its start.
    pub step: u64,
    /// The last evaluation.
    pub last_eval: Option<EvalRecord>,
    /// The best test accuracy, in percent.
    pub best_top1: Option<f32>,
}
