//! Images per second of the model alone: no loader, synthetic images that are on the device already.

use std::time::Instant;

use burn::tensor::Tensor;
use hexa_ops::TrainingBackend;
use hexa_ops::memory;
use serde::{Deserialize, Serialize};

use super::device::{self, upload};
use super::error::{Result, TrainError};
use super::faults::DeviceFaults;
use super::finetune::frozen;
use super::loss::Targets;
use super::optimizer::{AdamW, FlatGradients};
use super::pass::{LossWeights, by_settings};
use super::probe::synthetic;
use super::setup::{adamw_config, new_model};
use crate::backend::{BackendKind, Job, check_precision, dispatch};
use crate::config::Config;
use crate::memory::{Held, check_fits};
use crate::model::SwinMoe;
use crate::settings::model_config;

/// What is timed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum ThroughputMode {
    /// Forward and backward pass and the optimizer's step.
    #[default]
    Train,
    /// The forward pass, as in evaluation.
    Eval,
}

/// What is timed, and how often.
#[derive(Debug, Clone)]
pub struct ThroughputRequest {
    /// The settings; `train.batch_size` images a step in training, `train.eval_batch_size` in
    /// evaluation.
    pub config: Config,
    /// Classes of the model, if the settings do not name them.
    pub num_classes: usize,
    /// Where to compute.
    pub backend: BackendKind,
    /// What a step is.
    pub mode: ThroughputMode,
    /// Steps before the first timed one.
    pub warmup: usize,
    /// Timed stretches of steps, one at least.
    pub windows: usize,
    /// Steps of a stretch, one at least; the device is waited for at its end.
    pub steps: usize,
    /// Whom to ask whether the device failed.
    pub faults: DeviceFaults,
}

/// What came of it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Throughput {
    /// The device.
    pub device: String,
    /// Arithmetic.
    pub precision: &'static str,
    /// Images of a step.
    pub batch_size: usize,
    /// Images per second in each stretch.
    pub images_per_s: Vec<f64>,
    /// Most bytes of tensors in a step, as the device counts them; none where it does not.
    pub peak_bytes: Option<u64>,
}

impl Throughput {
    /// Least, median and greatest images per second of the stretches; of an even number of them,
    /// the median is the mean of the two in the middle.
    pub fn spread(&self) -> [f64; 3] {
        let mut rates = self.images_per_s.clone();
        rates.sort_by(f64::total_cmp);
        let at = |index: usize| rates.get(index).copied().unwrap_or(f64::NAN);
        let last = rates.len().saturating_sub(1);
        let median = (at(last / 2) + at(last.div_ceil(2))) / 2.0;
        [at(0), median, at(last)]
    }
}

/// Times the model alone.
///
/// # Errors
/// [`TrainError`] if the settings are refused or the device fails.
pub fn throughput(request: ThroughputRequest) -> Result<Throughput> {
    if request.windows == 0 || request.steps == 0 {
        return Err(TrainError::Request(format!(
            "{} windows of {} steps time nothing; give one of each at least",
            request.windows, request.steps
        )));
    }
    dispatch(request.backend, Timing(request))?
}

struct Timing(ThroughputRequest);

impl Job for Timing {
    type Output = Result<Throughput>;

    fn run<B: TrainingBackend>(self, device: &B::Device) -> Self::Output {
        let request = self.0;
        let timed = match request.mode {
            ThroughputMode::Train => {
                let mut step = TrainingStep::<B>::new(&request, device)?;
                time::<B>(&request, device, step.images, || step.run(device))
            }
            ThroughputMode::Eval => evaluation::<B>(&request, device),
        };
        let timed = timed?;
        request.faults.check("while the model was timed")?;
        Ok(timed)
    }
}

