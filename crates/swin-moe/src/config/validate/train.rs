//! `[train]`.

use super::super::error::ConfigError;
use super::super::raw::RawTrain;
use super::super::types::{ModelConfig, TrainConfig};
use super::{Result, non_zero, positive, probability, within};

/// Pixels of all channels of a batch: 8 GiB of f32.
const MAX_BATCH_VALUES: u128 = 1 << 31;

impl RawTrain {
    pub(super) fn validate(&self, model: &ModelConfig) -> Result<TrainConfig> {
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
