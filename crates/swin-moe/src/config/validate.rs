//! Raw settings to checked ones, and back.

use std::fmt::Display;
use std::ops::RangeInclusive;
use std::path::PathBuf;

use super::error::ConfigError;
use super::raw::{RawCheckpoint, RawConfig, RawData, RawModel, RawMoe, RawParallel, RawTrain};
use super::types::{
    AuxLoss, CheckpointConfig, Config, DataConfig, DataSource, Engine, Mode, ModelConfig,
    MoeSettings, ParallelConfig, TrainConfig,
};

pub(super) type Result<T> = std::result::Result<T, ConfigError>;

/// Stages beyond this would shrink any allowed image to nothing.
const MAX_STAGES: usize = 8;
/// 64 GiB of f32 weights, an order of magnitude above the largest published model.
const MAX_PARAMETERS: u128 = 1 << 34;
/// Beyond this, announcements between all pairs of ranks cost more than the work.
const MAX_RANKS: usize = 1024;
/// Pixels of all channels of a batch: 8 GiB of f32.
const MAX_BATCH_VALUES: u128 = 1 << 31;

impl RawConfig {
    /// Checks every value, alone and against the others.
    ///
    /// # Errors
    /// [`ConfigError::Value`] for the first value out of its range.
    pub fn validate(&self) -> Result<Config> {
        let model = self.model.validate()?;
        let moe = self.moe.validate(&model)?;
        check_parameters(&model, &moe)?;
        let train = self.train.validate(&model)?;
        Ok(Config {
            init: self.init.validate()?,
            augment: self.augment.validate(&model)?,
            data: self.data.validate()?,
            checkpoint: self.checkpoint.validate()?,
            parallel: self.parallel.validate()?,
            model,
            moe,
            train,
        })
    }
}

pub(super) fn within<T: PartialOrd + Display + Copy>(
    key: &str,
    value: T,
    range: RangeInclusive<T>,
    remedy: &str,
) -> Result<T> {
    // `contains` is false for NaN, and the ranges' ends are finite.
    if range.contains(&value) {
        return Ok(value);
    }
    let allowed = format!("{}..={}", range.start(), range.end());
    Err(ConfigError::value(key, value, allowed, remedy))
}

pub(super) fn probability(key: &str, value: f64, remedy: &str) -> Result<f64> {
    if (0.0..1.0).contains(&value) {
        return Ok(value);
    }
    Err(ConfigError::value(key, value, "0 <= value < 1", remedy))
}

fn positive(key: &str, value: f64, max: f64, remedy: &str) -> Result<f64> {
    if value > 0.0 && value <= max {
        return Ok(value);
    }
    let allowed = format!("0 < value <= {max}");
    Err(ConfigError::value(key, value, allowed, remedy))
}

fn one_per_stage(key: &str, len: usize, stages: usize) -> Result<()> {
    if len == stages {
        return Ok(());
    }
    Err(ConfigError::value(
        key,
        format!("{len} entries long"),
        format!("{stages}, one for each entry of model.depths"),
        "make the lists equally long",
    ))
}

/// 0 in a file stands for "none".
fn non_zero(value: usize) -> Option<usize> {
    (value > 0).then_some(value)
}

impl RawModel {
    fn validate(&self) -> Result<ModelConfig> {
        let sizes = "the published models have 192 pixels, patches of 4 and windows of 12";
        within("model.image_size", self.image_size, 1..=4096, sizes)?;
        within("model.patch_size", self.patch_size, 1..=4096, sizes)?;
        within("model.window_size", self.window_size, 1..=256, sizes)?;
        if self.in_chans != 1 && self.in_chans != 3 {
            return Err(ConfigError::value(
                "model.in_chans",
                self.in_chans,
                "1 or 3",
                "images are read as grey (1) or RGB (3)",
            ));
        }
        let classes = "give the number of classes, or 0 to take it from the data";
        within("model.num_classes", self.num_classes, 0..=1 << 20, classes)?;
        let width = "the published models have 96 and 128";
        within("model.embed_dim", self.embed_dim, 1..=8192, width)?;
        positive(
            "model.mlp_ratio",
            self.mlp_ratio,
            64.0,
            "the published models have 4.0",
        )?;
        let drop = "give the probability that the last block is skipped, such as 0.2";
        probability("model.drop_path_rate", self.drop_path_rate, drop)?;
        if !self.image_size.is_multiple_of(self.patch_size) {
            return Err(ConfigError::value(
                "model.image_size",
                self.image_size,
                format!("a multiple of model.patch_size ({})", self.patch_size),
                "change the one or the other",
            ));
        }
        let pretrained = self.check_stages()?;
        Ok(ModelConfig {
            image_size: self.image_size,
            patch_size: self.patch_size,
            in_chans: self.in_chans,
            num_classes: non_zero(self.num_classes),
            embed_dim: self.embed_dim,
            depths: self.depths.clone(),
            num_heads: self.num_heads.clone(),
            window_size: self.window_size,
            mlp_ratio: self.mlp_ratio,
            patch_norm: self.patch_norm,
            drop_path_rate: self.drop_path_rate,
            pretrained_window_sizes: pretrained,
        })
    }

