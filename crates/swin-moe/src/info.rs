//! Parameters, arithmetic and memory of a model, layer by layer, from its configuration alone.

use core::fmt;

use hexa_moe::RouterConfig;
use serde::Serialize;

use crate::memory::activations_per_image;
use crate::model::geometry::{BlockGeometry, StageGeometry};
use crate::model::position_bias::HIDDEN;
use crate::model::{Result, SwinMoeConfig};

/// Bytes of an f32.
const F32: u64 = 4;

/// One layer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LayerInfo {
    /// Published name of the module.
    pub name: String,
    /// Elements of its parameters.
    pub params: u64,
    /// Those that are trained.
    pub trained_params: u64,
    /// Those that one token meets: all but the experts that were not chosen for it.
    pub active_params: u64,
    /// Floating point operations of one image's forward pass: the matrix products on tokens, two
    /// per multiply-add, experts counted `top_k` times. The backward pass takes about twice that.
    pub forward_flops: u64,
    /// What one image's forward pass keeps for the backward pass, in f32 and without padding.
    pub activation_bytes: u64,
}

/// A model's layers and what training them takes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ModelInfo {
    /// First to last.
    pub layers: Vec<LayerInfo>,
    /// Images per batch that memory is stated for.
    pub batch_size: u64,
}

/// Sums over all layers, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Memory {
    /// The parameters, in f32.
    pub params_bytes: u64,
    /// Their gradients.
    pub gradients_bytes: u64,
    /// Both moments of AdamW.
    pub optimizer_bytes: u64,
    /// What the forward pass of a batch keeps, in f32 and without padding.
    pub activation_bytes: u64,
}

impl Memory {
    /// All of it.
    pub fn total_bytes(&self) -> u64 {
        let state = self.params_bytes + self.gradients_bytes + self.optimizer_bytes;
        state.saturating_add(self.activation_bytes)
    }
}

impl ModelInfo {
    /// Describes the model of a configuration, trained with batches of `batch_size` images.
    ///
    /// # Errors
    /// If the configuration is not valid.
    pub fn new(config: &SwinMoeConfig, batch_size: usize) -> Result<Self> {
        let geometry = config.geometry()?;
        let mut layers = vec![patch_embed(config, geometry.patches)];
        for (s, stage) in geometry.stages.iter().enumerate() {
            for (b, block) in stage.blocks.iter().enumerate() {
                let name = format!("layers.{s}.blocks.{b}");
                layers.push(attention(&name, block));
                layers.push(if block.is_moe {
                    moe(&name, config, block)
                } else {
                    dense_mlp(&name, config, block)
                });
            }
            if stage.merges {
                layers.push(downsample(s, stage));
            }
        }
        layers.push(head(config));
        for (layer, kept) in layers.iter_mut().zip(activations_per_image(config)?) {
            layer.activation_bytes = kept;
        }
        Ok(Self {
            layers,
            batch_size: batch_size as u64,
        })
    }

    /// Elements of all parameters.
    pub fn params(&self) -> u64 {
        self.sum(|layer| layer.params)
    }

    /// Elements of the parameters that one token meets.
    pub fn active_params(&self) -> u64 {
        self.sum(|layer| layer.active_params)
    }

    /// Floating point operations of one image's forward pass.
    pub fn forward_flops(&self) -> u64 {
        self.sum(|layer| layer.forward_flops)
    }

    /// What training takes.
    pub fn memory(&self) -> Memory {
        let trained = self.sum(|layer| layer.trained_params);
        Memory {
            params_bytes: self.params() * F32,
            gradients_bytes: trained * F32,
            optimizer_bytes: 2 * trained * F32,
            activation_bytes: self
                .sum(|layer| layer.activation_bytes)
                .saturating_mul(self.batch_size),
        }
    }

    fn sum(&self, field: impl Fn(&LayerInfo) -> u64) -> u64 {
        // Settings bound each layer to less than 2^62, but not their sum.
        self.layers.iter().map(field).fold(0, u64::saturating_add)
    }
}

/// Elements of a linear layer.
fn linear(d_in: u64, d_out: u64, bias: bool) -> u64 {
    d_in * d_out + if bias { d_out } else { 0 }
}

/// Elements of a layer norm.
fn norm(channels: u64) -> u64 {
    2 * channels
}

/// A layer that every token passes through and all of whose parameters are trained.
fn plain(name: String, params: u64, forward_flops: u64) -> LayerInfo {
    LayerInfo {
        name,
        params,
        trained_params: params,
        active_params: params,
        forward_flops,
        activation_bytes: 0,
    }
}

fn patch_embed(config: &SwinMoeConfig, patches: usize) -> LayerInfo {
    let tokens = (patches * patches) as u64;
    let pixels = (config.in_chans * config.patch_size * config.patch_size) as u64;
    let dim = config.embed_dim as u64;
    let norm_params = match config.patch_norm {
        true => norm(dim),
        false => 0,
    };
    plain(
        "patch_embed".into(),
        linear(pixels, dim, true) + norm_params,
        2 * tokens * pixels * dim,
    )
}

