//! The model's configuration and its checks.

use hexa_moe::{Activation, BalanceConfig, Favor, MoeConfig, RouterConfig};
use hexa_ops::{ExpertOps, MatmulPrecision};
use serde::{Deserialize, Serialize};

use super::error::{ModelError, Result};
use super::extent::validate_extent;
use super::geometry::{Geometry, grid_of_stage};
use super::swin::SwinMoe;

/// What the model is made of. The defaults are those of the published constructor.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SwinMoeConfig {
    /// Height and width of the images, in pixels.
    pub image_size: usize,
    /// Height and width of a patch, in pixels.
    pub patch_size: usize,
    /// Channels of the images.
    pub in_chans: usize,
    /// Number of classes.
    pub num_classes: usize,
    /// Channels of the first stage; each further stage has twice as many.
    pub embed_dim: usize,
    /// Number of blocks of each stage.
    pub depths: Vec<usize>,
    /// Attention heads of each stage.
    pub num_heads: Vec<usize>,
    /// Height and width of an attention window, in tokens; clamped to a stage's grid.
    pub window_size: usize,
    /// Hidden width of the MLPs over their channels.
    pub mlp_ratio: f64,
    /// Whether the patch embedding ends with a layer norm.
    pub patch_norm: bool,
    /// Whether the second layer of the MLPs has a (trained) bias.
    pub fc2_bias: bool,
    /// Standard deviation of the initial weights of linear layers and experts.
    pub init_std: f64,
    /// Window of each stage that the position bias is scaled to; 0 for the stage's own.
    pub pretrained_window_sizes: Vec<usize>,
    /// Probability that a sample skips the last block's branches; rises linearly from 0 with depth.
    pub drop_path: f64,
    /// Indices of the blocks of each stage whose MLP is a Mixture-of-Experts layer.
    pub moe_blocks: Vec<Vec<usize>>,
    /// The Mixture-of-Experts layers.
    pub moe: MoeSettings,
    /// Arithmetic of the dense matrix products.
    pub precision: MatmulPrecision,
}

/// What all Mixture-of-Experts layers of a model have in common.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MoeSettings {
    /// Experts of each layer.
    pub num_experts: usize,
    /// Experts per token.
    pub top_k: usize,
    /// How tokens are scored.
    pub router: RouterConfig,
    /// Standard deviation of the noise on the router's logits, times the number of experts.
    pub gate_noise: f64,
    /// Whether a token's gate weights are divided by their sum.
    pub normalize_gate: bool,
    /// The experts' activation.
    pub activation: Activation,
    /// Dropout after the experts' activation.
    pub dropout: f64,
    /// Weights of the auxiliary losses.
    pub balance: BalanceConfig,
    /// Hidden width of the shared expert, which every token passes through besides its chosen
    /// ones; 0 for none.
    pub shared_d_ff: usize,
    /// Whether the experts' kernels choose the shortest time or the least memory where they differ.
    pub favor: Favor,
}

impl Default for SwinMoeConfig {
    fn default() -> Self {
        Self {
            image_size: 224,
            patch_size: 4,
            in_chans: 3,
            num_classes: 1000,
            embed_dim: 96,
            depths: vec![2, 2, 6, 2],
            num_heads: vec![3, 6, 12, 24],
            window_size: 7,
            mlp_ratio: 4.0,
            patch_norm: true,
            fc2_bias: true,
            init_std: 0.02,
            pretrained_window_sizes: vec![0; 4],
            drop_path: 0.1,
            moe_blocks: vec![vec![]; 4],
            moe: MoeSettings::default(),
            precision: MatmulPrecision::Strict,
        }
    }
}

impl Default for MoeSettings {
    fn default() -> Self {
        Self {
            num_experts: 8,
            top_k: 1,
            router: RouterConfig::Linear,
            gate_noise: 1.0,
            normalize_gate: false,
            activation: Activation::Gelu,
            dropout: 0.0,
            balance: BalanceConfig::default(),
            shared_d_ff: 0,
            favor: Favor::Speed,
        }
    }
}

pub(super) fn refuse<T>(
    key: impl Into<String>,
    got: impl ToString,
    allowed: impl Into<String>,
    remedy: impl Into<String>,
) -> Result<T> {
    Err(ModelError::Config {
        key: key.into(),
        got: got.to_string(),
        allowed: allowed.into(),
        remedy: remedy.into(),
    })
}

fn at_least_one(key: &str, value: usize) -> Result<()> {
    if value == 0 {
        return refuse(key, value, "at least 1", format!("set {key} to 1 or more"));
    }
    Ok(())
}

/// Sizes above this would overflow element counts long before they fit in memory.
const MAX_SIZE: usize = 1 << 20;

