//! New shares when a device has slowed down, or come back.

use std::collections::VecDeque;

use super::comm::Communicator;
use super::split::split_proportional;
use crate::error::{MoeError, Result};

/// When shares are split anew.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RebalanceOptions {
    /// The slowest rank's time may exceed the fastest's by this fraction.
    pub threshold: f64,
    /// Steps whose median counts, so that a single slow step does not.
    pub window: usize,
    /// Steps in a row for which the threshold must be exceeded.
    pub patience: usize,
    /// Fraction by which the slowest rank must be expected to become faster.
    pub min_gain: f64,
}

impl Default for RebalanceOptions {
    fn default() -> Self {
        Self {
            threshold: 0.2,
            window: 8,
            patience: 4,
            min_gain: 0.05,
        }
    }
}

/// Watches the ranks' step times and decides, on all ranks alike, when shares no longer fit.
///
/// Times are those of a rank's own computation, waiting for others left out
/// ([`Meter::waited`](super::comm::Meter::waited)): a step as a whole takes equally long everywhere.
#[derive(Debug, Clone)]
pub struct Rebalancer {
    options: RebalanceOptions,
    multiple: usize,
    shares: Vec<usize>,
    /// The last steps' times of all ranks.
    window: VecDeque<Vec<f64>>,
    /// Seconds per unit of a rank's share, as last known.
    unit_s: Vec<Option<f64>>,
    exceeded: usize,
}

impl Rebalancer {
    /// Watches `shares`, which may be given anew in multiples of `multiple`: of a batch, or of a
    /// hidden width.
    ///
    /// # Errors
    /// [`MoeError::Split`] if there are no shares or an option is out of its range.
    pub fn new(options: RebalanceOptions, shares: Vec<usize>, multiple: usize) -> Result<Self> {
        let fraction = |x: f64| x.is_finite() && x >= 0.0;
        let proper = fraction(options.threshold)
            && fraction(options.min_gain)
            && options.window > 0
            && options.patience > 0
            && multiple > 0
            && shares.iter().any(|&share| share > 0);
        if !proper {
            return Err(MoeError::Split {
                got: format!("shares {shares:?}, multiple {multiple}, {options:?}"),
                allowed: "a share above 0, a multiple, window and patience >= 1, fractions >= 0",
            });
        }
        Ok(Self {
            options,
            multiple,
            window: VecDeque::with_capacity(options.window),
            unit_s: vec![None; shares.len()],
            shares,
            exceeded: 0,
        })
    }

    /// The shares that are in force.
    pub fn shares(&self) -> &[usize] {
        &self.shares
    }

    /// Tells all ranks this rank's computing time of a step; all ranks call it after each step.
    /// Gives new shares, the same on all ranks, if those in force no longer fit.
    ///
    /// # Errors
    /// [`MoeError::Comm`].
    pub fn observe(&mut self, comm: &dyn Communicator, busy_s: f64) -> Result<Option<Vec<usize>>> {
        let counts = vec![1; comm.world_size()];
        // Decisions rest on what was exchanged, a rank's own time included.
        let all = comm.all_gather_v("step times", vec![busy_s as f32], &counts)?;
        let all: Vec<f64> = all.into_iter().map(f64::from).collect();
        self.observe_all(&all)
    }

    /// [`Rebalancer::observe`] once all ranks' times are known. A step in which a time is missing,
    /// not a number or not above zero where there was work, is passed over.
    ///
    /// # Errors
    /// [`MoeError::Split`] unless there is one time per rank.
    pub fn observe_all(&mut self, busy_s: &[f64]) -> Result<Option<Vec<usize>>> {
        if busy_s.len() != self.shares.len() {
            return Err(MoeError::Split {
                got: format!("times {busy_s:?} for {} ranks", self.shares.len()),
                allowed: "one time per rank",
            });
        }
        let worked = |rank: usize| self.shares[rank] > 0;
        if (0..busy_s.len()).any(|r| worked(r) && !(busy_s[r].is_finite() && busy_s[r] > 0.0)) {
            return Ok(None);
        }
        if self.window.len() == self.options.window {
            self.window.pop_front();
        }
        self.window.push_back(busy_s.to_vec());
        if self.window.len() < self.options.window {
            return Ok(None);
        }
        let Some(shares) = self.better_shares()? else {
            self.exceeded = 0;
            return Ok(None);
        };
        self.exceeded += 1;
        if self.exceeded < self.options.patience {
            return Ok(None);
        }
        // What was measured under the old shares says nothing about the new ones.
        self.window.clear();
        self.exceeded = 0;
        self.shares.clone_from(&shares);
        Ok(Some(shares))
    }

    /// Shares by the window's medians, if ranks are far apart and these bring them together.
    fn better_shares(&mut self) -> Result<Option<Vec<usize>>> {
        let mut slowest = 0.0f64;
        let mut fastest = f64::INFINITY;
        for rank in 0..self.shares.len() {
            if self.shares[rank] == 0 {
                continue;
            }
            let mut times: Vec<f64> = self.window.iter().map(|step| step[rank]).collect();
            times.sort_by(f64::total_cmp);
            let median = times[times.len() / 2];
            slowest = slowest.max(median);
            fastest = fastest.min(median);
            self.unit_s[rank] = Some(median / self.shares[rank] as f64);
        }
        if slowest <= fastest * (1.0 + self.options.threshold) {
            return Ok(None);
        }
        // A rank that never had a share is not given one: nothing is known of it.
        let speeds: Vec<f64> = self
            .unit_s
            .iter()
            .map(|unit_s| unit_s.map_or(0.0, |seconds| 1.0 / seconds))
            .collect();
        let total = self.shares.iter().sum();
        let shares = split_proportional(total, &speeds, self.multiple)?;
        let expected = shares
            .iter()
            .zip(&self.unit_s)
            .filter_map(|(&share, unit_s)| Some(share as f64 * (*unit_s)?))
            .fold(0.0, f64::max);
        let gains = expected * (1.0 + self.options.min_gain) < slowest;
        Ok((gains && shares != self.shares).then_some(shares))
    }
}
