//! From a request to a session: directories, data, model, optimizer.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use burn::tensor::Tensor;
use hexa_moe::parallel::fleet::Fleet;
use hexa_ops::TrainingBackend;

use super::checkpoint::{Checkpoint, RunState};
use super::error::{Result, TrainError};
use super::finetune::{Origin, frozen, frozen_note};
use super::images::Images;
use super::loss_scale::LossScale;
use super::metrics::{EvalRecord, MetricsWriter, Record, read_records};
use super::optimizer::{AdamW, AdamWConfig};
use super::params::write_params;
use super::probe::step_shape;
use super::progress::Progress;
use super::random::init_seed;
use super::ranks::{PlanFor, Planned, RankJob, Ranks, Seat, launch};
use super::report::Facts;
use super::request::{Control, Outcome, ResumeRequest, TrainRequest};
use super::run_dir::RunDir;
use super::schedule::Schedule;
use super::session::{Place, Session};
use super::starvation::Starvation;
use super::step_memory::StepMemory;
use crate::backend::{BackendKind, check_precision};
use crate::config::{Config, DataSource, Freeze, TrainConfig};
use crate::fleet::FleetJobError;
use crate::memory::{Held, PeakMemory, TrainingMemory, check_fits};
use crate::model::SwinMoe;
use crate::settings::model_config;

/// Starts a new run and trains it to its end, or until it is asked to stop.
///
/// # Errors
/// [`TrainError`], with the last good checkpoint in the run's directory if there was one.
pub fn train(mut request: TrainRequest) -> Result<Outcome> {
    let images = Images::open(&request.config)?;
    let origin = Origin::open(&mut request.config, images.class_names().len())?;
    let parallel = request.config.parallel.clone();
    let job = Start {
        request,
        images,
        origin,
    };
    launch(job.request.backend, &parallel, job)
}

/// Continues a run as if it had never stopped.
///
/// # Errors
/// As [`train`], and if the directory or its checkpoint is not usable.
pub fn resume(request: ResumeRequest) -> Result<Outcome> {
    let run = RunDir::open(&request.run)?;
    let (checkpoint, path) = run.load_last()?;
    let mut config = Config::from_toml::<&str>(
        &checkpoint.state.config,
        "the checkpoint's configuration",
        &[],
    )?;
    if let Some(folder) = request.data {
        config.data.source = DataSource::Folder(folder);
    }
    let keep_shares = request.parallel.keep_shares(&config);
    let config = request.parallel.apply(&config)?;
    let planned = match request.fleet {
        Some(fleet) => Planned::by(Some(fleet)),
        None => match checkpoint.state.plan.clone().filter(|_| keep_shares) {
            Some(plan) => Planned {
                plan: Some(plan),
                fleet: fleet_of(&run),
            },
            None => Planned::default(),
        },
    };
    let images = Images::open(&config)?;
    check_classes(&checkpoint.state, images.class_names(), run.root())?;
    let backend = request.backend.unwrap_or(checkpoint.state.backend);
    let job = Continue {
        run,
        path,
        checkpoint: Arc::new(checkpoint),
        config,
        images,
        backend,
        planned,
        control: request.control,
    };
    let parallel = job.config.parallel.clone();
    launch(backend, &parallel, job)
}

/// What the ranks of an earlier run were measured at, to compare with; of a file that is damaged,
/// a line goes to the log.
fn fleet_of(run: &RunDir) -> Option<Fleet> {
    let path = run.fleet();
    if !path.exists() {
        return None;
    }
    Fleet::load(&path)
        .map_err(|error| log::warn!("predictions are left out of the report: {error}"))
        .ok()
}

/// A model must be used with the classes that it learnt.
pub(super) fn check_classes(state: &RunState, found: &[String], path: &Path) -> Result<()> {
    if state.class_names == found {
        return Ok(());
    }
    Err(TrainError::RunDir {
        path: path.to_path_buf(),
        reason: format!(
            "the model knows {} classes ({}), the data has {} ({})",
            state.class_names.len(),
            first_few(&state.class_names),
            found.len(),
            first_few(found),
        ),
        remedy: "give data with the classes that the model was trained on with --data".to_owned(),
    })
}

