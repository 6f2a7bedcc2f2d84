//! The training loop.

mod step;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use burn::module::AutodiffModule;
use burn::tensor::Tensor;
use hexa_ops::TrainingBackend;

use self::step::StepTrace;
use super::checkpoint::RunState;
use super::device::{self, scalar};
use super::error::{Result, TrainError};
use super::evaluate::evaluate_together;
use super::images::Images;
use super::loss_scale::LossScale;
use super::metrics::{EvalRecord, MetricsWriter, Record, StepRecord, WORST_CLASSES};
use super::optimizer::AdamW;
use super::params::read_params;
use super::progress::Progress;
use super::ranks::{Ranks, Snapshot};
use super::report;
use super::request::{Control, End, Outcome};
use super::run_dir::RunDir;
use super::schedule::Schedule;
use super::starvation::{self, Starvation};
use super::step_memory::StepMemory;
use super::tally::read_loads;
use crate::backend::BackendKind;
use crate::config::Config;
use crate::data::Loader;
use crate::model::SwinMoe;

/// A run in progress on one device.
pub(super) struct Session<'a, B: TrainingBackend> {
    pub device: &'a B::Device,
    pub backend: BackendKind,
    pub config: Config,
    pub images: Images,
    pub model: SwinMoe<B>,
    pub optimizer: AdamW<B>,
    pub schedule: Schedule,
    pub run: RunDir,
    pub metrics: MetricsWriter,
    pub facts: report::Facts,
    pub progress: Progress,
    pub control: Control,
    pub place: Place<B>,
    pub ranks: Ranks,
    pub memory: StepMemory,
    pub starvation: Starvation,
}

/// How far a run is.
pub(super) struct Place<B: TrainingBackend> {
    pub step: u64,
    pub epoch: u64,
    pub batch: u64,
    /// Sums over the epoch's batches, on the device: a mean that costs no synchronisation, and
    /// that tells of any loss in between that was not a number.
    pub ce_sum: Tensor<B::InnerBackend, 1>,
    pub aux_sum: Tensor<B::InnerBackend, 1>,
    pub best_top1: Option<f32>,
    pub loss_scale: Option<LossScale>,
    pub last_eval: Option<EvalRecord>,
}

/// Images and time since the last log line, evaluations and checkpoints left out.
struct Pace {
    images: usize,
    since: Instant,
    /// How long the loader had been waited for before.
    waited_before: Duration,
}

impl Pace {
    fn new(waited_before: Duration) -> Self {
        Pace {
            images: 0,
            since: Instant::now(),
            waited_before,
        }
    }

    /// Share of the time that went to waiting for the loader.
    fn loader_wait(&self, waited: Duration) -> f64 {
        let waited = waited.saturating_sub(self.waited_before);
        starvation::share(waited, self.since.elapsed())
    }

    fn images_per_s(&self) -> f64 {
        self.images as f64 / self.since.elapsed().as_secs_f64().max(1e-9)
    }
}