    /// Checks the lists; returns the pretrained windows, one for each stage.
    fn check_stages(&self) -> Result<Vec<usize>> {
        let stages = self.depths.len();
        if !(1..=MAX_STAGES).contains(&stages) {
            return Err(ConfigError::value(
                "model.depths",
                format!("{stages} entries long"),
                format!("1..={MAX_STAGES}"),
                "list the number of blocks of each stage",
            ));
        }
        one_per_stage("model.num_heads", self.num_heads.len(), stages)?;
        let key = "model.pretrained_window_sizes";
        let pretrained = match self.pretrained_window_sizes.as_slice() {
            [] => vec![0; stages],
            sizes => sizes.to_vec(),
        };
        one_per_stage(key, pretrained.len(), stages)?;
        for (stage, &window) in pretrained.iter().enumerate() {
            let key = format!("{key}[{stage}]");
            within(&key, window, 0..=256, "0 is the stage's own window")?;
            if window == 1 {
                return Err(ConfigError::value(
                    &key,
                    window,
                    "0 (the stage's own window), or 2 and more",
                    "distances are divided by this size less one",
                ));
            }
        }
        (0..stages).try_for_each(|stage| self.check_stage(stage))?;
        Ok(pretrained)
    }

    fn check_stage(&self, stage: usize) -> Result<()> {
        let depth_key = format!("model.depths[{stage}]");
        within(
            &depth_key,
            self.depths[stage],
            1..=256,
            "a stage has blocks",
        )?;
        let heads_key = format!("model.num_heads[{stage}]");
        let heads = self.num_heads[stage];
        let dim = self.embed_dim << stage;
        within(&heads_key, heads, 1..=dim, "heads share the channels")?;
        if !dim.is_multiple_of(heads) {
            return Err(ConfigError::value(
                &heads_key,
                heads,
                format!("a divisor of the stage's {dim} channels (model.embed_dim · 2^{stage})"),
                "change model.num_heads or model.embed_dim",
            ));
        }
        if ((dim as f64 * self.mlp_ratio) as usize) == 0 {
            return Err(ConfigError::value(
                "model.mlp_ratio",
                self.mlp_ratio,
                format!("at least 1/{dim}"),
                "an MLP needs a hidden column",
            ));
        }
        self.check_grid(stage)
    }

    /// Each stage but the last halves the grid of tokens, and windows tile it.
    fn check_grid(&self, stage: usize) -> Result<()> {
        let patches = self.image_size / self.patch_size;
        let last = self.depths.len() - 1;
        if !patches.is_multiple_of(1 << last) {
            return Err(ConfigError::value(
                "model.image_size",
                self.image_size,
                format!(
                    "a multiple of {} (model.patch_size · 2^{last})",
                    self.patch_size << last
                ),
                "each of the stages but the last halves the grid of tokens",
            ));
        }
        let grid = patches >> stage;
        if grid > self.window_size && !grid.is_multiple_of(self.window_size) {
            return Err(ConfigError::value(
                "model.window_size",
                self.window_size,
                format!("a divisor of stage {stage}'s {grid} tokens a side, or at least {grid}"),
                "change model.window_size or model.image_size",
            ));
        }
        Ok(())
    }
}

