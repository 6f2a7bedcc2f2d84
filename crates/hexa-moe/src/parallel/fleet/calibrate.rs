//! Measuring ranks and links on the model's own shapes.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use burn::tensor::{DType, Distribution, Int, Tensor};
use hexa_ops::backend::{FfnInputs, FfnWeights};
use hexa_ops::{ExpertIndex, ExpertOps, OpsError, TrainingBackend};

use super::super::comm::Communicator;
use super::super::context::{ExpertParallel, Mode, ParallelContext};
use super::super::finish::BackwardEnd;
use super::super::shard::ExpertShards;
use super::super::split::split_proportional;
use super::error::{FleetError, Result};
use super::file::{FLEET_VERSION, FfnCost, Fleet, LinkCost, Links, RankProfile, StepCost};
use super::fit::non_negative;
use super::probe::{LinkProbe, LinkSeconds, timed};
use super::shape::{FfnShape, LayerShape, Workload};
use super::shares::width_multiple;
use crate::error::MoeError;

/// What is measured, and who measures.
#[derive(Debug, Clone)]
pub struct Calibration<'a> {
    /// The model and its batch.
    pub workload: &'a Workload,
    /// Whole batches at which the experts are measured, ascending; a range that covers what will
    /// be planned.
    pub batches: Vec<usize>,
    /// Seconds for each measurement, after a warm-up.
    pub seconds: f64,
    /// The rank's name.
    pub name: String,
    /// Its back-end.
    pub backend: String,
    /// Bytes that it may use, if known.
    pub memory_bytes: Option<u64>,
    /// The communicator's engine.
    pub engine: String,
}

impl Calibration<'_> {
    fn validate(&self) -> Result<()> {
        let refuse = |field: &str, got, allowed| {
            Err(FleetError::Value {
                origin: "calibration".into(),
                field: field.into(),
                got,
                allowed,
            })
        };
        if self.batches.is_empty() || self.batches.contains(&0) {
            let allowed = "one batch or more, each of one sample or more";
            return refuse("batches", format!("{:?}", self.batches), allowed);
        }
        if !(0.0..=3600.0).contains(&self.seconds) {
            return refuse("seconds", self.seconds.to_string(), "0 to 3600");
        }
        Ok(())
    }
}

/// A whole model on one rank, to be measured. Its experts are narrow, so that what is measured is
/// nearly all the rest: a difference of two long times would be noise.
pub trait MeasuredStep {
    /// Hidden units of its experts.
    fn expert_units(&self) -> usize;

    /// Forward and backward pass of this many samples; gives the time until the device was done.
    /// What `backward` waits for beyond that is no part of it: see [`BackwardEnd`].
    ///
    /// # Errors
    /// In words.
    fn forward_backward(&mut self, samples: usize) -> core::result::Result<Duration, String>;

    /// The optimizer's update; gives the number of parameters that it updates, and the time until
    /// the device was done.
    ///
    /// # Errors
    /// In words.
    fn update(&mut self) -> core::result::Result<(u64, Duration), String>;
}

/// Measures all ranks and the links between them; all ranks call it together, and all return the
/// same fleet. Ranks compute at the same time, so that what they share counts.
///
/// # Errors
/// [`FleetError`] if the calibration's settings are out of range, or a device, a rank or `step`
/// failed.
pub fn calibrate<B: TrainingBackend>(
    context: &ParallelContext,
    device: &B::Device,
    calibration: &Calibration,
    step: &mut impl MeasuredStep,
) -> Result<Fleet> {
    calibration.validate()?;
    let workload = calibration.workload;
    let mut ffn: Vec<FfnCost> = Vec::new();
    for layer in &workload.layers {
        if ffn.iter().any(|cost| cost.shape == layer.ffn) {
            continue;
        }
        let tokens: Vec<usize> = (calibration.batches.iter())
            .map(|samples| samples * layer.tokens_per_sample)
            .collect();
        ffn.push(ffn_cost::<B>(
            context,
            device,
            calibration,
            &layer.ffn,
            &tokens,
        )?);
    }
    let rank = RankProfile {
        name: calibration.name.clone(),
        backend: calibration.backend.clone(),
        memory_bytes: calibration.memory_bytes,
        step: step_cost(context, calibration, &ffn, step)?,
        ffn,
    };
    let links = links::<B::InnerBackend>(context, device, calibration)?;
    Ok(Fleet {
        version: FLEET_VERSION,
        engine: calibration.engine.clone(),
        replicated_params: workload.replicated_params,
        links,
        ranks: exchange_profiles(context.comm(), &rank)?,
    })
}