/// As [`MAX_SIZE`], for experts.
const MAX_EXPERTS: usize = 1 << 12;

fn at_most(key: &str, value: usize, max: usize) -> Result<()> {
    if value > max {
        return refuse(key, value, format!("at most {max}"), format!("lower {key}"));
    }
    Ok(())
}

fn probability(key: &str, value: f64) -> Result<()> {
    if (0.0..1.0).contains(&value) {
        return Ok(());
    }
    refuse(
        key,
        value,
        "0.0 <= value < 1.0",
        "give the probability of dropping",
    )
}

fn finite_non_negative(key: &str, value: f64) -> Result<()> {
    if value.is_finite() && value >= 0.0 {
        return Ok(());
    }
    refuse(
        key,
        value,
        "a finite number, 0 or more",
        format!("set {key} to 0 or more"),
    )
}

impl SwinMoeConfig {
    /// Checks everything that building or applying the model relies on.
    ///
    /// # Errors
    /// [`ModelError::Config`] for the first value that is out of range or does not fit.
    pub fn validate(&self) -> Result<()> {
        self.validate_sizes()?;
        self.validate_stages()?;
        self.validate_moe_blocks()?;
        probability("drop_path", self.drop_path)?;
        finite_non_negative("init_std", self.init_std)?;
        if self.has_moe() {
            self.moe.validate()?;
            for stage in 0..self.depths.len() {
                self.moe_layer(self.stage_dim(stage), self.hidden_dim(stage))
                    .validate()?;
            }
        }
        validate_extent(self)
    }

    /// Builds the model with initial weights drawn from the back-end's random generator.
    ///
    /// # Errors
    /// As [`SwinMoeConfig::validate`].
    pub fn init<B: ExpertOps>(&self, device: &B::Device) -> Result<SwinMoe<B>> {
        SwinMoe::new(self, device)
    }

    /// Whether any block has a Mixture-of-Experts layer.
    pub fn has_moe(&self) -> bool {
        self.moe_blocks.iter().any(|blocks| !blocks.is_empty())
    }

    /// Number of Mixture-of-Experts layers.
    pub fn num_moe_layers(&self) -> usize {
        let mut count = 0;
        for (stage, &depth) in self.depths.iter().enumerate() {
            count += (0..depth).filter(|&b| self.is_moe(stage, b)).count();
        }
        count
    }

    /// Whether this block's MLP is a Mixture-of-Experts layer.
    pub fn is_moe(&self, stage: usize, block: usize) -> bool {
        self.moe_blocks
            .get(stage)
            .is_some_and(|blocks| blocks.contains(&block))
    }

    /// Channels of a stage.
    pub fn stage_dim(&self, stage: usize) -> usize {
        self.embed_dim << stage
    }

    /// Hidden width of the MLPs of a stage.
    pub fn hidden_dim(&self, stage: usize) -> usize {
        (self.stage_dim(stage) as f64 * self.mlp_ratio) as usize
    }

    /// The Mixture-of-Experts layer of a block of `dim` channels and `hidden` columns.
    pub fn moe_layer(&self, dim: usize, hidden: usize) -> MoeConfig {
        let moe = &self.moe;
        MoeConfig::new(dim, hidden, moe.num_experts)
            .with_top_k(moe.top_k)
            .with_router(moe.router)
            .with_gate_noise(moe.gate_noise)
            .with_normalize_gate(moe.normalize_gate)
            .with_activation(moe.activation)
            .with_expert_dropout(moe.dropout)
            .with_shared_d_ff(moe.shared_d_ff)
            // The published layer always has the second bias, and freezes it if there is to be none.
            .with_train_fc2_bias(self.fc2_bias)
            .with_init_std(self.init_std)
            .with_router_init_std(self.init_std)
            .with_balance(moe.balance)
            .with_precision(self.precision)
            .with_favor(moe.favor)
    }

    /// Sizes of every stage and block.
    ///
    /// # Errors
    /// As [`SwinMoeConfig::validate`].
    pub fn geometry(&self) -> Result<Geometry> {
        self.validate()?;
        Ok(Geometry::new(self))
    }

    fn validate_sizes(&self) -> Result<()> {
        for (key, value) in [
            ("image_size", self.image_size),
            ("patch_size", self.patch_size),
            ("in_chans", self.in_chans),
            ("num_classes", self.num_classes),
            ("embed_dim", self.embed_dim),
            ("window_size", self.window_size),
        ] {
            at_least_one(key, value)?;
            at_most(key, value, MAX_SIZE)?;
        }
        if !(self.mlp_ratio.is_finite() && self.mlp_ratio > 0.0 && self.mlp_ratio <= 1024.0) {
            return refuse(
                "mlp_ratio",
                self.mlp_ratio,
                "0 < mlp_ratio <= 1024",
                "the published models have 4.0",
            );
        }
        if !self.image_size.is_multiple_of(self.patch_size) {
            return refuse(
                "image_size",
                self.image_size,
                format!("a multiple of patch_size ({})", self.patch_size),
                "change image_size or patch_size",
            );
        }
        Ok(())
    }