impl RawMoe {
    fn validate(&self, model: &ModelConfig) -> Result<MoeSettings> {
        let blocks = self.check_blocks(&model.depths)?;
        let experts = "the published models have 8, 16 or 32 experts";
        within("moe.num_experts", self.num_experts, 1..=4096, experts)?;
        if !(1..=self.num_experts).contains(&self.top_k) {
            return Err(ConfigError::value(
                "moe.top_k",
                self.top_k,
                format!("1..={} (moe.num_experts)", self.num_experts),
                "lower moe.top_k or raise moe.num_experts",
            ));
        }
        let cosine = "the published routers have 256 and 0.5";
        within(
            "moe.cosine_router_dim",
            self.cosine_router_dim,
            1..=65536,
            cosine,
        )?;
        within(
            "moe.cosine_router_init_t",
            self.cosine_router_init_t,
            0.01..=100.0,
            cosine,
        )?;
        within(
            "moe.gate_noise",
            self.gate_noise,
            0.0..=100.0,
            "the published models have 1.0",
        )?;
        let weight = "weights are small beside the cross entropy's 1, such as 0.01";
        within(
            "moe.aux_loss_weight",
            self.aux_loss_weight,
            0.0..=100.0,
            weight,
        )?;
        within("moe.z_loss_weight", self.z_loss_weight, 0.0..=100.0, weight)?;
        let drop = "give the probability that a hidden value is zeroed, such as 0.1";
        probability("moe.dropout", self.dropout, drop)?;
        let std = "the published models have 0.005 and 0.02";
        positive("moe.init_std", self.init_std, 10.0, std)?;
        let shared = "give a hidden width, or 0 for no shared expert";
        within("moe.shared_d_ff", self.shared_d_ff, 0..=1 << 20, shared)?;
        if blocks.iter().any(|blocks| !blocks.is_empty()) {
            self.check_aux_loss()?;
        }
        Ok(MoeSettings {
            blocks,
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
            shared_d_ff: non_zero(self.shared_d_ff),
        })
    }

    fn check_blocks(&self, depths: &[usize]) -> Result<Vec<Vec<usize>>> {
        if self.blocks.is_empty() {
            return Ok(vec![vec![]; depths.len()]);
        }
        one_per_stage("moe.blocks", self.blocks.len(), depths.len())?;
        self.blocks
            .iter()
            .zip(depths)
            .enumerate()
            .map(|(stage, (blocks, &depth))| check_stage_blocks(stage, blocks, depth))
            .collect()
    }

    /// The load loss is an expectation over the noise, and both of its parts are variances.
    fn check_aux_loss(&self) -> Result<()> {
        if self.aux_loss != AuxLoss::LoadImportance || self.aux_loss_weight == 0.0 {
            return Ok(());
        }
        let remedy = "or set moe.aux_loss = \"gshard\" or moe.aux_loss_weight = 0";
        if self.gate_noise == 0.0 {
            return Err(ConfigError::value(
                "moe.gate_noise",
                self.gate_noise,
                "above 0 with moe.aux_loss = \"load_importance\"",
                format!("set moe.gate_noise = 1.0, {remedy}"),
            ));
        }
        if self.num_experts < 2 {
            return Err(ConfigError::value(
                "moe.num_experts",
                self.num_experts,
                "2 or more with moe.aux_loss = \"load_importance\"",
                format!("raise moe.num_experts, {remedy}"),
            ));
        }
        Ok(())
    }
}

fn check_stage_blocks(stage: usize, blocks: &[i64], depth: usize) -> Result<Vec<usize>> {
    if blocks == [-1] {
        return Ok(vec![]);
    }
    let key = format!("moe.blocks[{stage}]");
    let mut checked = Vec::with_capacity(blocks.len());
    for &block in blocks {
        match usize::try_from(block) {
            Ok(index) if index < depth => checked.push(index),
            _ => {
                let allowed = format!("0..={} (the stage's blocks), or [-1] for none", depth - 1);
                let remedy = "list the indices of blocks whose MLP is a Mixture of Experts";
                return Err(ConfigError::value(&key, block, allowed, remedy));
            }
        }
    }
    checked.sort_unstable();
    if let Some(pair) = checked.windows(2).find(|pair| pair[0] == pair[1]) {
        let got = format!("listing {} twice", pair[0]);
        return Err(ConfigError::value(
            &key,
            got,
            "each index once",
            "remove one of the two",
        ));
    }
    Ok(checked)
}