fn first_few(names: &[String]) -> String {
    let mut text = names.iter().take(4).cloned().collect::<Vec<_>>().join(", ");
    if names.len() > 4 {
        text.push_str(", …");
    }
    text
}

#[derive(Clone)]
pub(super) struct Start {
    pub request: TrainRequest,
    pub images: Images,
    pub origin: Option<Origin>,
}

impl RankJob for Start {
    type Output = Outcome;

    fn run<B: TrainingBackend>(self, device: &B::Device, seat: Seat) -> Result<Outcome> {
        let Start {
            request,
            images,
            origin,
        } = self;
        let config = request.config;
        let classes = images.class_names().len();
        let plan_for = PlanFor {
            config: &config,
            num_classes: classes,
            backend: request.backend,
            verbosity: request.control.verbosity,
        };
        let planned = seat.plan::<B>(Planned::by(request.fleet), &plan_for, device)?;
        let fleet = planned.fleet.clone();
        let model = seat.in_turn(|| new_model::<B>(&config, classes, request.backend, device))?;
        let (model, notes) = match &origin {
            Some(origin) => origin.apply(model)?,
            None => (model, Vec::new()),
        };
        let (ranks, model) = Ranks::join(&seat, &config, planned, model)?;
        let model = frozen(model, config.init.freeze);
        let optimizer = ranks.optimizer(adamw_config(&config.train), &model);
        let output = ranks.agree_on(&request.output)?;
        let (run, metrics) = if ranks.is_lead() {
            let run = RunDir::create(&output)?;
            let path = run.config();
            fs::write(&path, config.to_toml()).map_err(TrainError::io("write", path))?;
            save_fleet(&run, fleet.as_ref())?;
            let metrics = MetricsWriter::create(&run.metrics())?;
            (run, metrics)
        } else {
            let run = RunDir::at(&output);
            let metrics = MetricsWriter::nowhere(&run.metrics());
            (run, metrics)
        };
        ranks.barrier("the run directory is there")?;
        let place = Place {
            step: 0,
            epoch: 0,
            batch: 0,
            ce_sum: Tensor::zeros([1], device),
            aux_sum: Tensor::zeros([1], device),
            best_top1: None,
            loss_scale: LossScale::of(config.train.precision),
            last_eval: None,
        };
        let parts = Parts {
            name: request.name,
            backend: request.backend,
            config,
            images,
            run,
            metrics,
            control: request.control,
            ranks,
            notes,
        };
        parts.session(model, optimizer, place, device)?.run()
    }
}

#[derive(Clone)]
struct Continue {
    run: RunDir,
    path: PathBuf,
    checkpoint: Arc<Checkpoint>,
    config: Config,
    images: Images,
    backend: BackendKind,
    planned: Planned,
    control: Control,
}

impl RankJob for Continue {
    type Output = Outcome;

    fn run<B: TrainingBackend>(self, device: &B::Device, seat: Seat) -> Result<Outcome> {
        let checkpoint = Arc::unwrap_or_clone(self.checkpoint);
        let state = checkpoint.state.clone();
        let path = self.path;
        let plan_for = PlanFor {
            config: &self.config,
            num_classes: state.class_names.len(),
            backend: self.backend,
            verbosity: self.control.verbosity,
        };
        let planned = seat.plan::<B>(self.planned, &plan_for, device)?;
        let fleet = planned.fleet.clone();
        let (model, optimizer, ranks) = restore::<B>(
            checkpoint,
            &path,
            &self.config,
            self.backend,
            &seat,
            planned,
            device,
        )?;
        let metrics = if ranks.is_lead() {
            save_fleet(&self.run, fleet.as_ref())?;
            self.run.set_newer_aside(&path)?;
            MetricsWriter::resume(&self.run.metrics(), state.metrics_bytes, state.step)?
        } else {
            MetricsWriter::nowhere(&self.run.metrics())
        };
        ranks.barrier("the metrics are as they were")?;
        // The sum over ranks is this rank's addend.
        let ce_sum = if ranks.is_lead() {
            f32::from_bits(state.ce_sum_bits)
        } else {
            0.0
        };
        let place = Place {
            step: state.step,
            epoch: state.epoch,
            batch: state.batch,
            ce_sum: Tensor::full([1], ce_sum, device),
            aux_sum: Tensor::full([1], f32::from_bits(state.aux_sum_bits), device),
            best_top1: state.best_top1,
            // Of settings that were changed to f16, it starts anew.
            loss_scale: LossScale::of(self.config.train.precision)
                .map(|first| state.loss_scale.unwrap_or(first)),
            last_eval: last_eval(&self.run)?,
        };
        let parts = Parts {
            name: state.name,
            backend: self.backend,
            config: self.config,
            images: self.images,
            run: self.run,
            metrics,
            control: self.control,
            ranks,
            notes: Vec::new(),
        };
        parts.session(model, optimizer, place, device)?.run()
    }
}