/// Times `step`, which works on `images` images.
fn time<B: TrainingBackend>(
    request: &ThroughputRequest,
    device: &B::Device,
    images: usize,
    mut step: impl FnMut() -> Result<()>,
) -> Result<Throughput> {
    let mut done = 0;
    let mut stretch = |steps: usize| {
        let since = Instant::now();
        (0..steps).try_for_each(|_| step())?;
        done += steps as u64;
        device::check::<B>(device, done)?;
        Ok::<_, TrainError>((images * steps) as f64 / since.elapsed().as_secs_f64().max(1e-9))
    };
    stretch(request.warmup)?;
    let images_per_s = (0..request.windows)
        .map(|_| stretch(request.steps))
        .collect::<Result<_>>()?;
    // Not in what is timed: questions about memory wait for the device's thread.
    memory::watch();
    stretch(1)?;
    memory::note::<B>(device);
    let seen = memory::end_watch();
    Ok(Throughput {
        device: B::name(device),
        precision: request.config.train.precision.name(),
        batch_size: images,
        images_per_s,
        peak_bytes: seen.map(|seen| seen.most_bytes),
    })
}

/// A training step as the session does it, on images that stay on the device.
struct TrainingStep<'a, B: TrainingBackend> {
    config: &'a Config,
    model: SwinMoe<B>,
    optimizer: AdamW<B>,
    parts: Vec<(Tensor<B, 4>, Targets<B>)>,
    images: usize,
}

impl<'a, B: TrainingBackend> TrainingStep<'a, B> {
    fn new(request: &'a ThroughputRequest, device: &B::Device) -> Result<Self> {
        let config = &request.config;
        let model = new_model::<B>(config, request.num_classes, request.backend, device)?;
        let model = frozen(model, config.init.freeze);
        let images = config.train.batch_size;
        let parts = synthetic(images, model.config()).into_parts(config.train.accumulation_steps);
        Ok(TrainingStep {
            optimizer: AdamW::new(adamw_config(&config.train), &model),
            parts: parts
                .into_iter()
                .map(|part| upload::<B>(part, device))
                .collect(),
            config,
            model,
            images,
        })
    }

    fn run(&mut self, device: &B::Device) -> Result<()> {
        let mut sum: Option<FlatGradients<B::InnerBackend>> = None;
        for (images, targets) in &self.parts {
            let share = images.dims()[0] as f64 / self.images as f64;
            let weights = LossWeights {
                label_smoothing: self.config.train.label_smoothing,
                ce: share,
                aux: share,
                scale: 1.0,
            };
            let (images, targets) = (images.clone(), targets.clone());
            let pass = by_settings(self.config, &self.model, images, targets, weights, 0)?;
            let gradients = self.optimizer.gradients(&self.model, pass.gradients)?;
            sum = Some(match sum {
                Some(sum) => sum.plus(gradients),
                None => gradients,
            });
        }
        let Some(gradients) = sum else {
            return Err(TrainError::Request(
                "train.batch_size is 0; give at least one image".to_owned(),
            ));
        };
        // The whole update, by nothing: weights stay, so that long timings meet no overflow.
        let (model, _norm) = self.optimizer.step(self.model.clone(), gradients, 0.0);
        memory::note::<B>(device);
        self.model = model;
        Ok(())
    }
}

fn evaluation<B: TrainingBackend>(
    request: &ThroughputRequest,
    device: &B::Device,
) -> Result<Throughput> {
    let config = &request.config;
    check_precision::<B>(device, config.train.precision)?;
    let shape = model_config(config, request.num_classes)?;
    let batch_size = config.train.eval_batch_size;
    check_fits(&shape, Held::Parameters, batch_size)?;
    let model = shape.init::<B::InnerBackend>(device)?;
    let (images, _) = upload::<B::InnerBackend>(synthetic(batch_size, &shape), device);
    time::<B>(request, device, batch_size, || {
        model.forward(images.clone())?;
        memory::note::<B>(device);
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_in_the_middle() {
        let spread = |images_per_s: &[f64]| {
            Throughput {
                device: String::new(),
                precision: "f32",
                batch_size: 1,
                images_per_s: images_per_s.to_vec(),
                peak_bytes: None,
            }
            .spread()
        };
        assert_eq!(spread(&[3.0]), [3.0; 3]);
        assert_eq!(spread(&[9.0, 1.0, 4.0]), [1.0, 4.0, 9.0]);
        assert_eq!(spread(&[9.0, 1.0, 4.0, 5.0]), [1.0, 4.5, 9.0]);
    }
}
