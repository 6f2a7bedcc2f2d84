//! What calibration and planning know of a model: shapes and sizes.

use core::fmt;

use hexa_ops::{Activation, MatmulPrecision};
use serde::{Deserialize, Serialize};

use crate::config::MoeConfig;

/// The experts of one layer, as far as time depends on them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FfnShape {
    /// Width of a token.
    pub d_model: usize,
    /// Hidden width of an expert, all ranks' slices together.
    pub d_ff: usize,
    /// Number of experts.
    pub num_experts: usize,
    /// Choices per token.
    pub top_k: usize,
    /// The activation.
    pub activation: Activation,
    /// Whether the experts have biases.
    pub bias: bool,
    /// Arithmetic of their products.
    pub precision: MatmulPrecision,
}

impl FfnShape {
    /// The experts of a layer's configuration.
    pub fn of(config: &MoeConfig) -> Self {
        Self {
            d_model: config.d_model,
            d_ff: config.d_ff,
            num_experts: config.num_experts,
            top_k: config.top_k,
            activation: config.activation,
            bias: config.bias,
            precision: config.precision,
        }
    }

    /// A layer with these experts, of `units` hidden units.
    pub(super) fn layer(&self, units: usize) -> MoeConfig {
        MoeConfig::new(self.d_model, units, self.num_experts)
            .with_top_k(self.top_k)
            .with_activation(self.activation)
            .with_bias(self.bias)
            .with_precision(self.precision)
    }

    /// Parameters of `units` hidden units of all experts, of which ranks hold slices.
    pub fn params(&self, units: usize) -> u64 {
        let columns = self.activation.hidden_width(units) * (self.d_model + usize::from(self.bias));
        (self.num_experts * (columns + units * self.d_model)) as u64
    }

    /// Floating-point operations of forward and backward pass of `tokens` tokens through `units`
    /// hidden units: two per multiply-add, three products for each of the two layers.
    pub fn flops(&self, tokens: usize, units: usize) -> f64 {
        let columns = self.activation.hidden_width(units) + units;
        6.0 * (tokens * self.top_k) as f64 * (self.d_model * columns) as f64
    }
}

impl fmt::Display for FfnShape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "d_model {}, d_ff {}, {} experts, top-{}, {:?}, {:?}{}",
            self.d_model,
            self.d_ff,
            self.num_experts,
            self.top_k,
            self.activation,
            self.precision,
            if self.bias { "" } else { ", no biases" },
        )
    }
}

/// One Mixture-of-Experts layer of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct LayerShape {
    /// Its experts.
    pub ffn: FfnShape,
    /// Tokens that one sample brings to it.
    pub tokens_per_sample: usize,
}

/// A model and its batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Workload {
    /// The Mixture-of-Experts layers, first to last.
    pub layers: Vec<LayerShape>,
    /// Samples of a step, all ranks together.
    pub batch: usize,
    /// Trained parameters that all ranks hold: all but the experts' slices.
    pub replicated_params: u64,
    /// Bytes that a sample's forward pass keeps for the backward pass, outside of the experts.
    pub activation_bytes_per_sample: u64,
}

impl Workload {
    /// Distinct layers, in the order of their first appearance, and each layer's place among them.
    pub(super) fn kinds(&self) -> (Vec<LayerShape>, Vec<usize>) {
        let mut kinds: Vec<LayerShape> = Vec::new();
        let of_layer = self.layers.iter().map(|layer| {
            let found = kinds.iter().position(|kind| kind == layer);
            found.unwrap_or_else(|| {
                kinds.push(*layer);
                kinds.len() - 1
            })
        });
        let of_layer = of_layer.collect();
        (kinds, of_layer)
    }
}