/// Bounds the weights that the settings ask for, before anything is allocated.
fn check_parameters(model: &ModelConfig, moe: &MoeSettings) -> Result<()> {
    let mut total = 0u128;
    for (stage, &depth) in model.depths.iter().enumerate() {
        let dim = (model.embed_dim as u128) << stage;
        let hidden = (dim as f64 * model.mlp_ratio) as u128;
        let num_moe = moe.blocks[stage].len() as u128;
        let fc1 = moe.activation.hidden_width(1) as u128;
        let expert = (fc1 + 1) * dim * hidden;
        let shared = (fc1 + 1) * dim * moe.shared_d_ff.unwrap_or(0) as u128;
        total += (depth as u128) * 4 * dim * dim;
        total += (depth as u128 - num_moe) * 2 * dim * hidden;
        total += num_moe * (moe.num_experts as u128 * expert + shared);
    }
    let classes = model.num_classes.unwrap_or(0) as u128;
    total += ((model.embed_dim as u128) << (model.depths.len() - 1)) * classes;
    if total <= MAX_PARAMETERS {
        return Ok(());
    }
    Err(ConfigError::value(
        "model.embed_dim",
        format!("{} and the model {total} weights in all", model.embed_dim),
        format!("at most {MAX_PARAMETERS} weights"),
        "lower model.embed_dim, model.depths, model.mlp_ratio or moe.num_experts",
    ))
}

impl RawTrain {
    fn validate(&self, model: &ModelConfig) -> Result<TrainConfig> {
        within(
            "train.epochs",
            self.epochs,
            1..=1_000_000,
            "train for at least one epoch",
        )?;
        let warmup = "the warm-up is a part of the epochs (train.epochs)";
        within(
            "train.warmup_epochs",
            self.warmup_epochs,
            0..=self.epochs,
            warmup,
        )?;
        check_batch("train.batch_size", self.batch_size, model)?;
        check_batch("train.eval_batch_size", self.eval_batch_size, model)?;
        let parts = "each part of a step has an image at least (train.batch_size)";
        within(
            "train.accumulation_steps",
            self.accumulation_steps,
            1..=self.batch_size,
            parts,
        )?;
        let decay = "0.999 and 0.9999 are usual; 0 for no average";
        probability("train.ema_decay", self.ema_decay, decay)?;
        self.check_rates()?;
        within(
            "train.weight_decay",
            self.weight_decay,
            0.0..=10.0,
            "0.05 and 0.1 are usual",
        )?;
        let clip = "give the largest norm, such as 5.0, or 0 not to clip";
        within("train.clip_grad", self.clip_grad, 0.0..=1e6, clip)?;
        for (index, &beta) in self.betas.iter().enumerate() {
            let key = format!("train.betas[{index}]");
            probability(&key, beta, "the usual ones are [0.9, 0.999]")?;
        }
        positive("train.eps", self.eps, 1.0, "1e-8 is usual")?;
        let smoothing = "give the share that is spread over all classes, such as 0.1";
        probability("train.label_smoothing", self.label_smoothing, smoothing)?;
        let every = "give a number of steps or epochs, 1 or more";
        within("train.log_every", self.log_every, 1..=1_000_000_000, every)?;
        within(
            "train.eval_every_epochs",
            self.eval_every_epochs,
            1..=1_000_000,
            every,
        )?;
        let seed = "TOML's integers have 63 bits";
        within("train.seed", self.seed, 0..=i64::MAX as u64, seed)?;
        Ok(TrainConfig {
            epochs: self.epochs,
            batch_size: self.batch_size,
            accumulation_steps: self.accumulation_steps,
            activation_checkpointing: self.activation_checkpointing,
            ema_decay: self.ema_decay,
            lr: self.lr,
            warmup_lr: self.warmup_lr,
            min_lr: self.min_lr,
            warmup_epochs: self.warmup_epochs,
            lr_scale_batch: non_zero(self.lr_scale_batch),
            weight_decay: self.weight_decay,
            clip_grad: (self.clip_grad > 0.0).then_some(self.clip_grad),
            betas: self.betas,
            eps: self.eps,
            label_smoothing: self.label_smoothing,
            seed: self.seed,
            precision: self.precision,
            log_every: self.log_every,
            eval_every_epochs: self.eval_every_epochs,
            eval_batch_size: self.eval_batch_size,
        })
    }

