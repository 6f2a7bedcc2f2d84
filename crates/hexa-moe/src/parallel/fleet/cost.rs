//! The cost model: what a plan takes, from shapes and a fleet's measurements.
//!
//! `docs/adr/0010-cost-model.md` says what it assumes. In short: ranks meet at every
//! Mixture-of-Experts layer, so that a step is the sum over layers of the slowest rank's time, plus
//! the exchanges, none of which is hidden. In the model-centric mode they meet twice: before the
//! experts and behind them.

use super::super::context::Mode;
use super::super::plan::{LayerPlan, ParallelPlan};
use super::error::{FleetError, Result};
use super::file::{Fleet, Links};
use super::shape::{LayerShape, Workload};

/// Bytes of an f32, in which parameters are kept and data travel.
const F32: u64 = 4;

/// What a plan is expected to take.
#[derive(Debug, Clone, PartialEq)]
pub struct Prediction {
    /// The plan.
    pub plan: ParallelPlan,
    /// Seconds of a step.
    pub step_s: f64,
    /// Of these, computation of the slowest rank, from one meeting of the ranks to the next.
    pub compute_s: f64,
    /// Of these, exchanges.
    pub exchange_s: f64,
    /// Of these, the optimizer's update.
    pub update_s: f64,
    /// The Mixture-of-Experts layers, first to last.
    pub layers: Vec<LayerPrediction>,
    /// The ranks, in order.
    pub ranks: Vec<RankPrediction>,
}

/// What one layer takes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LayerPrediction {
    /// What it moves.
    pub mode: Mode,
    /// The slowest rank's forward and backward pass of the experts.
    pub ffn_s: f64,
    /// Its exchanges.
    pub exchange_s: f64,
    /// Bytes that all ranks together receive in a step.
    pub bytes_moved: u64,
}

/// What one rank takes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RankPrediction {
    /// Its own computation in a step, waiting left out.
    pub busy_s: f64,
    /// Its memory.
    pub memory: RankMemory,
}

/// Bytes of a rank's memory at their most.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RankMemory {
    /// Parameters, gradients and AdamW's two moments.
    pub state: u64,
    /// What forward passes keep for backward passes; an estimate.
    pub activations: u64,
    /// Whole weights or everybody's tokens on their way, of the largest layer.
    pub exchange: u64,
}

impl RankMemory {
    /// All of it.
    pub fn total(&self) -> u64 {
        self.state + self.activations + self.exchange
    }
}

/// Predicts what `plan` takes on `fleet`.
///
/// # Errors
/// [`FleetError`] if the fleet was measured on other shapes or has another number of ranks;
/// [`MoeError::Split`](crate::MoeError::Split) if the plan does not fit the workload.
pub fn predict(fleet: &Fleet, workload: &Workload, plan: &ParallelPlan) -> Result<Prediction> {
    check(fleet, workload)?;
    let d_ff: Vec<usize> = workload.layers.iter().map(|l| l.ffn.d_ff).collect();
    plan.validate(fleet.world_size(), &d_ff, workload.batch)?;

    let num_layers = workload.layers.len();
    let mut layers = Vec::with_capacity(num_layers);
    let mut busy = vec![0.0; fleet.world_size()];
    let mut compute_s = 0.0;
    // What lies between layers, in equal parts in front of each; all of it in one without layers.
    let parts = num_layers.max(1) as f64;
    let rest: Vec<f64> = (fleet.ranks.iter().zip(&plan.batch))
        .map(|(rank, &samples)| rank.step.seconds(samples) / parts)
        .collect();
    for (shape, layer) in workload.layers.iter().zip(&plan.layers) {
        let ffn = ffn_seconds(fleet, shape, layer, &plan.batch)?;
        compute_s += match layer.mode {
            Mode::DataCentric => slowest(ffn.iter().zip(&rest).map(|(ffn, rest)| ffn + rest)),
            // Nobody can begin with everybody's tokens before all have brought them.
            Mode::ModelCentric => slowest(rest.iter().copied()) + slowest(ffn.iter().copied()),
        };
        for ((busy, ffn), rest) in busy.iter_mut().zip(&ffn).zip(&rest) {
            *busy += ffn + rest;
        }
        layers.push(LayerPrediction {
            mode: layer.mode,
            ffn_s: slowest(ffn.into_iter()),
            exchange_s: 0.0,
            bytes_moved: 0,
        });
    }
    if num_layers == 0 {
        compute_s = slowest(rest.iter().copied());
        busy.copy_from_slice(&rest);
    }
    exchanges(fleet, workload, plan, &mut layers);
    let all_reduce = match fleet.world_size() {
        1 => 0.0,
        _ => fleet
            .links
            .all_reduce
            .seconds(F32 * workload.replicated_params),
    };
    let exchange_s = layers.iter().map(|l| l.exchange_s).sum::<f64>() + all_reduce;
    let update: Vec<f64> = (fleet.ranks.iter().enumerate())
        .map(|(rank, profile)| profile.step.parameter_s * params(workload, plan, rank) as f64)
        .collect();
    let update_s = slowest(update.iter().copied());
    let ranks = (0..fleet.world_size()).map(|rank| RankPrediction {
        busy_s: busy[rank] + update[rank],
        memory: memory(fleet, workload, plan, rank),
    });
    Ok(Prediction {
        plan: plan.clone(),
        step_s: compute_s + exchange_s + update_s,
        compute_s,
        exchange_s,
        update_s,
        layers,
        ranks: ranks.collect(),
    })
}

/// Refuses a fleet that was calibrated on another model.
pub(super) fn check(fleet: &Fleet, workload: &Workload) -> Result<()> {
    if fleet.replicated_params != workload.replicated_params {
        return Err(FleetError::Model {
            measured: fleet.replicated_params,
            wanted: workload.replicated_params,
        });
    }
    for rank in &fleet.ranks {
        for layer in &workload.layers {
            rank.ffn(&layer.ffn)?;
        }
    }
    Ok(())
}

