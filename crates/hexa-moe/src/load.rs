//! How the experts were loaded: device tensors that cost nothing until they are read.

use burn::tensor::backend::{AutodiffBackend, Backend};
use burn::tensor::{Int, Tensor, TensorData, Transaction};
use hexa_ops::OpsError;
use serde::{Deserialize, Serialize};

use crate::balance::squared_log_sum_exp;
use crate::error::{MoeError, Result};
use crate::router::Routing;

/// Load of one forward pass, detached from the graph and still on the device.
#[derive(Debug, Clone)]
pub struct LoadStats<B: Backend> {
    /// Slots, that is (token, choice) pairs, of each expert: `[num_experts]`.
    pub tokens_per_expert: Tensor<B, 1, Int>,
    /// What the router decided about this rank's tokens, in their order; `None` without tokens.
    pub routing: Option<Routing<B>>,
    /// Rows in one tile of the expert matmul (BLK); 1 where rows are not tiled.
    pub tile_rows: usize,
    /// What follows from all ranks' tokens, of which `routing` has only this rank's; `None` on one
    /// device.
    pub global: Option<GlobalLoad>,
}

/// Load over all ranks' tokens, on the host already.
#[derive(Debug, Clone, PartialEq)]
pub struct GlobalLoad {
    /// [`LoadReport::router`].
    pub router: Option<RouterMeans>,
    /// [`LoadReport::tile_waste`].
    pub tile_waste: f64,
}

impl<B: AutodiffBackend> LoadStats<B> {
    /// The load of a forward pass that kept no graph.
    pub fn from_inner(inner: LoadStats<B::InnerBackend>) -> Self {
        LoadStats {
            tokens_per_expert: Tensor::from_inner(inner.tokens_per_expert),
            routing: inner.routing.map(Routing::from_inner),
            tile_rows: inner.tile_rows,
            global: inner.global,
        }
    }
}

/// Load of one forward pass, on the host.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LoadReport {
    /// Slots, that is (token, choice) pairs, of each expert.
    pub tokens_per_expert: Vec<u64>,
    /// Entropy of the experts' shares over that of equal shares: 1 is even, 0 is all on one. It is
    /// 1 where nothing can be uneven: with one expert, or without tokens.
    pub load_entropy: f64,
    /// The router's means over the tokens; `None` without tokens.
    pub router: Option<RouterMeans>,
    /// Rows that tiles compute for no slot, as a part of the slots: `Σ (⌈c/BLK⌉ · BLK − c) / Σ c`.
    pub tile_waste: f64,
}

/// Means over the tokens of what the router says about them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct RouterMeans {
    /// Entropy of a token's probabilities, in nats: 0 is certain, `ln num_experts` undecided.
    pub entropy_nats: f64,
    /// Gate weight of a choice; `1 / top_k` always where gate weights are normalised.
    pub gate_weight: f64,
    /// `(log Σ_e exp(logits_te))²` of the logits without noise: the z-loss before its weight.
    pub z: f64,
}

impl RouterMeans {
    /// Number of [`router_sums`].
    pub(crate) const NUM_SUMS: usize = 3;

    /// From [`router_sums`] over `tokens` tokens; `None` without tokens.
    pub(crate) fn of_sums(sums: &[f64], tokens: usize, top_k: usize) -> Option<Self> {
        let &[entropy, gates, z] = sums else {
            return None;
        };
        if tokens == 0 {
            return None;
        }
        let tokens = tokens as f64;
        Some(Self {
            entropy_nats: entropy / tokens,
            gate_weight: gates / (tokens * top_k as f64),
            z: z / tokens,
        })
    }
}

/// Sums over the tokens of entropies in nats, gate weights and squared log-sum-exps: `[3]`, f32.
pub(crate) fn router_sums<B: Backend>(routing: &Routing<B>) -> Tensor<B, 1> {
    let probs = routing.gating.probs.clone();
    // The clamp turns 0 · log 0 into 0.
    let log = probs.clone().clamp_min(f32::MIN_POSITIVE).log();
    Tensor::cat(
        vec![
            -(probs * log).sum(),
            routing.gating.weights.clone().sum(),
            squared_log_sum_exp(routing.logits.clone()).sum(),
        ],
        0,
    )
}

