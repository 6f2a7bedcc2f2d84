//! The settings of image preparation, checked.

use std::fmt;

use super::error::ConfigError;
use super::raw::RawAugment;
use super::types::{AugmentConfig, MixConfig, ModelConfig, RandAugmentConfig};
use super::validate::{Result, within};

impl RawAugment {
    pub(super) fn validate(&self, model: &ModelConfig) -> Result<AugmentConfig> {
        let padding = "4 is usual for 32 pixels; 0 does not crop; at most model.image_size";
        let range = 0..=model.image_size;
        within(
            "augment.random_crop_padding",
            self.random_crop_padding,
            range,
            padding,
        )?;
        if self.random_resized_crop && self.random_crop_padding > 0 {
            return Err(ConfigError::value(
                "augment.random_crop_padding",
                self.random_crop_padding,
                "0 with augment.random_resized_crop",
                "choose one of the two crops",
            ));
        }
        check_interval("augment.crop_scale", self.crop_scale, 1e-3, 1.0)?;
        check_interval("augment.crop_ratio", self.crop_ratio, 1e-2, 1e2)?;
        let chance = "give a probability";
        within(
            "augment.random_erasing",
            self.random_erasing,
            0.0..=1.0,
            chance,
        )?;
        let jitter = "0.4 is usual; 0 for none";
        within("augment.color_jitter", self.color_jitter, 0.0..=1.0, jitter)?;
        Ok(AugmentConfig {
            rand_augment: parse_rand_augment(&self.rand_augment)?,
            color_jitter: self.color_jitter,
            random_erasing: self.random_erasing,
            mix: self.mix()?,
            random_crop_padding: self.random_crop_padding,
            random_crop_fill: self.random_crop_fill,
            flip: self.flip,
            random_resized_crop: self.random_resized_crop,
            crop_scale: self.crop_scale,
            crop_ratio: self.crop_ratio,
            mean: per_channel("augment.mean", &self.mean, model.in_chans, 0.0)?,
            std: per_channel("augment.std", &self.std, model.in_chans, 1e-6)?,
        })
    }

    fn mix(&self) -> Result<MixConfig> {
        let chance = "give a probability";
        Ok(MixConfig {
            mixup: check_alpha("augment.mixup", self.mixup)?,
            cutmix: check_alpha("augment.cutmix", self.cutmix)?,
            probability: within(
                "augment.mix_probability",
                self.mix_probability,
                0.0..=1.0,
                chance,
            )?,
            switch_probability: within(
                "augment.mix_switch_probability",
                self.mix_switch_probability,
                0.0..=1.0,
                chance,
            )?,
        })
    }
}

/// Below the range, no share but 0 and 1 would be drawn.
fn check_alpha(key: &str, alpha: f64) -> Result<f64> {
    let remedy = "the published recipe has 0.8 for mixup and 1.0 for CutMix; 0 for none";
    if alpha == 0.0 {
        return Ok(alpha);
    }
    within(key, alpha, 0.01..=100.0, remedy)
}

/// Reads timm's words for RandAugment.
fn parse_rand_augment(text: &str) -> Result<Option<RandAugmentConfig>> {
    const KEY: &str = "augment.rand_augment";
    const REMEDY: &str = "the published recipe has \"rand-m9-mstd0.5-inc1\"; empty for none";
    if text.is_empty() {
        return Ok(None);
    }
    let refuse = |part: &str| {
        let allowed = "rand, m, n, p, mstd and inc1, joined by \"-\"";
        ConfigError::value(KEY, format!("{text:?} with {part:?}"), allowed, REMEDY)
    };
    let mut config = RandAugmentConfig {
        magnitude: 10.0,
        std: 0.0,
        layers: 2,
        probability: 0.5,
    };
    let mut parts = text.split('-');
    match parts.next() {
        Some("rand") => {}
        other => return Err(refuse(other.unwrap_or_default())),
    }
    let mut increasing = false;
    for part in parts {
        let letters = part
            .find(|c: char| c.is_ascii_digit())
            .unwrap_or(part.len());
        let (name, number) = part.split_at(letters);
        let number: f64 = number.parse().map_err(|_| refuse(part))?;
        let part_key = format!("{KEY}'s {name}");
        match name {
            "m" => config.magnitude = within(&part_key, number, 0.0..=10.0, REMEDY)?,
            "mstd" => config.std = within(&part_key, number, 0.0..=10.0, REMEDY)?,
            "p" => config.probability = within(&part_key, number, 0.0..=1.0, REMEDY)?,
            "n" if number.fract() == 0.0 => {
                config.layers = within(&part_key, number, 0.0..=16.0, REMEDY)? as usize;
            }
            "inc" if number == 1.0 => increasing = true,
            _ => return Err(refuse(part)),
        }
    }
    if !increasing {
        return Err(refuse("no inc1"));
    }
    Ok(Some(config))
}

impl fmt::Display for RandAugmentConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            magnitude,
            std,
            layers,
            probability,
        } = self;
        write!(
            f,
            "rand-m{magnitude}-n{layers}-p{probability}-mstd{std}-inc1"
        )
    }
}

impl AugmentConfig {
    /// What training images go through, in words, in order.
    pub fn summary(&self) -> String {
        let mut parts = Vec::new();
        if self.random_resized_crop {
            parts.push("random resized crop".to_owned());
        } else if self.random_crop_padding > 0 {
            parts.push(format!(
                "random crop of {} pixels",
                self.random_crop_padding
            ));
        }
        if self.flip {
            parts.push("flip".to_owned());
        }
        match (&self.rand_augment, self.color_jitter > 0.0) {
            (Some(config), true) => parts.push(format!(
                "RandAugment {config} (colour jitter is left out beside it)"
            )),
            (Some(config), false) => parts.push(format!("RandAugment {config}")),
            (None, true) => parts.push(format!("colour jitter {}", self.color_jitter)),
            (None, false) => {}
        }
        if self.random_erasing > 0.0 {
            parts.push(format!("random erasing {}", self.random_erasing));
        }
        for (name, alpha) in [("mixup", self.mix.mixup), ("CutMix", self.mix.cutmix)] {
            if alpha > 0.0 && self.mix.probability > 0.0 {
                parts.push(format!("{name} {alpha}"));
            }
        }
        if parts.is_empty() {
            parts.push("none".to_owned());
        }
        parts.join(", ")
    }
}

fn check_interval(key: &str, ends: [f64; 2], min: f64, max: f64) -> Result<()> {
    let [low, high] = ends;
    if min <= low && low <= high && high <= max {
        return Ok(());
    }
    Err(ConfigError::value(
        key,
        format!("[{low}, {high}]"),
        format!("two numbers in {min}..={max}, the smaller first"),
        "the usual ones are [0.08, 1.0] for the scale and [0.75, 1.3333] for the ratio",
    ))
}

/// One number for each channel; a single one is repeated.
fn per_channel(key: &str, values: &[f64], in_chans: usize, min: f64) -> Result<Vec<f64>> {
    if values.len() != 1 && values.len() != in_chans {
        return Err(ConfigError::value(
            key,
            format!("{} numbers long", values.len()),
            format!("1, or {in_chans} (model.in_chans)"),
            "give one number for all channels, or one for each",
        ));
    }
    for &value in values {
        within(key, value, min..=1.0, "pixels are scaled to 0..=1 first")?;
    }
    Ok(values.iter().copied().cycle().take(in_chans).collect())
}