/// Mean seconds that `work` says it took, begun by all ranks together and repeated for the same time
/// by all.
///
/// The mean, because a rank may have its cores for some of the time only, in slices that are longer
/// than the work.
fn measure(
    context: &ParallelContext,
    seconds: f64,
    mut work: impl FnMut() -> Result<Duration>,
) -> Result<f64> {
    work()?;
    context
        .comm()
        .barrier("calibration")
        .map_err(MoeError::from)?;
    let budget = Duration::from_secs_f64(seconds);
    let begin = Instant::now();
    let mut took = Duration::ZERO;
    let mut repetitions = 0;
    while repetitions < 3 || begin.elapsed() < budget {
        took += work()?;
        repetitions += 1;
    }
    Ok(took.as_secs_f64() / f64::from(repetitions))
}

/// Layers that are measured one behind the other: alone, a layer finds its memory warm.
const MAX_DEPTH: usize = 2;

/// Measures forward and backward pass of the real layers' experts, on parts of the tokens and of
/// the hidden width, and fits the cost of one.
fn ffn_cost<B: TrainingBackend>(
    context: &ParallelContext,
    device: &B::Device,
    calibration: &Calibration,
    shape: &FfnShape,
    tokens: &[usize],
) -> Result<FfnCost> {
    let same = |layer: &&LayerShape| layer.ffn == *shape;
    let depth = calibration
        .workload
        .layers
        .iter()
        .filter(same)
        .count()
        .clamp(1, MAX_DEPTH);
    let multiple = width_multiple(shape.d_ff, context.world_size());
    let part = |parts: usize| (shape.d_ff / parts / multiple * multiple).max(1);
    let widths: BTreeSet<usize> = [part(4), part(2), shape.d_ff].into();
    let mut points = Vec::new();
    for &units in &widths {
        let layers = (0..depth).map(|_| shape.layer(units).init::<B>(device));
        let layers = layers.collect::<crate::error::Result<Vec<_>>>()?;
        for &tokens in tokens {
            let x = Tensor::<B, 2>::random([tokens, shape.d_model], Distribution::Default, device);
            let gating = layers[0].router.route(x.clone())?.gating;
            let (x, gates) = (
                x.require_grad(),
                gating.weights.clone().detach().require_grad(),
            );
            let end = BackwardEnd::default();
            let seconds = measure(context, calibration.seconds, || {
                let start = Instant::now();
                let mut y = end.mark(x.clone())?;
                for layer in &layers {
                    let index = ExpertIndex::from_gating(&gating);
                    y = layer.experts.forward(y, gates.clone(), &index)?;
                }
                drop(y.sum().backward());
                synchronise::<B>(device)?;
                Ok(end.since(start))
            })?;
            points.push((tokens, units, seconds / depth as f64));
        }
    }
    // Every time is above zero, so that something is determined.
    FfnCost::fit(*shape, &points).ok_or_else(|| FleetError::Step("no time was measured".into()))
}

fn synchronise<B: TrainingBackend>(device: &B::Device) -> Result<()> {
    B::sync(device).map_err(|error| {
        let reason = format!("{error:?}");
        MoeError::Ops(OpsError::Device {
            tensor: "calibration",
            reason,
        })
        .into()
    })
}