    fn check_rates(&self) -> Result<()> {
        let rate = "0.001 is a usual start for small models";
        positive("train.lr", self.lr, 10.0, rate)?;
        let ends = "it is where the rate starts or ends, at most train.lr";
        within("train.warmup_lr", self.warmup_lr, 0.0..=self.lr, ends)?;
        within("train.min_lr", self.min_lr, 0.0..=self.lr, ends)?;
        let scale = "give the batch size that the rates are meant for, or 0 not to scale";
        within(
            "train.lr_scale_batch",
            self.lr_scale_batch,
            0..=1 << 24,
            scale,
        )?;
        Ok(())
    }
}

fn check_batch(key: &str, batch: usize, model: &ModelConfig) -> Result<()> {
    within(
        key,
        batch,
        1..=1 << 16,
        "give a number of images, such as 64",
    )?;
    let values = batch as u128 * (model.in_chans * model.image_size * model.image_size) as u128;
    if values <= MAX_BATCH_VALUES {
        return Ok(());
    }
    Err(ConfigError::value(
        key,
        format!("{batch}, which is {values} pixel values"),
        format!("at most {MAX_BATCH_VALUES} pixel values"),
        format!("lower {key} or model.image_size"),
    ))
}

impl RawData {
    fn validate(&self) -> Result<DataConfig> {
        let workers = "give a number of threads, or 0 for one for each core";
        within("data.workers", self.workers, 0..=1024, workers)?;
        let bytes = "TOML's integers have 63 bits";
        within(
            "data.cache_bytes",
            self.cache_bytes,
            0..=i64::MAX as u64,
            bytes,
        )?;
        let corrupt = "give the number of unreadable images to put up with";
        within("data.max_corrupt", self.max_corrupt, 0..=1 << 30, corrupt)?;
        Ok(DataConfig {
            source: if self.dir.is_empty() {
                DataSource::Digits
            } else {
                DataSource::Folder(PathBuf::from(&self.dir))
            },
            workers: non_zero(self.workers),
            max_corrupt: self.max_corrupt,
            cache_bytes: self.cache_bytes,
        })
    }
}

impl RawCheckpoint {
    fn validate(&self) -> Result<CheckpointConfig> {
        let every = "give a number of steps, or 0 to save at the end of each epoch only";
        within(
            "checkpoint.every_steps",
            self.every_steps,
            0..=1_000_000_000,
            every,
        )?;
        let keep = "resuming needs the last checkpoint";
        within("checkpoint.keep_last", self.keep_last, 1..=1_000_000, keep)?;
        Ok(CheckpointConfig {
            every_steps: non_zero(self.every_steps),
            keep_last: self.keep_last,
        })
    }
}

impl RawParallel {
    fn validate(&self) -> Result<ParallelConfig> {
        let ranks = "give the number of devices, or of threads that share a processor";
        within("parallel.ranks", self.ranks, 1..=MAX_RANKS, ranks)?;
        let key = "parallel.split";
        let started_by_mpi = self.engine == Engine::Mpi && self.ranks == 1;
        if !self.split.is_empty() && !started_by_mpi && self.split.len() != self.ranks {
            return Err(ConfigError::value(
                key,
                format!("{} numbers long", self.split.len()),
                format!("{}, one for each of parallel.ranks", self.ranks),
                "give one weight for each rank, or none for equal shares",
            ));
        }
        for (rank, &weight) in self.split.iter().enumerate() {
            let key = format!("{key}[{rank}]");
            within(&key, weight, 0.0..=1e6, "5, 2 and 1, say; 0 is no share")?;
        }
        if !self.split.is_empty() && self.split.iter().sum::<f64>() <= 0.0 {
            return Err(ConfigError::value(
                key,
                "all zero",
                "at least one weight above 0",
                "somebody has to do the work",
            ));
        }
        if !self.split.is_empty() && self.mode == Mode::Auto {
            return Err(ConfigError::value(
                key,
                format!("{:?} with parallel.mode = \"auto\"", self.split),
                "none, as this mode chooses shares itself",
                "leave the split out, or choose the mode data or model",
            ));
        }
        within(
            "parallel.rebalance_threshold",
            self.rebalance_threshold,
            0.0..=100.0,
            "0.2, say: a fifth slower",
        )?;
        Ok(ParallelConfig {
            ranks: self.ranks,
            engine: self.engine,
            mode: self.mode,
            split: (!self.split.is_empty()).then(|| self.split.clone()),
            rebalance: self.rebalance,
            rebalance_threshold: self.rebalance_threshold,
        })
    }
}
