//! A few training steps on synthetic images: predicted and measured peak memory side by side.

use std::panic::{AssertUnwindSafe, catch_unwind};

use hexa_ops::TrainingBackend;
use hexa_ops::memory::{self, device_memory};
use serde::Serialize;

use super::device::{self, upload};
use super::error::{Result, TrainError};
use super::faults::DeviceFaults;
use super::loss::cross_entropy;
use super::optimizer::{AdamW, FlatGradients};
use super::pass::{self, LossWeights};
use super::setup::{adamw_config, new_model};
use super::step_memory::StepMemory;
use crate::backend::{BackendKind, Job, dispatch};
use crate::config::Config;
use crate::data::Batch;
use crate::memory::{PeakMemory, Rows, StepShape, TrainingMemory, resident};
use crate::model::{SwinMoe, SwinMoeConfig};
use crate::settings::model_config;

/// What is measured.
#[derive(Debug, Clone)]
pub struct ProbeRequest {
    /// The settings; `train.batch_size` images, in `train.accumulation_steps` parts.
    pub config: Config,
    /// Classes of the model, if the settings do not name them.
    pub num_classes: usize,
    /// Where to compute.
    pub backend: BackendKind,
    /// Training steps.
    pub steps: usize,
    /// Whom to ask whether the device failed.
    pub faults: DeviceFaults,
}

/// Predicted and measured peak of training steps.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct MemoryProbe {
    /// The back-end.
    pub backend: BackendKind,
    /// Its device.
    pub device: String,
    /// Arithmetic.
    pub precision: &'static str,
    /// Images of a step.
    pub batch_size: usize,
    /// Passes of a step.
    pub accumulation_steps: usize,
    /// Steps done.
    pub steps: usize,
    /// The predicted peak, by what takes it.
    pub predicted: PeakMemory,
    /// Its sum.
    pub predicted_bytes: u64,
    /// Most that tensors took, as the device counts it; none where it does not.
    pub measured_bytes: Option<u64>,
    /// What the runtime had taken from the device, in pages.
    pub reserved_bytes: Option<u64>,
    /// Predicted over measured, less one.
    pub relative_error: Option<f64>,
    /// What a forward pass should leave for the backward pass.
    pub predicted_kept_bytes: u64,
    /// What it left.
    pub measured_kept_bytes: Option<u64>,
    /// Most memory that this process had on the host; on the CPU, that of the tensors, too.
    pub resident_bytes: Option<u64>,
}

/// How a run's steps are shaped, for the prediction of their memory.
pub fn step_shape(config: &Config, backend: BackendKind) -> StepShape {
    let train = &config.train;
    let parts = train.accumulation_steps.max(1);
    StepShape {
        images: train.batch_size.div_ceil(parts),
        accumulates: parts > 1,
        checkpoints: train.activation_checkpointing,
        averages: train.ema_decay > 0.0,
        rows: Rows::of(backend),
    }
}

/// Trains on synthetic images and measures.
///
/// # Errors
/// [`TrainError`] if the settings are refused or the device fails.
pub fn probe_memory(request: ProbeRequest) -> Result<MemoryProbe> {
    dispatch(request.backend, ProbeJob(request))?
}

struct ProbeJob(ProbeRequest);

impl Job for ProbeJob {
    type Output = Result<MemoryProbe>;

    fn run<B: TrainingBackend>(self, device: &B::Device) -> Self::Output {
        let ProbeRequest { config, faults, .. } = &self.0;
        let model = model_config(config, self.0.num_classes)?;
        let shape = step_shape(config, self.0.backend);
        let predicted = TrainingMemory::new(&model, shape)?.peak();
        let mut memory = StepMemory::new(config, Some(predicted));
        let probed = catch_unwind(AssertUnwindSafe(|| {
            let probe = probe_on::<B>(&self.0, device)?;
            faults.check("while memory was measured")?;
            Ok(probe)
        }));
        memory.explain(probed, faults)
    }
}

