//! What a rank's steps take: all of it, its own computation, what its layers receive.

use std::collections::VecDeque;
use std::time::Instant;

use hexa_moe::parallel::comm::Meter;

use super::Seat;

/// Steps whose medians are told.
const WINDOW: usize = 256;

/// Bytes of the elements that travel.
const F32: u64 = 4;

/// Keeps time of a rank's steps.
#[derive(Debug)]
pub(super) struct Watch {
    meter: Meter,
    since: Instant,
    /// Whether the first step is behind, which also builds and tunes kernels.
    is_warm: bool,
    latest: VecDeque<StepTime>,
    #[cfg(test)]
    fake_busy_s: Option<fn(rank: usize, images: usize) -> f64>,
}

/// What one step took.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct StepTime {
    /// Seconds of all of it.
    pub step_s: f64,
    /// Seconds in which the rank did not wait for others.
    pub busy_s: f64,
    /// Bytes that Mixture-of-Experts layers received from other ranks.
    pub layer_bytes: f64,
}

impl Watch {
    pub(super) fn new(seat: &Seat) -> Self {
        Watch {
            meter: seat.meter.clone(),
            since: Instant::now(),
            is_warm: false,
            latest: VecDeque::with_capacity(WINDOW),
            #[cfg(test)]
            fake_busy_s: seat.fake_busy_s,
        }
    }

    /// A step begins.
    pub(super) fn begin(&mut self) {
        // Evaluations and checkpoints are no part of it.
        self.meter.take();
        self.since = Instant::now();
    }

    /// A step of `rank`'s `images` has ended; gives the seconds of its own computation.
    #[cfg_attr(
        not(test),
        allow(unused_variables, reason = "for what tests say instead")
    )]
    pub(super) fn end(&mut self, rank: usize, images: usize) -> f64 {
        let step_s = self.since.elapsed().as_secs_f64();
        let traffic = self.meter.take();
        let waited: f64 = traffic.values().map(|t| t.waited.as_secs_f64()).sum();
        let received: u64 = traffic.values().map(|t| t.received_by_layers).sum();
        let busy_s = (step_s - waited).max(0.0);
        #[cfg(test)]
        let busy_s = self.fake_busy_s.map_or(busy_s, |fake| fake(rank, images));
        if self.is_warm {
            if self.latest.len() == WINDOW {
                self.latest.pop_front();
            }
            self.latest.push_back(StepTime {
                step_s,
                busy_s,
                layer_bytes: (F32 * received) as f64,
            });
        }
        self.is_warm = true;
        busy_s
    }

    /// Shares have changed: what was measured no longer holds.
    pub(super) fn forget(&mut self) {
        self.latest.clear();
        self.is_warm = false;
    }

    /// Steps that were measured, and their medians.
    pub(super) fn medians(&self) -> (usize, StepTime) {
        let median = |field: fn(&StepTime) -> f64| {
            let mut values: Vec<f64> = self.latest.iter().map(field).collect();
            values.sort_by(f64::total_cmp);
            values.get(values.len() / 2).copied().unwrap_or(0.0)
        };
        let medians = StepTime {
            step_s: median(|step| step.step_s),
            busy_s: median(|step| step.busy_s),
            layer_bytes: median(|step| step.layer_bytes),
        };
        (self.latest.len(), medians)
    }
}