/// A checkpoint's model and optimizer, or of both this rank's part.
pub(super) fn restore<B: TrainingBackend>(
    checkpoint: Checkpoint,
    path: &Path,
    config: &Config,
    backend: BackendKind,
    seat: &Seat,
    planned: Planned,
    device: &B::Device,
) -> Result<(SwinMoe<B>, AdamW<B>, Ranks)> {
    let Checkpoint {
        state,
        model: weights,
        optimizer: moments,
    } = checkpoint;
    let unfit = |reason: String| TrainError::Checkpoint {
        path: path.to_path_buf(),
        reason,
        remedy: "it belongs to another model or version; start a new run",
    };
    let model = new_model::<B>(config, state.class_names.len(), backend, device)?;
    let model = write_params(model, weights).map_err(unfit)?;
    let (ranks, model) = Ranks::join(seat, config, planned, model)?;
    let model = frozen(model, config.init.freeze);
    let mut optimizer = ranks.optimizer(adamw_config(&config.train), &model);
    // Imported weights come without moments: the run then starts with them.
    if state.step > 0 || !moments.is_empty() {
        let moments = ranks.own_state(moments);
        optimizer.load_state(moments).map_err(unfit)?;
    }
    Ok((model, optimizer, ranks))
}

/// Remembers with the run what its ranks were measured at.
fn save_fleet(run: &RunDir, fleet: Option<&Fleet>) -> Result<()> {
    match fleet {
        Some(fleet) => Ok(fleet.save(&run.fleet()).map_err(FleetJobError::from)?),
        None => Ok(()),
    }
}

/// The run's last evaluation, of those that stand in its metrics.
fn last_eval(run: &RunDir) -> Result<Option<EvalRecord>> {
    let records = read_records(&run.metrics())?;
    Ok(records.into_iter().rev().find_map(|record| match record {
        Record::Eval(eval) => Some(eval),
        Record::Step(_) => None,
    }))
}

/// A model with initial weights that depend on the seed alone.
pub(crate) fn new_model<B: TrainingBackend>(
    config: &Config,
    num_classes: usize,
    backend: BackendKind,
    device: &B::Device,
) -> Result<SwinMoe<B>> {
    let model = model_config(config, num_classes)?;
    check_precision::<B>(device, config.train.precision)?;
    // A GPU has memory of its own, and says so itself when it runs out.
    if backend == BackendKind::Cpu {
        check_fits(&model, Held::TrainingState, config.train.batch_size)?;
    }
    B::seed(device, init_seed(config.train.seed));
    Ok(model.init(device)?)
}

pub(super) fn adamw_config(train: &TrainConfig) -> AdamWConfig {
    AdamWConfig {
        beta1: train.betas[0],
        beta2: train.betas[1],
        epsilon: train.eps,
        weight_decay: train.weight_decay,
        clip_grad_norm: train.clip_grad.unwrap_or(0.0),
        ema_decay: train.ema_decay,
    }
}

