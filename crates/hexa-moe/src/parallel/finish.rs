//! When a rank has computed its gradients, which is not when `backward` returns.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use burn::tensor::Tensor;
use hexa_ops::{ExpertOps, when_reached};

use crate::error::Result;

/// The moment at which a backward pass has come to a tensor and the device is done.
///
/// Burn keeps the graphs of all threads of a process in one place. After a backward pass it looks
/// through them for what can be freed, and waits for each graph that another thread is
/// differentiating at that time: a fast rank's `backward` returns with a slow rank's. Whoever wants
/// to know what a rank takes by itself marks the tensor at which its work ends.
#[derive(Debug, Clone, Default)]
pub struct BackwardEnd(Arc<Mutex<Option<Instant>>>);

impl BackwardEnd {
    /// The same tensor, marked: the last for which the backward pass computes a gradient of note.
    /// Waits for the device at the mark, so it is for measurements.
    ///
    /// # Shapes
    /// `x` and result: any, float
    ///
    /// # Errors
    /// As [`when_reached`].
    pub fn mark<B: ExpertOps, const D: usize>(&self, x: Tensor<B, D>) -> Result<Tensor<B, D>> {
        let (moment, device) = (self.0.clone(), x.device());
        Ok(when_reached(x, move || {
            // A device that failed says so again to whoever waits for it next.
            let _ = B::sync(&device);
            *moment.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
        })?)
    }

    /// Time from `start` to the mark, or until now if no backward pass has come to it since it was
    /// last asked.
    pub fn since(&self, start: Instant) -> Duration {
        let moment = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        moment.unwrap_or_else(Instant::now).duration_since(start)
    }
}