/// [`probe_memory`] on a device.
///
/// # Errors
/// As there.
pub fn probe_on<B: TrainingBackend>(
    request: &ProbeRequest,
    device: &B::Device,
) -> Result<MemoryProbe> {
    let config = &request.config;
    let model = model_config(config, request.num_classes)?;
    let memory = TrainingMemory::new(&model, step_shape(config, request.backend))?;
    let mut training = new_model::<B>(config, request.num_classes, request.backend, device)?;
    let mut optimizer = AdamW::<B>::new(adamw_config(&config.train), &training);
    let mut kept = None;
    memory::watch();
    for step in 0..request.steps {
        // The first step also holds what is allocated once: small parameters before they share
        // a tensor, candidates of tuned kernels.
        if step == 1 {
            memory::watch();
        }
        training = one_step(config, training, &mut optimizer, device, &mut kept)?;
        memory::note::<B>(device);
        device::check::<B>(device, step as u64 + 1)?;
        request.faults.check("while memory was measured")?;
    }
    let seen = memory::end_watch();
    let (predicted, measured) = (memory.peak(), seen.map(|seen| seen.most_bytes));
    let predicted_bytes = predicted.total_bytes();
    Ok(MemoryProbe {
        backend: request.backend,
        device: B::name(device),
        precision: config.train.precision.name(),
        batch_size: config.train.batch_size,
        accumulation_steps: config.train.accumulation_steps,
        steps: request.steps,
        predicted,
        predicted_bytes,
        measured_bytes: measured,
        reserved_bytes: seen.map(|seen| seen.reserved_bytes),
        relative_error: measured.map(|bytes| predicted_bytes as f64 / bytes.max(1) as f64 - 1.0),
        predicted_kept_bytes: memory.kept_bytes(),
        measured_kept_bytes: kept,
        resident_bytes: resident::peak_bytes(),
    })
}

/// A step as the session does it, the old model being held until the new one is there.
fn one_step<B: TrainingBackend>(
    config: &Config,
    model: SwinMoe<B>,
    optimizer: &mut AdamW<B>,
    device: &B::Device,
    kept: &mut Option<u64>,
) -> Result<SwinMoe<B>> {
    let in_use = || device_memory::<B>(device).map(|memory| memory.in_use_bytes);
    let mut sum: Option<FlatGradients<B::InnerBackend>> = None;
    for part in synthetic(config.train.batch_size, model.config())
        .into_parts(config.train.accumulation_steps)
    {
        let before = in_use();
        let (images, targets) = upload::<B>(part, device);
        let label_smoothing = config.train.label_smoothing;
        let gradients = if config.train.activation_checkpointing {
            let weights = LossWeights {
                label_smoothing,
                ce: 1.0,
                aux: 1.0,
                scale: 1.0,
            };
            let seed = |segment| segment as u64;
            pass::by_segments(&model, images, targets, weights, seed)?.gradients
        } else {
            let output = model.forward(images)?;
            let loss = cross_entropy(output.logits, targets, label_smoothing);
            let loss = loss + output.aux_loss;
            drop(output.loads);
            *kept = in_use()
                .zip(before)
                .map(|(after, before)| after.saturating_sub(before));
            let gradients = loss.backward();
            memory::note::<B>(device);
            vec![gradients]
        };
        let gradients = optimizer.gradients(&model, gradients)?;
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
    memory::note::<B>(device);
    let (updated, _norm) = optimizer.step(model.clone(), gradients, config.train.lr);
    memory::note::<B>(device);
    Ok(updated)
}

/// A batch whose pixels and labels follow from their place.
pub(super) fn synthetic(images: usize, shape: &SwinMoeConfig) -> Batch {
    let size = shape.image_size;
    let values = images * shape.in_chans * size * size;
    Batch {
        images: (0..values)
            .map(|at| ((at.wrapping_mul(2_654_435_761) >> 7) % 1021) as f32 / 510.0 - 1.0)
            .collect(),
        labels: (0..images)
            .map(|at| (at % shape.num_classes) as u32)
            .collect(),
        partners: None,
        share: 1.0,
        indices: (0..images as u32).collect(),
        shape: [images, shape.in_chans, size, size],
        position: 0,
    }
}
