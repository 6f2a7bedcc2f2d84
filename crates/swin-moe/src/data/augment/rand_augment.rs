//! RandAugment (arXiv:1909.13719) in timm's form, with operations that grow stronger with the
//! magnitude.

use rand::{Rng, RngExt};
use rand_distr::{Distribution, Normal};

use super::ops::Op;
use crate::config::RandAugmentConfig;
use crate::data::pixels::Pixels;

/// Magnitude of the strongest operation.
const MAX_MAGNITUDE: f64 = 10.0;

/// Kinds of operations, each drawn as often as any other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    AutoContrast,
    Equalize,
    Invert,
    Rotate,
    Posterize,
    Solarize,
    SolarizeAdd,
    Color,
    Contrast,
    Brightness,
    Sharpness,
    ShearX,
    ShearY,
    TranslateX,
    TranslateY,
}

impl Kind {
    pub const ALL: [Kind; 15] = [
        Kind::AutoContrast,
        Kind::Equalize,
        Kind::Invert,
        Kind::Rotate,
        Kind::Posterize,
        Kind::Solarize,
        Kind::SolarizeAdd,
        Kind::Color,
        Kind::Contrast,
        Kind::Brightness,
        Kind::Sharpness,
        Kind::ShearX,
        Kind::ShearY,
        Kind::TranslateX,
        Kind::TranslateY,
    ];

    /// The operation of this magnitude, 0..=10; `negative` turns those around that have two sides.
    pub fn at(self, magnitude: f64, negative: bool) -> Op {
        let share = magnitude / MAX_MAGNITUDE;
        let sided = |value: f64| if negative { -value } else { value };
        let factor = || (1.0 + sided(share * 0.9)).max(0.1) as f32;
        match self {
            Kind::AutoContrast => Op::AutoContrast,
            Kind::Equalize => Op::Equalize,
            Kind::Invert => Op::Invert,
            Kind::Rotate => Op::Rotate(sided(share * 30.0)),
            Kind::Posterize => Op::Posterize(4 - (share * 4.0) as u32),
            Kind::Solarize => Op::Solarize(256 - ((share * 256.0) as u32).min(256)),
            Kind::SolarizeAdd => Op::SolarizeAdd(((share * 110.0) as u32).min(128)),
            Kind::Color => Op::Color(factor()),
            Kind::Contrast => Op::Contrast(factor()),
            Kind::Brightness => Op::Brightness(factor()),
            Kind::Sharpness => Op::Sharpness(factor()),
            Kind::ShearX => Op::ShearX(sided(share * 0.3)),
            Kind::ShearY => Op::ShearY(sided(share * 0.3)),
            Kind::TranslateX => Op::TranslateX(sided(share * 0.45)),
            Kind::TranslateY => Op::TranslateY(sided(share * 0.45)),
        }
    }
}

/// Some operations on each image, drawn with replacement, each left out with a probability.
#[derive(Debug, Clone)]
pub struct RandAugment {
    config: RandAugmentConfig,
    /// `None` if all magnitudes are the same.
    magnitudes: Option<Normal<f64>>,
    /// What comes into view from outside of the image: one byte for each channel.
    fill: Vec<u8>,
}

impl RandAugment {
    /// With the images' mean (of values in 0..=1) as what lies outside of them.
    pub fn new(config: RandAugmentConfig, mean: &[f64]) -> Self {
        Self {
            config,
            magnitudes: Normal::new(config.magnitude, config.std)
                .ok()
                .filter(|_| config.std > 0.0),
            fill: mean
                .iter()
                .map(|mean| (mean * 255.0).round_ties_even() as u8)
                .collect(),
        }
    }

    /// Applies freshly drawn operations.
    pub fn apply(&self, image: &mut Pixels, rng: &mut impl Rng) {
        for _ in 0..self.config.layers {
            if let Some(op) = self.draw(rng) {
                op.apply(image, &self.fill);
            }
        }
    }

    /// One layer: an operation, or none.
    pub fn draw(&self, rng: &mut impl Rng) -> Option<Op> {
        let kind = Kind::ALL[rng.random_range(0..Kind::ALL.len())];
        if !rng.random_bool(self.config.probability) {
            return None;
        }
        let magnitude = match &self.magnitudes {
            Some(normal) => normal.sample(rng),
            None => self.config.magnitude,
        };
        Some(kind.at(magnitude.clamp(0.0, MAX_MAGNITUDE), rng.random_bool(0.5)))
    }
}