/// Measures whole steps on this rank alone, and takes their narrow experts out.
fn step_cost(
    context: &ParallelContext,
    calibration: &Calibration,
    ffn: &[FfnCost],
    step: &mut impl MeasuredStep,
) -> Result<StepCost> {
    let workload = calibration.workload;
    let ranks = context.world_size();
    // About what a rank gets of the batches.
    let samples: BTreeSet<usize> = (calibration.batches.iter())
        .map(|batch| batch.div_ceil(ranks))
        .collect();
    let mut points = Vec::new();
    for samples in samples {
        let whole = measure(context, calibration.seconds, || {
            step.forward_backward(samples).map_err(FleetError::Step)
        })?;
        let experts: f64 = (workload.layers.iter())
            .filter_map(|layer| {
                let cost = ffn.iter().find(|cost| cost.shape == layer.ffn)?;
                Some(cost.seconds(samples * layer.tokens_per_sample, step.expert_units()))
            })
            .sum();
        // Times must stay above zero.
        let rest = (whole - experts).max(1e-3 * whole);
        points.push(([1.0, samples as f64], rest));
    }
    let [fixed_s, sample_s] = non_negative(&points).unwrap_or_default();
    let mut params = 0;
    let update = measure(context, calibration.seconds, || {
        let took;
        (params, took) = step.update().map_err(FleetError::Step)?;
        Ok(took)
    })?;
    Ok(StepCost {
        fixed_s,
        sample_s,
        parameter_s: if params > 0 {
            update / params as f64
        } else {
            0.0
        },
    })
}

/// Measures the exchanges of every layer's shape with all ranks taking part.
fn links<B: ExpertOps>(
    context: &ParallelContext,
    device: &B::Device,
    calibration: &Calibration,
) -> Result<Links> {
    let comm = context.comm();
    let small_s = timed(comm, || {
        comm.all_gather_u32("calibration", vec![0; 9])?;
        Ok(())
    })?;
    let (kinds, _) = calibration.workload.kinds();
    let mut weights = [Vec::new(), Vec::new()];
    let mut tokens = [Vec::new(), Vec::new()];
    for kind in &kinds {
        for &batch in &calibration.batches {
            // Weights of a part of the units, so that message sizes differ, too.
            let largest = calibration.batches.iter().max().copied().unwrap_or(1);
            let units = if batch == largest {
                kind.ffn.d_ff
            } else {
                (kind.ffn.d_ff / 4).max(1)
            };
            let all = batch * kind.tokens_per_sample;
            let seconds = probe::<B>(context, device, &kind.ffn, units, all)?;
            let weight_bytes = 4 * kind.ffn.params(units);
            let token_bytes = (4 * all * kind.ffn.d_model) as u64;
            weights[0].push((weight_bytes, seconds.gather_weights));
            weights[1].push((weight_bytes, seconds.reduce_weight_gradients));
            tokens[0].push((token_bytes, seconds.gather_tokens));
            tokens[1].push((token_bytes, seconds.reduce_tokens));
        }
    }
    let all_reduce = all_reduce(comm, calibration.workload.replicated_params)?;
    let fit = |points: &[(u64, f64)]| {
        LinkCost::fit(points).unwrap_or(LinkCost {
            latency_s: small_s,
            bytes_per_s: all_reduce.bytes_per_s,
        })
    };
    Ok(Links {
        small_s,
        gather_weights: fit(&weights[0]),
        reduce_weight_gradients: fit(&weights[1]),
        gather_tokens: fit(&tokens[0]),
        reduce_tokens: fit(&tokens[1]),
        all_reduce,
    })
}

