//! Colour jitter, as torchvision has it.

use rand::seq::SliceRandom;
use rand::{Rng, RngExt};

use super::ops::Op;
use crate::data::pixels::Pixels;

/// Brightness, contrast and saturation, each times a factor drawn from `1 − strength ..= 1 +
/// strength`, in an order that is drawn, too.
#[derive(Debug, Clone, Copy)]
pub struct ColorJitter {
    strength: f64,
}

impl ColorJitter {
    pub fn new(strength: f64) -> Self {
        Self { strength }
    }

    /// Applies freshly drawn factors.
    pub fn apply(&self, image: &mut Pixels, rng: &mut impl Rng) {
        for op in self.draw(rng) {
            op.apply(image, &[]);
        }
    }

    /// The three operations, in their order.
    pub fn draw(&self, rng: &mut impl Rng) -> [Op; 3] {
        let range = (1.0 - self.strength).max(0.0)..=1.0 + self.strength;
        let mut factor = || rng.random_range(range.clone()) as f32;
        let mut ops = [
            Op::Brightness(factor()),
            Op::Contrast(factor()),
            Op::Color(factor()),
        ];
        ops.shuffle(rng);
        ops
    }
}
