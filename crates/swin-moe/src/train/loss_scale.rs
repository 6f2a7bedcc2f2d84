//! Dynamic loss scaling for half precision (arXiv:1710.03740).
//!
//! Gradients of the activations are small, and below 6e-8 they are zero in f16. The loss is
//! multiplied by a scale before the backward pass, and the gradients are divided by it after. A
//! gradient that is not finite then says that the scale is too large: the step is left out and the
//! scale halved. The constants are those of PyTorch's `GradScaler`.

use serde::{Deserialize, Serialize};

use super::error::{Result, TrainError};
use crate::config::Precision;

const FIRST: f32 = 65_536.0;
const GROWTH_INTERVAL: u32 = 2000;
/// Gradients that are not finite with this scale are so without it.
const LEAST: f32 = 1.0 / 1024.0;
/// The scaled loss must be far from the limit of f32.
const MOST: f32 = 16_777_216.0;

/// The scale, and for how many steps it has held.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LossScale {
    scale: f32,
    good_steps: u32,
}

impl LossScale {
    /// The scale that a run with this arithmetic begins with, if it needs any.
    pub fn of(precision: Precision) -> Option<Self> {
        match precision {
            Precision::F16 => Some(LossScale {
                scale: FIRST,
                good_steps: 0,
            }),
            Precision::F32 | Precision::Tf32 | Precision::Bf16 => None,
        }
    }

    /// The factor of the loss: a power of two.
    pub fn value(self) -> f32 {
        self.scale
    }

    /// Whether a step with gradients of this norm is to be done; the next scale follows from that.
    ///
    /// # Errors
    /// [`TrainError::Overflow`] if no scale makes gradients finite.
    pub fn accept(&mut self, grad_norm: f32, step: u64, lr: f64) -> Result<bool> {
        if grad_norm.is_finite() {
            self.good_steps += 1;
            if self.good_steps == GROWTH_INTERVAL {
                self.scale = (2.0 * self.scale).min(MOST);
                self.good_steps = 0;
            }
            return Ok(true);
        }
        if self.scale <= LEAST {
            return Err(TrainError::Overflow {
                step,
                lr,
                scale: self.scale,
            });
        }
        self.scale /= 2.0;
        self.good_steps = 0;
        Ok(false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_scale_halves_at_once_and_doubles_in_time() {
        let mut scale = LossScale::of(Precision::F16).unwrap();
        let mut accept = |norm| scale.accept(norm, 7, 1e-3).unwrap();
        assert!(!accept(f32::INFINITY));
        for _ in 0..1999 {
            assert!(accept(3.0));
        }
        assert!(!accept(f32::NAN));
        for _ in 0..2000 {
            assert!(accept(3.0));
        }
        assert_eq!(scale.value(), 32_768.0);
    }

    #[test]
    fn gradients_that_no_scale_makes_finite_end_the_run() {
        let mut scale = LossScale::of(Precision::F16).unwrap();
        let error = (0..100).find_map(|step| scale.accept(f32::NAN, step, 1e-3).err());
        assert!(matches!(error, Some(TrainError::Overflow { step: 26, .. })));
    }

    #[test]
    fn only_f16_is_scaled() {
        for precision in Precision::ALL {
            let scaled = LossScale::of(precision).is_some();
            assert_eq!(scaled, precision == Precision::F16);
        }
    }
}
