//! The published model's constructor arguments, as JSON.

use std::path::Path;

use hexa_moe::{BalanceConfig, RouterConfig};
use serde::Deserialize;

use super::error::WeightsError;
use crate::model::{ModelError, MoeSettings, SwinMoeConfig};

/// The published constructor's arguments, by its names, with its defaults.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[allow(missing_docs)] // The names are theirs; `to_model` says what they become.
pub struct PublishedConfig {
    pub img_size: usize,
    pub patch_size: usize,
    pub in_chans: usize,
    pub num_classes: usize,
    pub embed_dim: usize,
    pub depths: Vec<usize>,
    pub num_heads: Vec<usize>,
    pub window_size: usize,
    pub mlp_ratio: f64,
    pub drop_path_rate: f64,
    pub patch_norm: bool,
    pub mlp_fc2_bias: bool,
    pub init_std: f64,
    pub pretrained_window_sizes: Vec<usize>,
    pub moe_blocks: Vec<Vec<i64>>,
    pub num_local_experts: usize,
    pub top_value: usize,
    pub capacity_factor: f64,
    pub cosine_router: bool,
    pub normalize_gate: bool,
    pub use_bpr: bool,
    pub is_gshard_loss: bool,
    pub gate_noise: f64,
    pub cosine_router_dim: usize,
    pub cosine_router_init_t: f64,
    pub moe_drop: f64,
    pub aux_loss_weight: f64,
    /// Not an argument of the model: the size of the batch that goes with the file.
    pub batch: usize,
}

impl Default for PublishedConfig {
    fn default() -> Self {
        Self {
            img_size: 224,
            patch_size: 4,
            in_chans: 3,
            num_classes: 1000,
            embed_dim: 96,
            depths: vec![2, 2, 6, 2],
            num_heads: vec![3, 6, 12, 24],
            window_size: 7,
            mlp_ratio: 4.0,
            drop_path_rate: 0.1,
            patch_norm: true,
            mlp_fc2_bias: true,
            init_std: 0.02,
            pretrained_window_sizes: vec![0; 4],
            moe_blocks: vec![vec![-1]; 4],
            num_local_experts: 1,
            top_value: 1,
            capacity_factor: 1.25,
            cosine_router: false,
            normalize_gate: false,
            use_bpr: true,
            is_gshard_loss: true,
            gate_noise: 1.0,
            cosine_router_dim: 256,
            cosine_router_init_t: 0.5,
            moe_drop: 0.0,
            aux_loss_weight: 0.01,
            batch: 1,
        }
    }
}

impl PublishedConfig {
    /// Reads a JSON file.
    ///
    /// # Errors
    /// [`WeightsError`] if the file cannot be read or has unknown or ill-typed arguments.
    pub fn read(path: &Path) -> Result<Self, WeightsError> {
        let text = std::fs::read_to_string(path).map_err(WeightsError::io(path))?;
        serde_json::from_str(&text).map_err(|e| WeightsError::Format {
            path: path.to_path_buf(),
            reason: e.to_string(),
            remedy: "give the constructor arguments of the published model as a JSON object",
        })
    }

    /// The configuration of the same model here.
    ///
    /// Capacity has no counterpart: no token is ever dropped. A block index of −1 means none.
    ///
    /// # Errors
    /// [`ModelError::Config`] if the arguments describe no model.
    pub fn to_model(&self) -> Result<SwinMoeConfig, ModelError> {
        let config = SwinMoeConfig {
            image_size: self.img_size,
            patch_size: self.patch_size,
            in_chans: self.in_chans,
            num_classes: self.num_classes,
            embed_dim: self.embed_dim,
            depths: self.depths.clone(),
            num_heads: self.num_heads.clone(),
            window_size: self.window_size,
            mlp_ratio: self.mlp_ratio,
            patch_norm: self.patch_norm,
            fc2_bias: self.mlp_fc2_bias,
            init_std: self.init_std,
            pretrained_window_sizes: self.pretrained_window_sizes.clone(),
            drop_path: self.drop_path_rate,
            moe_blocks: self
                .moe_blocks
                .iter()
                .map(|blocks| {
                    blocks
                        .iter()
                        .filter_map(|&b| usize::try_from(b).ok())
                        .collect()
                })
                .collect(),
            moe: self.moe_settings(),
            precision: Default::default(),
        };
        config.validate()?;
        Ok(config)
    }

    fn moe_settings(&self) -> MoeSettings {
        MoeSettings {
            num_experts: self.num_local_experts,
            top_k: self.top_value,
            router: if self.cosine_router {
                RouterConfig::Cosine {
                    dim: self.cosine_router_dim,
                    init_temperature: self.cosine_router_init_t,
                }
            } else {
                RouterConfig::Linear
            },
            gate_noise: self.gate_noise,
            normalize_gate: self.normalize_gate,
            dropout: self.moe_drop,
            balance: if self.is_gshard_loss {
                BalanceConfig::gshard(self.aux_loss_weight)
            } else {
                BalanceConfig::load_importance(self.aux_loss_weight)
            },
            ..MoeSettings::default()
        }
    }
}
