//! From the run's settings to the model's.

use hexa_moe::{BalanceConfig, RouterConfig};

use crate::config::{AuxLoss, Config, RouterKind};
use crate::model::{ModelError, MoeSettings, SwinMoeConfig};

/// The model that a run's settings describe, for data of `num_classes` classes.
///
/// # Errors
/// [`ModelError`] if the settings do not fit together.
pub fn model_config(config: &Config, num_classes: usize) -> Result<SwinMoeConfig, ModelError> {
    let (model, moe) = (&config.model, &config.moe);
    let balance = match moe.aux_loss {
        AuxLoss::Gshard => BalanceConfig::gshard(moe.aux_loss_weight),
        AuxLoss::LoadImportance => BalanceConfig::load_importance(moe.aux_loss_weight),
    };
    let router = match moe.router {
        RouterKind::Linear => RouterConfig::Linear,
        RouterKind::Cosine => RouterConfig::Cosine {
            dim: moe.cosine_router_dim,
            init_temperature: moe.cosine_router_init_t,
        },
    };
    let settings = SwinMoeConfig {
        image_size: model.image_size,
        patch_size: model.patch_size,
        in_chans: model.in_chans,
        num_classes: model.num_classes.unwrap_or(num_classes),
        embed_dim: model.embed_dim,
        depths: model.depths.clone(),
        num_heads: model.num_heads.clone(),
        window_size: model.window_size,
        mlp_ratio: model.mlp_ratio,
        patch_norm: model.patch_norm,
        fc2_bias: moe.fc2_bias,
        init_std: moe.init_std,
        pretrained_window_sizes: model.pretrained_window_sizes.clone(),
        drop_path: model.drop_path_rate,
        moe_blocks: moe.blocks.clone(),
        moe: MoeSettings {
            num_experts: moe.num_experts,
            top_k: moe.top_k,
            router,
            gate_noise: moe.gate_noise,
            normalize_gate: moe.normalize_gate,
            activation: moe.activation,
            dropout: moe.dropout,
            balance: balance.with_z_loss(moe.z_loss_weight),
            shared_d_ff: moe.shared_d_ff.unwrap_or(0),
            favor: moe.favor,
        },
        precision: config.train.precision.matmul(),
    };
    settings.validate()?;
    Ok(settings)
}
