//! Checked settings back to raw ones, to be written beside a run.

use std::path::Path;

use super::raw::{
    RawAugment, RawCheckpoint, RawConfig, RawData, RawModel, RawMoe, RawParallel, RawTrain,
};
use super::types::{
    AugmentConfig, CheckpointConfig, Config, DataConfig, DataSource, ModelConfig, MoeSettings,
    TrainConfig,
};

impl Config {
    /// The settings as they would stand in a file, every key present.
    pub fn to_raw(&self) -> RawConfig {
        RawConfig {
            model: self.model.to_raw(),
            moe: self.moe.to_raw(),
            init: self.init.to_raw(),
            train: self.train.to_raw(),
            augment: self.augment.to_raw(),
            data: self.data.to_raw(),
            checkpoint: self.checkpoint.to_raw(),
            parallel: RawParallel {
                ranks: self.parallel.ranks,
                engine: self.parallel.engine,
                mode: self.parallel.mode,
                split: self.parallel.split.clone().unwrap_or_default(),
                rebalance: self.parallel.rebalance,
                rebalance_threshold: self.parallel.rebalance_threshold,
            },
        }
    }
}

impl ModelConfig {
    fn to_raw(&self) -> RawModel {
        RawModel {
            image_size: self.image_size,
            patch_size: self.patch_size,
            in_chans: self.in_chans,
            num_classes: self.num_classes.unwrap_or(0),
            embed_dim: self.embed_dim,
            depths: self.depths.clone(),
            num_heads: self.num_heads.clone(),
            window_size: self.window_size,
            mlp_ratio: self.mlp_ratio,
            patch_norm: self.patch_norm,
            drop_path_rate: self.drop_path_rate,
            pretrained_window_sizes: self.pretrained_window_sizes.clone(),
        }
    }
}

impl MoeSettings {
    fn to_raw(&self) -> RawMoe {
        RawMoe {
            blocks: self.blocks.iter().map(|b| raw_blocks(b)).collect(),
            num_experts: self.num_experts,
            top_k: self.top_k,
            router: self.router,
            cosine_router_dim: self.cosine_router_dim,
            cosine_router_init_t: self.cosine_router_init_t,
            gate_noise: self.gate_noise,
            normalize_gate: self.normalize_gate,
            aux_loss: self.aux_loss,
            aux_loss_weight: self.aux_loss_weight,
            z_loss_weight: self.z_loss_weight,
            dropout: self.dropout,
            activation: self.activation,
            fc2_bias: self.fc2_bias,
            init_std: self.init_std,
            shared_d_ff: self.shared_d_ff.unwrap_or(0),
            favor: self.favor,
        }
    }
}

/// The published way to say "no block" is `[-1]`.
fn raw_blocks(blocks: &[usize]) -> Vec<i64> {
    if blocks.is_empty() {
        return vec![-1];
    }
    blocks.iter().map(|&block| block as i64).collect()
}

impl TrainConfig {
    fn to_raw(&self) -> RawTrain {
        RawTrain {
            epochs: self.epochs,
            batch_size: self.batch_size,
            accumulation_steps: self.accumulation_steps,
            activation_checkpointing: self.activation_checkpointing,
            ema_decay: self.ema_decay,
            lr: self.lr,
            warmup_lr: self.warmup_lr,
            min_lr: self.min_lr,
            warmup_epochs: self.warmup_epochs,
            lr_scale_batch: self.lr_scale_batch.unwrap_or(0),
            weight_decay: self.weight_decay,
            clip_grad: self.clip_grad.unwrap_or(0.0),
            betas: self.betas,
            eps: self.eps,
            label_smoothing: self.label_smoothing,
            seed: self.seed,
            precision: self.precision,
            log_every: self.log_every,
            eval_every_epochs: self.eval_every_epochs,
            eval_batch_size: self.eval_batch_size,
        }
    }
}

impl AugmentConfig {
    fn to_raw(&self) -> RawAugment {
        RawAugment {
            random_crop_padding: self.random_crop_padding,
            random_crop_fill: self.random_crop_fill,
            flip: self.flip,
            random_resized_crop: self.random_resized_crop,
            crop_scale: self.crop_scale,
            crop_ratio: self.crop_ratio,
            rand_augment: self
                .rand_augment
                .map(|config| config.to_string())
                .unwrap_or_default(),
            color_jitter: self.color_jitter,
            random_erasing: self.random_erasing,
            mixup: self.mix.mixup,
            cutmix: self.mix.cutmix,
            mix_probability: self.mix.probability,
            mix_switch_probability: self.mix.switch_probability,
            mean: self.mean.clone(),
            std: self.std.clone(),
        }
    }
}

impl DataConfig {
    fn to_raw(&self) -> RawData {
        RawData {
            dir: match &self.source {
                DataSource::Digits => String::new(),
                DataSource::Folder(dir) => Path::display(dir).to_string(),
            },
            workers: self.workers.unwrap_or(0),
            max_corrupt: self.max_corrupt,
            cache_bytes: self.cache_bytes,
        }
    }
}

impl CheckpointConfig {
    fn to_raw(&self) -> RawCheckpoint {
        RawCheckpoint {
            every_steps: self.every_steps.unwrap_or(0),
            keep_last: self.keep_last,
        }
    }
}