fn slowest(seconds: impl Iterator<Item = f64>) -> f64 {
    seconds.fold(0.0, f64::max)
}

/// Each rank's forward and backward pass of a layer's experts.
fn ffn_seconds(
    fleet: &Fleet,
    shape: &LayerShape,
    layer: &LayerPlan,
    batch: &[usize],
) -> Result<Vec<f64>> {
    let all: usize = batch.iter().sum();
    let of_rank = fleet.ranks.iter().enumerate().map(|(rank, profile)| {
        let (samples, units) = match layer.mode {
            Mode::DataCentric => (batch[rank], shape.ffn.d_ff),
            Mode::ModelCentric => (all, layer.widths[rank]),
        };
        let cost = profile.ffn(&shape.ffn)?;
        Ok(cost.seconds(samples * shape.tokens_per_sample, units))
    });
    of_rank.collect()
}

/// Fills in what layers exchange.
fn exchanges(
    fleet: &Fleet,
    workload: &Workload,
    plan: &ParallelPlan,
    layers: &mut [LayerPrediction],
) {
    let others = fleet.world_size() as u64 - 1;
    if others == 0 {
        return;
    }
    // The weights of the last data-centric layer are still there when the backward pass begins.
    let last = layers.iter().rposition(|l| l.mode == Mode::DataCentric);
    for (i, (layer, shape)) in layers.iter_mut().zip(&workload.layers).enumerate() {
        let volume = Volume::of(shape, plan.batch.iter().sum());
        let gathers = if last == Some(i) { 1 } else { 2 };
        layer.exchange_s = exchange_seconds(&fleet.links, &volume, layer.mode, gathers);
        layer.bytes_moved = others
            * match layer.mode {
                Mode::DataCentric => (gathers + 1) * volume.weights,
                Mode::ModelCentric => 4 * volume.tokens + 3 * volume.gates,
            };
    }
}

/// Seconds of one layer's exchanges in a step.
pub(super) fn exchange_seconds(links: &Links, volume: &Volume, mode: Mode, gathers: u64) -> f64 {
    // Token counts and routing statistics, in both modes.
    let small = 2.0 * links.small_s;
    small
        + match mode {
            Mode::DataCentric => {
                gathers as f64 * links.gather_weights.seconds(volume.weights)
                    + links.reduce_weight_gradients.seconds(volume.weights)
            }
            // Forwards tokens, gate weights and ids, then outputs; backwards output gradients, then
            // gradients of tokens and gate weights.
            Mode::ModelCentric => {
                2.0 * (links.gather_tokens.seconds(volume.tokens)
                    + links.reduce_tokens.seconds(volume.tokens))
                    + 3.0 * links.small_s
                    + 3.0 * volume.gates as f64 / links.gather_tokens.bytes_per_s
            }
        }
}

/// Bytes of what one layer may move, once.
pub(super) struct Volume {
    /// The experts' slices, of all ranks.
    pub weights: u64,
    /// Tokens of all ranks.
    pub tokens: u64,
    /// Their gate weights, or as many ids.
    pub gates: u64,
}

impl Volume {
    pub(super) fn of(shape: &LayerShape, batch: usize) -> Self {
        let tokens = (batch * shape.tokens_per_sample) as u64;
        Self {
            weights: F32 * shape.ffn.params(shape.ffn.d_ff),
            tokens: F32 * tokens * shape.ffn.d_model as u64,
            gates: F32 * tokens * shape.ffn.top_k as u64,
        }
    }
}

/// Parameters that a rank holds.
fn params(workload: &Workload, plan: &ParallelPlan, rank: usize) -> u64 {
    let slices = workload.layers.iter().zip(&plan.layers);
    let slices = slices.map(|(shape, layer)| shape.ffn.params(layer.widths[rank]));
    workload.replicated_params + slices.sum::<u64>()
}

/// Memory of a rank. Transient tensors count where they are largest.
pub(super) fn memory(
    fleet: &Fleet,
    workload: &Workload,
    plan: &ParallelPlan,
    rank: usize,
) -> RankMemory {
    let all: usize = plan.batch.iter().sum();
    let mut activations = plan.batch[rank] as u64 * workload.activation_bytes_per_sample;
    let mut exchange = 0;
    for (shape, layer) in workload.layers.iter().zip(&plan.layers) {
        let (samples, units) = match layer.mode {
            Mode::DataCentric => (plan.batch[rank], shape.ffn.d_ff),
            Mode::ModelCentric => (all, layer.widths[rank]),
        };
        let tokens = samples * shape.tokens_per_sample;
        let columns = shape.ffn.activation.hidden_width(units);
        // The tokens, and for each choice the pre-activation, the gate weight and the id.
        let kept = tokens * (shape.ffn.d_model + shape.ffn.top_k * (columns + 2));
        activations += F32 * kept as u64;
        let volume = Volume::of(shape, all);
        let moving = match (layer.mode, fleet.world_size()) {
            (_, 1) => 0,
            // Whole weights and their whole gradients.
            (Mode::DataCentric, _) => 2 * volume.weights,
            // Partial results and gradients of everybody's tokens.
            (Mode::ModelCentric, _) => 2 * volume.tokens,
        };
        // Where the device is the host, what is sent lies there as well.
        let copies = if fleet.ranks[rank].backend == "cpu" {
            2
        } else {
            1
        };
        exchange = exchange.max(copies * moving);
    }
    RankMemory {
        state: 4 * F32 * params(workload, plan, rank),
        activations,
        exchange,
    }
}
