//! Mixup (arXiv:1710.09412) and CutMix (arXiv:1905.04899) in timm's form: one share for a batch,
//! each image with its mirror image in the batch's order.

use rand::{Rng, RngExt};
use rand_distr::{Beta, Distribution};

use crate::config::MixConfig;
use crate::data::Batch;

/// How a batch is mixed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Mix {
    /// `share · image + (1 − share) · partner`.
    Blend {
        /// Share of the image itself.
        share: f32,
    },
    /// The partner inside of a rectangle: rows `top..bottom`, columns `left..right`.
    Paste {
        /// Rows of the rectangle.
        rows: [usize; 2],
        /// Columns of the rectangle.
        columns: [usize; 2],
    },
}

/// Draws how batches are mixed, and mixes them.
#[derive(Debug, Clone)]
pub struct Mixer {
    config: MixConfig,
    /// Distributions of the share; `None` where the method is off.
    blend: Option<Beta<f64>>,
    paste: Option<Beta<f64>>,
}

impl Mixer {
    /// `None` if the settings mix nothing.
    pub fn new(config: MixConfig) -> Option<Self> {
        let beta = |alpha: f64| Beta::new(alpha, alpha).ok().filter(|_| alpha > 0.0);
        let (blend, paste) = (beta(config.mixup), beta(config.cutmix));
        let mixes = config.probability > 0.0 && (blend.is_some() || paste.is_some());
        mixes.then_some(Self {
            config,
            blend,
            paste,
        })
    }

    /// How a batch of images of `size` by `size` pixels is mixed; `None` to leave it.
    pub fn draw(&self, size: usize, rng: &mut impl Rng) -> Option<Mix> {
        if !rng.random_bool(self.config.probability) {
            return None;
        }
        let switched = match (&self.blend, &self.paste) {
            (Some(_), Some(_)) => rng.random_bool(self.config.switch_probability),
            (blend, _) => blend.is_none(),
        };
        if let (Some(beta), true) = (&self.paste, switched) {
            return Some(rectangle(beta.sample(rng), size, rng));
        }
        self.blend.as_ref().map(|beta| Mix::Blend {
            share: beta.sample(rng) as f32,
        })
    }

    /// Mixes a batch as `draw` says.
    pub fn apply(&self, batch: &mut Batch, rng: &mut impl Rng) {
        let [images, channels, size, _] = batch.shape;
        let Some(mix) = self.draw(size, rng) else {
            return;
        };
        batch.partners = Some(batch.labels.iter().rev().copied().collect());
        let len = channels * size * size;
        // Image i and its partner are mixed with each other; in an odd batch the middle one is its
        // own partner, and stays.
        for image in 0..images / 2 {
            let (front, back) = batch.images.split_at_mut((images - 1 - image) * len);
            mix.pair(&mut front[image * len..][..len], &mut back[..len], size);
        }
        batch.share = mix.share(size);
    }
}

/// A rectangle of `1 − share` of the image's area about a point drawn from all of it; what reaches
/// beyond the edge is cut off.
fn rectangle(share: f64, size: usize, rng: &mut impl Rng) -> Mix {
    let side = (size as f64 * (1.0 - share).max(0.0).sqrt()) as usize;
    let mut interval = || {
        let centre = rng.random_range(0..size);
        [
            centre.saturating_sub(side / 2),
            (centre + side.div_ceil(2)).min(size),
        ]
    };
    Mix::Paste {
        rows: interval(),
        columns: interval(),
    }
}

impl Mix {
    /// Share of an image's own label in its target.
    pub fn share(self, size: usize) -> f32 {
        match self {
            Mix::Blend { share } => share,
            Mix::Paste {
                rows: [top, bottom],
                columns: [left, right],
            } => {
                let pasted = (bottom - top) * (right - left);
                (1.0 - pasted as f64 / (size * size) as f64) as f32
            }
        }
    }

    /// Mixes two images, `[channels, size, size]`, each with the other.
    fn pair(self, a: &mut [f32], b: &mut [f32], size: usize) {
        match self {
            Mix::Blend { share } => {
                for (x, y) in a.iter_mut().zip(b) {
                    let mixed = [
                        *x * share + *y * (1.0 - share),
                        *y * share + *x * (1.0 - share),
                    ];
                    [*x, *y] = mixed;
                }
            }
            Mix::Paste {
                rows: [top, bottom],
                columns: [left, right],
            } => {
                let channels = a.chunks_exact_mut(size * size);
                for (a, b) in channels.zip(b.chunks_exact_mut(size * size)) {
                    for row in top..bottom {
                        let part = row * size + left..row * size + right;
                        a[part.clone()].swap_with_slice(&mut b[part]);
                    }
                }
            }
        }
    }
}