fn probe<B: ExpertOps>(
    context: &ParallelContext,
    device: &B::Device,
    shape: &FfnShape,
    units: usize,
    tokens: usize,
) -> Result<LinkSeconds> {
    let (rank, ranks) = (context.rank(), context.world_size());
    let equal = vec![1.0; ranks];
    let shards = ExpertShards {
        num_experts: shape.num_experts,
        d_model: shape.d_model,
        columns_per_unit: shape.activation.hidden_width(1),
        has_b1: shape.bias,
        widths: split_proportional(units, &equal, 1)?,
    };
    let tokens_per_rank = split_proportional(tokens, &equal, 1)?;
    let own = shards.widths[rank];
    let columns = shards.columns(own);
    let (experts, d_model) = (shape.num_experts, shape.d_model);
    let dtype = shape.precision.operand_dtype(DType::F32);
    let float = |t: Tensor<B, 3>| t.cast(dtype).into_primitive().tensor();
    let matrix =
        |shape: [usize; 2]| -> Tensor<B, 2> { Tensor::<B, 2>::ones(shape, device).cast(dtype) };
    let place = Arc::new(Mutex::new(None));
    let inputs = FfnInputs {
        x: matrix([tokens_per_rank[rank], d_model])
            .into_primitive()
            .tensor(),
        gates: matrix([tokens_per_rank[rank], shape.top_k])
            .into_primitive()
            .tensor(),
        weights: FfnWeights {
            w1: float(Tensor::ones([experts, d_model, columns], device)),
            b1: shape
                .bias
                .then(|| matrix([experts, columns]).into_primitive().tensor()),
            w2: float(Tensor::ones([experts, own, d_model], device)),
            b2: None,
        },
        expert_ids: Tensor::<B, 2, Int>::zeros([tokens_per_rank[rank], shape.top_k], device)
            .into_primitive(),
        options: Default::default(),
        dropout_seed: None,
    };
    let executor = LinkProbe {
        parallel: ExpertParallel {
            context: context.reference(),
            mode: Mode::DataCentric,
            shards,
            layer: 0,
        },
        tokens_per_rank,
        seconds: place.clone(),
    };
    drop(B::expert_ffn_by(&executor, inputs)?);
    let seconds = place.lock().ok().and_then(|place| *place);
    seconds.ok_or_else(|| FleetError::Step("the exchange was not measured".into()))
}

/// Sums of replicated gradients: of a whole model's and of a quarter's.
fn all_reduce(comm: &dyn Communicator, params: u64) -> Result<LinkCost> {
    let mut points = Vec::new();
    for elements in [params.div_ceil(4).max(1), params.max(2)] {
        // As gradients are: in buckets of at most 4 Mi elements.
        let bucket = elements.min(4 << 20) as usize;
        let buckets = elements as f64 / bucket as f64;
        let seconds = timed(comm, || {
            comm.all_reduce("calibration", vec![1.0; bucket])?;
            Ok(())
        })?;
        points.push((4 * elements, seconds * buckets));
    }
    LinkCost::fit(&points).ok_or_else(|| FleetError::Step("no exchange was measured".into()))
}

/// Gives every rank all ranks' profiles.
fn exchange_profiles(comm: &dyn Communicator, own: &RankProfile) -> Result<Vec<RankProfile>> {
    let text = toml::to_string(own).unwrap_or_default();
    let mut words: Vec<u32> = text.bytes().map(u32::from).collect();
    let moe = MoeError::from;
    let lengths = comm
        .all_gather_u32("length of the profile", vec![words.len() as u32])
        .map_err(moe)?;
    let longest = lengths.iter().max().copied().unwrap_or(0) as usize;
    // All ranks send as many; spaces behind a TOML document change nothing.
    words.resize(longest, u32::from(b'\n'));
    let all = comm.all_gather_u32("profile", words).map_err(moe)?;
    all.chunks_exact(longest.max(1))
        .enumerate()
        .map(|(rank, words)| {
            let bytes: Vec<u8> = words.iter().map(|&word| word as u8).collect();
            toml::from_str(&String::from_utf8_lossy(&bytes)).map_err(|error| FleetError::Syntax {
                origin: format!("the profile of rank {rank}"),
                reason: error.to_string(),
            })
        })
        .collect()
}