impl<B: TrainingBackend> Session<'_, B> {
    /// Trains until the end of the last epoch, or until asked to stop.
    ///
    /// # Errors
    /// [`TrainError`]; the last good checkpoint stands.
    pub(super) fn run(mut self) -> Result<Outcome> {
        let trained = catch_unwind(AssertUnwindSafe(|| self.train()));
        let end = self.memory.explain(trained, &self.control.faults)?;
        Ok(Outcome {
            is_lead: self.ranks.is_lead(),
            run: self.run,
            end,
            step: self.place.step,
            last_eval: self.place.last_eval,
            best_top1: self.place.best_top1,
        })
    }

    fn train(&mut self) -> Result<End> {
        let epochs = self.config.train.epochs as u64;
        let mut end = self.reason_to_stop();
        while end.is_none() && self.place.epoch < epochs {
            end = self.train_epoch()?;
            if end.is_none() {
                self.finish_epoch()?;
                end = self.reason_to_stop();
            }
        }
        if end.is_some() {
            self.save(false)?;
        }
        self.progress.finish();
        self.write_report()?;
        Ok(match end {
            Some(end) if self.place.epoch < epochs => end,
            _ => End::Finished,
        })
    }

    /// The rest of the current epoch. Gives the reason if it was cut short.
    fn train_epoch(&mut self) -> Result<Option<End>> {
        let log_every = self.log_every();
        let save_every = self.config.checkpoint.every_steps.map(|steps| steps as u64);
        let mut batches = self.batches()?;
        let mut pace = Pace::new(Duration::ZERO);
        while let Some(batch) = batches.next() {
            let batch = batch?;
            let Some(trace) = self.step(batch)? else {
                continue;
            };
            if let Some(reason) = self.ranks.finish_step()? {
                let step = self.place.step;
                self.progress.say(&format!("after step {step}: {reason}"));
                batches = self.batches()?;
            }
            pace.images += trace.images;
            self.progress.advance(self.place.step);
            if self.place.step.is_multiple_of(log_every) {
                self.log(trace, &pace, batches.waited())?;
                pace = Pace::new(batches.waited());
            }
            let end = self.reason_to_stop();
            if end.is_some() {
                return Ok(end);
            }
            if save_every.is_some_and(|every| self.place.step.is_multiple_of(every)) {
                self.save(false)?;
                self.reslice()?;
                pace = Pace::new(batches.waited());
            }
        }
        Ok(None)
    }

    fn log_every(&self) -> u64 {
        self.config.train.log_every.max(1) as u64
    }

    /// This rank's part of the epoch's batches that are still to come.
    fn batches(&self) -> Result<Loader> {
        let train = &self.config.train;
        self.images.train.batches(
            train.batch_size,
            train.seed,
            self.place.epoch,
            self.place.batch,
            self.ranks.batch_part(),
        )
    }

    fn reason_to_stop(&self) -> Option<End> {
        if self.ranks.is_to_stop(self.control.stop.is_raised()) {
            Some(End::Interrupted)
        } else if self
            .control
            .max_steps
            .is_some_and(|max| self.place.step >= max)
        {
            Some(End::MaxSteps)
        } else {
            None
        }
    }

    /// Waits for the device, checks that all is well and writes a line of metrics.
    fn log(&mut self, trace: StepTrace<B>, pace: &Pace, waited: Duration) -> Result<()> {
        device::check::<B>(self.device, self.place.step)?;
        self.check_device()?;
        let ce_loss = self.sum("cross entropy", scalar(trace.ce_loss)?)?;
        let aux_loss = scalar(trace.aux_loss)?;
        self.check_finite(ce_loss + aux_loss, trace.lr)?;
        self.check_sums(trace.lr)?;
        let record = StepRecord {
            step: self.place.step,
            epoch: self.place.epoch + 1,
            loss: ce_loss + aux_loss,
            ce_loss,
            aux_loss,
            lr: trace.lr,
            grad_norm: Some(scalar(trace.grad_norm)?).filter(|norm| norm.is_finite()),
            loss_scale: self.place.loss_scale.map(LossScale::value),
            images_per_s: pace.images_per_s(),
            loader_wait: pace.loader_wait(waited),
            layers: read_loads(&trace.loads, self.model.moe_layers().count())?,
            memory: self.memory.record(),
        };
        self.check_device()?;
        self.progress.step(&record);
        let workers = self.config.data.num_workers();
        let (share, epoch) = (record.loader_wait, record.epoch);
        if let Some(warning) = self.starvation.warning(share, epoch, workers) {
            self.progress.say(&warning);
        }
        self.metrics.append(&Record::Step(record))
    }

    /// An error if the device's thread has reported a failure.
    fn check_device(&self) -> Result<()> {
        let step = self.place.step;
        self.control.faults.check(&format!("by step {step}"))
    }

    /// The sum of all ranks' values.
    fn sum(&self, what: &str, value: f32) -> Result<f32> {
        let sum = self.ranks.sum(what, vec![value])?;
        Ok(sum.into_iter().sum())
    }

    fn write_report(&mut self) -> Result<()> {
        self.facts.comparison = self.ranks.comparison()?;
        if self.ranks.is_lead() {
            report::write(&self.run, &self.facts)?;
        }
        Ok(())
    }

    fn check_finite(&self, loss: f32, lr: f64) -> Result<()> {
        if loss.is_finite() {
            return Ok(());
        }
        Err(TrainError::Diverged {
            step: self.place.step,
            lr,
            loss,
        })
    }

    /// The epoch's sums; an error if any loss in them was not a number.
    fn check_sums(&self, lr: f64) -> Result<(f32, f32)> {
        let ce_sum = self.sum("sum of cross entropies", scalar(self.place.ce_sum.clone())?)?;
        let aux_sum = scalar(self.place.aux_sum.clone())?;
        self.check_finite(ce_sum + aux_sum, lr)?;
        Ok((ce_sum, aux_sum))
    }

    /// Evaluates where it is due, saves, and moves on to the next epoch.
    fn finish_epoch(&mut self) -> Result<()> {
        let epoch = self.place.epoch + 1;
        let train = &self.config.train;
        let is_last = epoch == train.epochs as u64;
        if is_last || epoch.is_multiple_of(train.eval_every_epochs.max(1) as u64) {
            self.evaluate(epoch)?;
        }
        self.place.epoch = epoch;
        self.place.batch = 0;
        self.place.ce_sum = Tensor::zeros([1], self.device);
        self.place.aux_sum = Tensor::zeros([1], self.device);
        let improved = match (&self.place.last_eval, self.place.best_top1) {
            (Some(eval), best) => {
                eval.step == self.place.step && best.is_none_or(|best| eval.top1 > best)
            }
            (None, _) => false,
        };
        if improved {
            self.place.best_top1 = self.place.last_eval.as_ref().map(|eval| eval.top1);
        }
        self.save(improved)?;
        self.reslice()?;
        self.write_report()
    }

    fn evaluate(&mut self, epoch: u64) -> Result<()> {
        let (ce_sum, aux_sum) = self.check_sums(self.schedule.lr_at(self.place.step))?;
        let batches = self.place.batch.max(1) as f32;
        let result = evaluate_together(
            &self.ranks,
            &self.optimizer.averaged(self.model.valid()),
            &self.images.test,
            self.config.train.eval_batch_size,
            self.device,
        )?;
        self.check_device()?;
        let mut worst_classes = result.confusion.scores(self.images.class_names());
        worst_classes.truncate(WORST_CLASSES);
        let record = EvalRecord {
            step: self.place.step,
            epoch,
            top1: result.tally.top1_percent(),
            top5: result.tally.top5_percent(),
            loss: result.tally.mean_loss(),
            images: result.tally.images,
            train_ce_loss: ce_sum / batches,
            train_aux_loss: aux_sum / batches,
            layers: result.loads.loads(),
            worst_classes,
        };
        self.progress.eval(&record);
        self.metrics.append(&Record::Eval(record.clone()))?;
        self.place.last_eval = Some(record);
        Ok(())
    }

    fn save(&mut self, is_best: bool) -> Result<()> {
        let snapshot = self.snapshot()?;
        let keep = self.config.checkpoint.keep_last;
        self.ranks.save(&self.run, &snapshot, keep, is_best)
    }

    /// The run as it stands, on the host; an error rather than weights that are no numbers.
    fn snapshot(&mut self) -> Result<Snapshot> {
        let lr = self.schedule.lr_at(self.place.step);
        let (ce_sum, aux_sum) = self.check_sums(lr)?;
        let model =
            read_params(&self.model).map_err(TrainError::device("while the model was read"))?;
        for tensor in model.values() {
            if let Some(bad) = tensor.values.iter().find(|value| !value.is_finite()) {
                self.check_finite(*bad, lr)?;
            }
        }
        let optimizer = self.optimizer.state()?;
        self.check_device()?;
        let state = RunState {
            name: self.facts.name.clone(),
            step: self.place.step,
            epoch: self.place.epoch,
            batch: self.place.batch,
            ce_sum_bits: ce_sum.to_bits(),
            aux_sum_bits: aux_sum.to_bits(),
            best_top1: self.place.best_top1,
            loss_scale: self.place.loss_scale,
            metrics_bytes: self.metrics.sync()?,
            backend: self.backend,
            seed: self.config.train.seed,
            config: self.config.to_toml(),
            class_names: self.images.class_names().to_vec(),
            plan: self.ranks.chosen_plan(),
        };
        Ok(Snapshot {
            state,
            model,
            optimizer,
        })
    }
}