impl<B: Backend> LoadStats<B> {
    /// Reads the statistics. This waits for the device: call it when you print, not every step.
    ///
    /// # Errors
    /// [`MoeError::Ops`] if the device reports a failure.
    pub fn read(&self) -> Result<LoadReport> {
        let mut reports = Self::read_all(std::slice::from_ref(self))?;
        reports.pop().ok_or_else(unread)
    }

    /// Reads the statistics of several layers at once, so that the device is waited for once.
    ///
    /// # Errors
    /// As [`LoadStats::read`].
    pub fn read_all(layers: &[Self]) -> Result<Vec<LoadReport>> {
        // Burn's transactions on CubeCL panic when they have nothing to read.
        if layers.is_empty() {
            return Ok(Vec::new());
        }
        let mut transaction = Transaction::<B>::default();
        for layer in layers {
            transaction = transaction.register(layer.tokens_per_expert.clone());
            if let Some(routing) = layer.routing_to_read() {
                transaction = transaction.register(router_sums(routing));
            }
        }
        let mut data = transaction
            .try_execute()
            .map_err(|error| failed(error.to_string()))?
            .into_iter();
        layers
            .iter()
            .map(|layer| {
                let counts = data.next().ok_or_else(unread)?;
                let sums = match layer.routing_to_read() {
                    Some(_) => Some(data.next().ok_or_else(unread)?),
                    None => None,
                };
                Ok(layer.report(counts, sums))
            })
            .collect()
    }

    /// The routing that means have to be computed of: on several ranks they are there already.
    fn routing_to_read(&self) -> Option<&Routing<B>> {
        self.routing.as_ref().filter(|_| self.global.is_none())
    }

    fn report(&self, counts: TensorData, sums: Option<TensorData>) -> LoadReport {
        let tokens_per_expert: Vec<u64> = counts
            .iter::<i64>()
            .map(|count| count.max(0) as u64)
            .collect();
        let (router, tile_waste) = match &self.global {
            Some(global) => (global.router, global.tile_waste),
            None => (
                self.routing.as_ref().zip(sums).and_then(|(routing, sums)| {
                    let [tokens, top_k] = routing.gating.weights.dims();
                    RouterMeans::of_sums(&sums.iter().collect::<Vec<f64>>(), tokens, top_k)
                }),
                tile_waste(&tokens_per_expert, self.tile_rows),
            ),
        };
        LoadReport {
            load_entropy: load_entropy(&tokens_per_expert),
            router,
            tile_waste,
            tokens_per_expert,
        }
    }
}

fn failed(reason: String) -> MoeError {
    MoeError::Ops(OpsError::Device {
        tensor: "load statistics",
        reason,
    })
}

fn unread() -> MoeError {
    failed("it gave fewer tensors than it was asked for".to_owned())
}

/// Normalised entropy of the shares; see [`LoadReport::load_entropy`].
pub fn load_entropy(tokens_per_expert: &[u64]) -> f64 {
    let total: u64 = tokens_per_expert.iter().sum();
    if total == 0 || tokens_per_expert.len() < 2 {
        return 1.0;
    }
    let nats: f64 = tokens_per_expert
        .iter()
        .filter(|&&count| count > 0)
        .map(|&count| {
            let share = count as f64 / total as f64;
            -share * share.ln()
        })
        .sum();
    nats / (tokens_per_expert.len() as f64).ln()
}

/// Redundant rows over slots; see [`LoadReport::tile_waste`].
pub fn tile_waste(tokens_per_expert: &[u64], tile_rows: usize) -> f64 {
    let slots = tokens_per_expert.iter().sum::<u64>() as f64;
    excess(tiled_rows(tokens_per_expert, tile_rows) as f64, slots)
}

/// Rows that tiles compute, those of no slot included.
pub(crate) fn tiled_rows(tokens_per_expert: &[u64], tile_rows: usize) -> u64 {
    let tile = tile_rows.max(1) as u64;
    tokens_per_expert
        .iter()
        .map(|count| count.div_ceil(tile) * tile)
        .sum()
}

/// What is computed beyond what is needed, as a part of that; 0 where nothing is needed.
pub(crate) fn excess(computed: f64, needed: f64) -> f64 {
    if needed > 0.0 {
        (computed - needed) / needed
    } else {
        0.0
    }
}
