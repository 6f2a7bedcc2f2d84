//! How the experts were loaded: device tensors that cost nothing until they are read.

use burn::tensor::backend::{AutodiffBackend, Backend, ExecutionError};
use burn::tensor::{Int, Tensor, TensorData};
use hexa_ops::OpsError;
use serde::{Deserialize, Serialize};

use crate::error::{MoeError, Result};

/// Load of one forward pass, detached from the graph and still on the device.
#[derive(Debug, Clone)]
pub struct LoadStats<B: Backend> {
    /// Slots, that is (token, choice) pairs, of each expert: `[num_experts]`.
    pub tokens_per_expert: Tensor<B, 1, Int>,
    /// The router's probabilities: `[tokens, num_experts]`, f32.
    pub probs: Tensor<B, 2>,
    /// Rows in one tile of the expert matmul (BLK); 1 where rows are not tiled.
    pub tile_rows: usize,
    /// [`LoadReport::router_entropy`] over all ranks' tokens, of which `probs` has only this rank's;
    /// `None` on one device, where it follows from `probs`.
    pub router_entropy: Option<f64>,
}

impl<B: AutodiffBackend> LoadStats<B> {
    /// The load of a forward pass that kept no graph.
    pub fn from_inner(inner: LoadStats<B::InnerBackend>) -> Self {
        LoadStats {
            tokens_per_expert: Tensor::from_inner(inner.tokens_per_expert),
            probs: Tensor::from_inner(inner.probs),
            tile_rows: inner.tile_rows,
            router_entropy: inner.router_entropy,
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
    /// Mean entropy of a token's probabilities over its maximum: 1 is undecided, 0 is certain; 1
    /// with one expert, or without tokens.
    pub router_entropy: f64,
    /// Rows that tiles compute for no slot, as a part of the slots: `Σ (⌈c/BLK⌉ · BLK − c) / Σ c`.
    pub tile_waste: f64,
}

impl<B: Backend> LoadStats<B> {
    /// Reads the statistics. This waits for the device: call it when you print, not every step.
    ///
    /// # Errors
    /// [`MoeError::Ops`] if the device reports a failure.
    pub fn read(&self) -> Result<LoadReport> {
        let counts = self.tokens_per_expert.clone().try_into_data();
        let tokens_per_expert: Vec<u64> = host(counts, "tokens_per_expert")?
            .iter::<i64>()
            .map(|count| count.max(0) as u64)
            .collect();
        Ok(LoadReport {
            load_entropy: load_entropy(&tokens_per_expert),
            router_entropy: self.router_entropy()?,
            tile_waste: tile_waste(&tokens_per_expert, self.tile_rows),
            tokens_per_expert,
        })
    }

    fn router_entropy(&self) -> Result<f64> {
        if let Some(entropy) = self.router_entropy {
            return Ok(entropy);
        }
        let [tokens, num_experts] = self.probs.dims();
        if tokens == 0 || num_experts < 2 {
            return Ok(1.0);
        }
        let nats = entropy_sum(self.probs.clone());
        let nats = host(nats.try_into_data(), "router entropy")?
            .iter::<f64>()
            .sum::<f64>();
        Ok(normalised_entropy(nats, tokens, num_experts))
    }
}

/// Sum of the tokens' entropies, in nats: `[tokens, num_experts]` → `[1]`.
pub(crate) fn entropy_sum<B: Backend>(probs: Tensor<B, 2>) -> Tensor<B, 1> {
    // The clamp turns 0 · log 0 into 0.
    let log = probs.clone().clamp_min(f32::MIN_POSITIVE).log();
    -(probs * log).sum()
}

/// [`LoadReport::router_entropy`] from the sum over tokens.
pub(crate) fn normalised_entropy(nats: f64, tokens: usize, num_experts: usize) -> f64 {
    if tokens == 0 || num_experts < 2 {
        return 1.0;
    }
    nats / tokens as f64 / (num_experts as f64).ln()
}

fn host(
    data: core::result::Result<TensorData, ExecutionError>,
    tensor: &'static str,
) -> Result<TensorData> {
    data.map_err(|error| {
        MoeError::Ops(OpsError::Device {
            tensor,
            reason: error.to_string(),
        })
    })
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
    let slots: u64 = tokens_per_expert.iter().sum();
    if slots == 0 {
        return 0.0;
    }
    let tile = tile_rows.max(1) as u64;
    let computed: u64 = tokens_per_expert
        .iter()
        .map(|count| count.div_ceil(tile) * tile)
        .sum();
    (computed - slots) as f64 / slots as f64
}