/// `norm1` and `attn`.
fn attention(block_name: &str, block: &BlockGeometry) -> LayerInfo {
    let layout = block.layout;
    let tokens = (layout.grid * layout.grid) as u64;
    let n = layout.window_tokens() as u64;
    let (dim, heads, hidden) = (block.dim as u64, block.num_heads as u64, HIDDEN as u64);
    let position_bias = linear(2, hidden, true) + linear(hidden, heads, false);
    plain(
        format!("{block_name}.attn"),
        norm(dim) + linear(dim, 3 * dim, true) + linear(dim, dim, true) + position_bias,
        2 * tokens * dim * (4 * dim + 2 * n),
    )
}

/// `norm2` and a dense `mlp`.
fn dense_mlp(block_name: &str, config: &SwinMoeConfig, block: &BlockGeometry) -> LayerInfo {
    let tokens = (block.layout.grid * block.layout.grid) as u64;
    let (dim, hidden) = (block.dim as u64, block.hidden as u64);
    plain(
        format!("{block_name}.mlp"),
        norm(dim) + linear(dim, hidden, true) + linear(hidden, dim, config.fc2_bias),
        4 * tokens * dim * hidden,
    )
}

/// `norm2` and a Mixture-of-Experts `mlp`.
fn moe(block_name: &str, config: &SwinMoeConfig, block: &BlockGeometry) -> LayerInfo {
    let moe = &config.moe;
    let tokens = (block.layout.grid * block.layout.grid) as u64;
    let (dim, hidden) = (block.dim as u64, block.hidden as u64);
    let (experts, top_k) = (moe.num_experts as u64, moe.top_k as u64);
    let shared = moe.shared_d_ff as u64;

    let (router_params, router_flops) = match moe.router {
        RouterConfig::Linear => (linear(dim, experts, false), 2 * tokens * dim * experts),
        RouterConfig::Cosine { dim: width, .. } => {
            let width = width as u64;
            (
                linear(dim, width, true) + width * experts + 1,
                2 * tokens * (dim * width + width * experts),
            )
        }
    };
    let ffn = |hidden: u64| {
        let width = moe.activation.hidden_width(hidden as usize) as u64;
        let params = linear(dim, width, true) + linear(hidden, dim, true);
        let flops = 2 * tokens * dim * (width + hidden);
        (params, flops)
    };
    let (expert_params, expert_flops) = ffn(hidden);
    let (shared_params, shared_flops) = match shared {
        0 => (0, 0),
        width => ffn(width),
    };

    let always = norm(dim) + router_params + shared_params;
    let params = always + experts * expert_params;
    let frozen = match (config.fc2_bias, shared) {
        (true, _) => 0,
        (false, 0) => experts * dim,
        (false, _) => (experts + 1) * dim,
    };
    LayerInfo {
        name: format!("{block_name}.mlp (experts)"),
        params,
        trained_params: params - frozen,
        active_params: always + top_k * expert_params,
        forward_flops: router_flops + top_k * expert_flops + shared_flops,
        activation_bytes: 0,
    }
}

fn downsample(index: usize, stage: &StageGeometry) -> LayerInfo {
    let dim = stage.dim as u64;
    let tokens = (stage.grid * stage.grid / 4) as u64;
    plain(
        format!("layers.{index}.downsample"),
        norm(4 * dim) + linear(4 * dim, 2 * dim, false),
        2 * tokens * 4 * dim * 2 * dim,
    )
}

/// The last norm and the classifier.
fn head(config: &SwinMoeConfig) -> LayerInfo {
    let last = config.depths.len() - 1;
    let dim = config.stage_dim(last) as u64;
    let classes = config.num_classes as u64;
    plain(
        "norm, head".into(),
        norm(dim) + linear(dim, classes, true),
        2 * dim * classes,
    )
}

/// A count with its decimal prefix.
fn decimal(value: u64) -> String {
    scaled(value, 1000.0, ["", " k", " M", " G", " T"])
}

/// Bytes with their binary prefix.
pub(crate) fn binary(bytes: u64) -> String {
    scaled(bytes, 1024.0, [" B", " KiB", " MiB", " GiB", " TiB"])
}

fn scaled(value: u64, base: f64, units: [&str; 5]) -> String {
    let mut scaled = value as f64;
    let mut unit = 0;
    while scaled >= base && unit + 1 < units.len() {
        scaled /= base;
        unit += 1;
    }
    if unit == 0 {
        format!("{value}{}", units[0])
    } else {
        format!("{scaled:.2}{}", units[unit])
    }
}

impl fmt::Display for ModelInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let row = |f: &mut fmt::Formatter<'_>, cells: [&str; 5]| {
            let [name, params, active, flops, kept] = cells;
            writeln!(
                f,
                "{name:<34} {params:>11} {active:>11} {flops:>11} {kept:>12}"
            )
        };
        row(
            f,
            [
                "layer",
                "parameters",
                "per token",
                "FLOP/image",
                "kept/image",
            ],
        )?;
        for layer in &self.layers {
            row(
                f,
                [
                    &layer.name,
                    &decimal(layer.params),
                    &decimal(layer.active_params),
                    &decimal(layer.forward_flops),
                    &binary(layer.activation_bytes),
                ],
            )?;
        }
        row(
            f,
            [
                "total",
                &decimal(self.params()),
                &decimal(self.active_params()),
                &decimal(self.forward_flops()),
                &binary(self.sum(|layer| layer.activation_bytes)),
            ],
        )?;
        Ok(())
    }
}
