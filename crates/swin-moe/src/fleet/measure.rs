//! Measuring ranks and links on a model of the run's own settings.

use std::time::{Duration, Instant};

use burn::module::{Module, Param};
use burn::tensor::backend::Backend;
use burn::tensor::{Distribution, Int, Tensor};
use hexa_moe::parallel::comm::local;
use hexa_moe::parallel::fleet::{self, Calibration, Fleet, FleetError, MeasuredStep};
use hexa_moe::parallel::{BackwardEnd, Communicator, ParallelContext};
use hexa_ops::TrainingBackend;

use super::{FleetJobError, workload};
use crate::backend::{BackendKind, Job, devices, dispatch};
use crate::memory::{Held, check_fits, machine_bytes};
use crate::model::block::FeedForward;
use crate::model::{ModelError, SwinMoe, SwinMoeConfig};
use crate::train::optimizer::{AdamW, AdamWConfig};
use crate::train::{Targets, cross_entropy};

/// What is measured.
#[derive(Debug, Clone)]
pub struct CalibrateRequest {
    /// The model.
    pub model: SwinMoeConfig,
    /// Samples of a step, all ranks together.
    pub batch: usize,
    /// The back-end of each rank.
    pub backends: Vec<BackendKind>,
    /// Bytes that each rank may use; without it, the machine's memory in equal parts for ranks on
    /// the CPU, and unknown elsewhere.
    pub memory_bytes: Option<u64>,
    /// Seconds for each measurement.
    pub seconds: f64,
}

/// Measures ranks that are threads of this process, on one device each where there are several.
///
/// # Errors
/// [`FleetJobError`] if a back-end cannot be used, or a rank fails.
pub fn calibrate(request: &CalibrateRequest) -> Result<Fleet, FleetJobError> {
    let ranks: Vec<_> = local::world(request.backends.len())
        .into_iter()
        .map(|comm| {
            let request = request.clone();
            std::thread::spawn(move || calibrate_thread(comm, &request))
        })
        .collect();
    let outcomes = ranks.into_iter().enumerate().map(|(rank, thread)| {
        let joined = thread.join();
        joined.unwrap_or(Err(FleetJobError::Panicked { rank }))
    });
    let outcomes: Vec<_> = outcomes.collect();
    // A rank that fails takes the others with it; what they say is that it is gone.
    let is_cause = |outcome: &Result<Fleet, FleetJobError>| {
        !matches!(
            outcome,
            Ok(_)
                | Err(FleetJobError::Fleet(FleetError::Moe(
                    hexa_moe::MoeError::Comm(_)
                )))
        )
    };
    let cause = outcomes.iter().position(is_cause).unwrap_or(0);
    outcomes.into_iter().nth(cause).unwrap_or_else(|| {
        Err(FleetError::Ranks {
            fleet: 0,
            wanted: 1,
        }
        .into())
    })
}

fn calibrate_thread(
    comm: impl Communicator + 'static,
    request: &CalibrateRequest,
) -> Result<Fleet, FleetJobError> {
    let rank = comm.rank();
    let backend = request.backends[rank];
    let alike = |backends: &[BackendKind]| backends.iter().filter(|&&b| b == backend).count();
    let job = ThreadJob {
        context: ParallelContext::new(comm),
        place: alike(&request.backends[..rank]),
        setting: RankSetting {
            model: &request.model,
            batch: request.batch,
            backend,
            engine: "local",
            memory_bytes: request.memory_bytes,
            ranks_here: request.backends.len(),
            seconds: request.seconds,
        },
    };
    dispatch(backend, job).map_err(|error| FleetJobError::Backend { rank, error })?
}

struct ThreadJob<'a> {
    context: ParallelContext,
    /// Among the ranks with this back-end.
    place: usize,
    setting: RankSetting<'a>,
}

impl Job for ThreadJob<'_> {
    type Output = Result<Fleet, FleetJobError>;

    fn run<B: TrainingBackend>(self, device: &B::Device) -> Self::Output {
        let devices = devices::<B>(self.setting.backend, device);
        let place = self.place % devices.len().max(1);
        let device = devices.get(place).unwrap_or(device);
        measure_rank::<B>(&self.context, device, &self.setting)
    }
}

/// What is measured on one rank of a job.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RankSetting<'a> {
    /// The model.
    pub model: &'a SwinMoeConfig,
    /// Samples of a step, all ranks together.
    pub batch: usize,
    /// The rank's back-end.
    pub backend: BackendKind,
    /// The job's engine.
    pub engine: &'a str,
    /// Bytes that the rank may use; without it, on the CPU, the machine's in equal parts.
    pub memory_bytes: Option<u64>,
    /// Ranks on this machine.
    pub ranks_here: usize,
    /// Seconds for each measurement.
    pub seconds: f64,
}

