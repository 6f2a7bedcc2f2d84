//! Random erasing (arXiv:1708.04896) in timm's form: a rectangle of normally distributed noise.

use rand::{Rng, RngExt};
use rand_distr::{Distribution, StandardNormal};

/// Range of the rectangle's share of the area.
const AREA: [f64; 2] = [0.02, 1.0 / 3.0];
/// Range of its height over its width.
const ASPECT: [f64; 2] = [0.3, 1.0 / 0.3];
/// Draws that may fall outside of the image before it is left as it is.
const ATTEMPTS: usize = 10;

/// Overwrites a random rectangle of a normalised image, with a probability.
#[derive(Debug, Clone, Copy)]
pub struct RandomErasing {
    probability: f64,
}

/// A part of an image, in pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rectangle {
    pub top: usize,
    pub left: usize,
    pub height: usize,
    pub width: usize,
}

impl RandomErasing {
    pub fn new(probability: f64) -> Self {
        Self { probability }
    }

    /// Erases in `values`: `[channels, size, size]`.
    pub fn apply(&self, values: &mut [f32], size: usize, rng: &mut impl Rng) {
        let Some(part) = self.draw(size, rng) else {
            return;
        };
        for channel in values.chunks_exact_mut(size * size) {
            for row in channel
                .chunks_exact_mut(size)
                .skip(part.top)
                .take(part.height)
            {
                for v in &mut row[part.left..part.left + part.width] {
                    *v = StandardNormal.sample(rng);
                }
            }
        }
    }

    /// The rectangle of one image, or none.
    pub fn draw(&self, size: usize, rng: &mut impl Rng) -> Option<Rectangle> {
        if !rng.random_bool(self.probability) {
            return None;
        }
        let log_aspect = ASPECT.map(f64::ln);
        for _ in 0..ATTEMPTS {
            let area = rng.random_range(AREA[0]..=AREA[1]) * (size * size) as f64;
            let aspect = rng.random_range(log_aspect[0]..=log_aspect[1]).exp();
            let height = (area * aspect).sqrt().round_ties_even() as usize;
            let width = (area / aspect).sqrt().round_ties_even() as usize;
            if height < size && width < size {
                return Some(Rectangle {
                    top: rng.random_range(0..=size - height),
                    left: rng.random_range(0..=size - width),
                    height,
                    width,
                });
            }
        }
        None
    }
}
