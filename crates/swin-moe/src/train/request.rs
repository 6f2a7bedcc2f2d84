//! What a run is asked to do, and what came of it.

use std::path::PathBuf;

use hexa_moe::parallel::fleet::Fleet;

use super::faults::DeviceFaults;
use super::interrupt::StopFlag;
use super::metrics::EvalRecord;
use super::progress::Verbosity;
use super::run_dir::RunDir;
use crate::backend::BackendKind;
use crate::config::{Config, ConfigError, Engine, Mode, Rebalance};

/// A new run.
#[derive(Debug, Clone)]
pub struct TrainRequest {
    /// The name in the report and in the default output directory.
    pub name: String,
    /// The settings.
    pub config: Config,
    /// Where to compute.
    pub backend: BackendKind,
    /// The run's directory: new, or empty. Of several processes, rank 0's counts.
    pub output: PathBuf,
    /// Ranks as they were measured, to choose shares by; without it, `config.parallel` says what
    /// each rank does, or has the ranks measured.
    pub fleet: Option<Fleet>,
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
    /// Settings of ranks, over those that the run was begun with.
    pub parallel: ParallelOverrides,
    /// Ranks as they were measured, to choose shares by instead of those that the run had.
    pub fleet: Option<Fleet>,
    /// When to stop early and whom to tell.
    pub control: Control,
}

/// Settings of `[parallel]` that replace others, as far as they are given.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct ParallelOverrides {
    /// Number of ranks.
    pub ranks: Option<usize>,
    /// What ranks are.
    pub engine: Option<Engine>,
    /// What the layers move.
    pub mode: Option<Mode>,
    /// Weights of the ranks' shares; empty for equal ones.
    pub split: Option<Vec<f64>>,
    /// Whether shares follow the ranks' step times.
    pub rebalance: Option<Rebalance>,
    /// Fraction by which the slowest rank may take longer than the fastest before they do.
    pub rebalance_threshold: Option<f64>,
}

impl ParallelOverrides {
    /// The settings with these instead.
    ///
    /// A split for another number of ranks is dropped with that number, and any split with the mode
    /// that chooses shares itself, unless one is given, too.
    ///
    /// # Errors
    /// [`ConfigError`] if they do not fit together.
    pub fn apply(&self, config: &Config) -> Result<Config, ConfigError> {
        let mut raw = config.to_raw();
        let parallel = &mut raw.parallel;
        if self.ranks.is_some_and(|ranks| ranks != parallel.ranks)
            || self.engine.is_some_and(|engine| engine != parallel.engine)
            || self.mode == Some(Mode::Auto)
        {
            parallel.split = Vec::new();
        }
        parallel.engine = self.engine.unwrap_or(parallel.engine);
        // As many as mpirun has started, unless said otherwise.
        let ranks = match self.engine {
            Some(Engine::Mpi) => 1,
            _ => parallel.ranks,
        };
        parallel.ranks = self.ranks.unwrap_or(ranks);
        parallel.mode = self.mode.unwrap_or(parallel.mode);
        if let Some(split) = &self.split {
            parallel.split = split.clone();
        }
        parallel.rebalance = self.rebalance.unwrap_or(parallel.rebalance);
        let threshold = self.rebalance_threshold;
        parallel.rebalance_threshold = threshold.unwrap_or(parallel.rebalance_threshold);
        raw.validate()
    }

    /// Whether a run with these settings keeps the shares that it had.
    pub(super) fn keep_shares(&self, config: &Config) -> bool {
        let engine = config.parallel.engine;
        self.ranks.is_none()
            && self.mode.is_none()
            && self.split.is_none()
            && self.engine.is_none_or(|given| given == engine)
    }
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
    /// Whether this process speaks for the run: all do but MPI's ranks other than 0.
    pub is_lead: bool,
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