/// Measures as one rank of a job, whatever its engine; all ranks call it together and return the
/// same fleet.
///
/// # Errors
/// [`FleetJobError`] if this rank or another fails.
pub(crate) fn measure_rank<B: TrainingBackend>(
    context: &ParallelContext,
    device: &B::Device,
    setting: &RankSetting,
) -> Result<Fleet, FleetJobError> {
    let workload = &workload(setting.model, setting.batch)?;
    let on_cpu = setting.backend == BackendKind::Cpu;
    if on_cpu {
        check_fits(setting.model, Held::Parameters, 1)?;
    }
    let ranks_here = setting.ranks_here.max(1) as u64;
    let equal_part = || machine_bytes().map(|bytes| bytes / ranks_here);
    let all = setting.batch;
    let mut batches = vec![all.div_ceil(4), all.div_ceil(2), all];
    batches.dedup();
    let calibration = Calibration {
        workload,
        batches,
        seconds: setting.seconds,
        name: format!("rank{}", context.rank()),
        backend: setting.backend.name().to_owned(),
        memory_bytes: setting
            .memory_bytes
            .or_else(|| equal_part().filter(|_| on_cpu)),
        engine: setting.engine.to_owned(),
    };
    let mut step = ModelStep::<B>::new(setting.model, device)?;
    let fleet = fleet::calibrate::<B>(context, device, &calibration, &mut step)?;
    Ok(fleet)
}

/// Hidden units of the experts where all else is measured.
const NARROW: usize = 8;

/// Elements that the update is measured on.
const UPDATED: usize = 1 << 20;

/// A tensor to be updated.
#[derive(Module, Debug)]
struct Weights<B: Backend> {
    values: Param<Tensor<B, 2>>,
}

/// The model with narrow experts, and an optimizer.
struct ModelStep<B: TrainingBackend> {
    model: SwinMoe<B>,
    weights: Weights<B>,
    optimizer: AdamW<B>,
    device: B::Device,
}

impl<B: TrainingBackend> ModelStep<B> {
    fn new(config: &SwinMoeConfig, device: &B::Device) -> Result<Self, ModelError> {
        let mut model = config.init::<B>(device)?;
        for block in model.layers.iter_mut().flat_map(|stage| &mut stage.blocks) {
            if let FeedForward::Moe(moe) = &block.mlp {
                let layer = config.moe_layer(moe.d_model, NARROW);
                block.mlp = FeedForward::Moe(layer.init(device).map_err(ModelError::from)?);
            }
        }
        let weights = Weights {
            values: Param::from_tensor(Tensor::ones([1024, UPDATED / 1024], device)),
        };
        let config = AdamWConfig {
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            weight_decay: 0.1,
            clip_grad_norm: 3.0,
            ema_decay: 0.0,
        };
        Ok(Self {
            optimizer: AdamW::new(config, &weights),
            model,
            weights,
            device: device.clone(),
        })
    }

    fn synchronise(&self) -> Result<(), String> {
        B::sync(&self.device).map_err(|error| format!("{error:?}"))
    }
}

impl<B: TrainingBackend> MeasuredStep for ModelStep<B> {
    fn expert_units(&self) -> usize {
        NARROW
    }

    fn forward_backward(&mut self, samples: usize) -> Result<Duration, String> {
        let (start, end) = (Instant::now(), BackwardEnd::default());
        let config = self.model.config();
        let shape = [
            samples,
            config.in_chans,
            config.image_size,
            config.image_size,
        ];
        let images = Tensor::random(shape, Distribution::Normal(0.0, 1.0), &self.device);
        let targets = Targets {
            labels: Tensor::<B, 1, Int>::zeros([samples], &self.device),
            mixed: None,
        };
        let text = |error: ModelError| error.to_string();
        let tokens = self.model.embed(images).map_err(text)?;
        let tokens = end.mark(tokens).map_err(|e| e.to_string())?;
        let features = self.model.features_of(tokens, samples).map_err(text)?;
        let logits = self.model.classify(features.features).map_err(text)?;
        let loss = cross_entropy(logits, targets, 0.1) + features.aux_loss;
        drop(loss.backward());
        self.synchronise()?;
        Ok(end.since(start))
    }

    fn update(&mut self) -> Result<(u64, Duration), String> {
        let gradients = self.weights.values.val().sum().backward();
        self.synchronise()?;
        let start = Instant::now();
        let gradients = self.optimizer.gradients(&self.weights, vec![gradients]);
        let gradients = gradients.map_err(|e| e.to_string())?;
        self.weights = self.optimizer.step(self.weights.clone(), gradients, 1e-3).0;
        self.synchronise()?;
        Ok((UPDATED as u64, start.elapsed()))
    }
}