    fn validate_stages(&self) -> Result<()> {
        let stages = self.depths.len();
        if !(1..=8).contains(&stages) {
            return refuse(
                "depths",
                format!("{stages} stages"),
                "1 to 8 stages",
                "list the number of blocks of each stage",
            );
        }
        for (key, len) in [
            ("num_heads", self.num_heads.len()),
            (
                "pretrained_window_sizes",
                self.pretrained_window_sizes.len(),
            ),
            ("moe_blocks", self.moe_blocks.len()),
        ] {
            if len != stages {
                return refuse(
                    key,
                    format!("{len} entries"),
                    format!("{stages} entries, one for each entry of depths"),
                    format!("make {key} and depths equally long"),
                );
            }
        }
        (0..stages).try_for_each(|stage| self.validate_stage(stage))
    }

    fn validate_stage(&self, stage: usize) -> Result<()> {
        let key = |name: &str| format!("{name}[{stage}]");
        at_least_one(&key("depths"), self.depths[stage])?;
        at_most(&key("depths"), self.depths[stage], 4096)?;
        let heads = self.num_heads[stage];
        at_least_one(&key("num_heads"), heads)?;
        let dim = self.stage_dim(stage);
        if !dim.is_multiple_of(heads) {
            return refuse(
                key("num_heads"),
                heads,
                format!("a divisor of the stage's {dim} channels"),
                "change num_heads or embed_dim",
            );
        }
        if self.hidden_dim(stage) == 0 {
            return refuse(
                "mlp_ratio",
                self.mlp_ratio,
                format!("at least 1/{dim}, for one hidden column"),
                "raise mlp_ratio",
            );
        }
        at_most(
            &key("pretrained_window_sizes"),
            self.pretrained_window_sizes[stage],
            MAX_SIZE,
        )?;
        if self.pretrained_window_sizes[stage] == 1 {
            return refuse(
                key("pretrained_window_sizes"),
                1,
                "0 (the stage's own window), or 2 and more",
                "the position bias is scaled by this size minus one",
            );
        }
        self.validate_grid(stage)
    }

    fn validate_grid(&self, stage: usize) -> Result<()> {
        let patches = self.image_size / self.patch_size;
        let is_last = stage + 1 == self.depths.len();
        let Some(grid) = grid_of_stage(patches, stage) else {
            return refuse(
                "image_size",
                self.image_size,
                format!(
                    "a multiple of patch_size · 2^{} = {}",
                    self.depths.len() - 1,
                    self.patch_size << (self.depths.len() - 1)
                ),
                "change image_size, patch_size or the number of stages: each stage but the last halves the grid",
            );
        };
        if grid > self.window_size && !grid.is_multiple_of(self.window_size) {
            return refuse(
                "window_size",
                self.window_size,
                format!("a divisor of stage {stage}'s grid of {grid} tokens, or at least {grid}"),
                "change window_size, image_size or patch_size",
            );
        }
        if !is_last && !grid.is_multiple_of(2) {
            return refuse(
                "image_size",
                self.image_size,
                format!("an even grid in stage {stage}, which has {grid} tokens a side"),
                "each stage but the last halves the grid",
            );
        }
        Ok(())
    }

    fn validate_moe_blocks(&self) -> Result<()> {
        for (stage, blocks) in self.moe_blocks.iter().enumerate() {
            let depth = self.depths[stage];
            if let Some(&block) = blocks.iter().find(|&&b| b >= depth) {
                return refuse(
                    format!("moe_blocks[{stage}]"),
                    block,
                    format!("0..{depth}, the stage having {depth} blocks"),
                    "list indices of existing blocks",
                );
            }
        }
        Ok(())
    }
}

impl MoeSettings {
    /// Checks the ranges that [`MoeConfig`] does not: sizes are bounded so that they multiply
    /// without overflow.
    fn validate(&self) -> Result<()> {
        at_least_one("moe.num_experts", self.num_experts)?;
        at_most("moe.num_experts", self.num_experts, MAX_EXPERTS)?;
        at_most("moe.shared_d_ff", self.shared_d_ff, MAX_SIZE)?;
        if let RouterConfig::Cosine { dim, .. } = self.router {
            at_most("moe.router.dim", dim, MAX_SIZE)?;
        }
        Ok(())
    }
}