fn schedule(train: &TrainConfig, steps_per_epoch: u64) -> Schedule {
    let scale = train.lr_scale();
    Schedule {
        lr: train.lr * scale,
        warmup_lr: train.warmup_lr * scale,
        min_lr: train.min_lr * scale,
        warmup_steps: train.warmup_epochs as u64 * steps_per_epoch,
        total_steps: train.epochs as u64 * steps_per_epoch,
    }
}

/// What a session consists of besides the tensors.
struct Parts {
    name: String,
    backend: BackendKind,
    config: Config,
    images: Images,
    run: RunDir,
    metrics: MetricsWriter,
    control: Control,
    ranks: Ranks,
    /// What is said at the start.
    notes: Vec<String>,
}

impl Parts {
    fn session<B: TrainingBackend>(
        self,
        model: SwinMoe<B>,
        optimizer: AdamW<B>,
        place: Place<B>,
        device: &B::Device,
    ) -> Result<Session<'_, B>> {
        let train = &self.config.train;
        let steps_per_epoch = self.images.train.num_batches(train.batch_size);
        let schedule = schedule(train, steps_per_epoch);
        let predicted = self.predicted_memory(&model)?;
        let mut facts = facts(&self, &schedule);
        facts.predicted_bytes = predicted.as_ref().map(PeakMemory::total_bytes);
        let memory = StepMemory::new(&self.config, predicted);
        let (steps, epochs) = (schedule.total_steps, train.epochs as u64);
        let progress = if self.ranks.is_lead() {
            Progress::new(self.control.verbosity, place.step, steps, epochs)
        } else {
            let (rank, _) = self.ranks.place();
            Progress::to_file(&self.run.rank_log(rank), steps, epochs)?
        };
        let freeze = self.config.init.freeze;
        let notes = self.notes.iter().cloned();
        let notes = notes.chain(frozen_note(&model, freeze));
        for note in notes.chain(self.ranks.describe()) {
            progress.say(&note);
        }
        Ok(Session {
            device,
            backend: self.backend,
            config: self.config,
            images: self.images,
            model,
            optimizer,
            schedule,
            run: self.run,
            metrics: self.metrics,
            facts,
            progress,
            control: self.control,
            place,
            ranks: self.ranks,
            memory,
            starvation: Starvation::default(),
        })
    }

    /// Of a step; none where ranks share the model, or where the head alone is trained.
    fn predicted_memory<B: TrainingBackend>(
        &self,
        model: &SwinMoe<B>,
    ) -> Result<Option<PeakMemory>> {
        if self.ranks.place().1 > 1 || self.config.init.freeze == Freeze::Backbone {
            return Ok(None);
        }
        let shape = step_shape(&self.config, self.backend);
        let memory = TrainingMemory::new(model.config(), shape)?;
        Ok(Some(memory.peak()))
    }
}

fn facts(parts: &Parts, schedule: &Schedule) -> Facts {
    let config = &parts.config;
    let line = |label: &str, value: String| (label.to_owned(), value);
    let mut facts = Facts {
        name: parts.name.clone(),
        predicted_bytes: None,
        comparison: None,
        lines: vec![
            line("back-end", parts.backend.to_string()),
            line("arithmetic", config.train.precision.name().to_owned()),
            line("seed", config.train.seed.to_string()),
            line(
                "images",
                format!(
                    "{} for training, {} for testing, {} classes",
                    parts.images.train.len(),
                    parts.images.test.len(),
                    parts.images.class_names().len()
                ),
            ),
            line("ranks", parts.ranks.place().1.to_string()),
            line("steps", schedule.total_steps.to_string()),
            line("batch size", config.train.batch_size.to_string()),
            line("augmentation", config.augment.summary()),
            line(
                "experts",
                format!("{}, top {}", config.moe.num_experts, config.moe.top_k),
            ),
        ],
    };
    let source = config.init.source.as_ref();
    facts
        .lines
        .extend(source.map(|source| line("initial weights", format!("those of {source}"))));
    if config.init.freeze == Freeze::Backbone {
        facts
            .lines
            .push(line("trained", "the head alone".to_owned()));
    }
    facts
}
