//! Shares that let all ranks finish together.

use super::error::Result;
use crate::error::MoeError;

/// Seconds of a rank as a function of its share: `fixed_s + unit_s · share`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AffineTime {
    /// What any share at all takes.
    pub fixed_s: f64,
    /// What one more unit takes.
    pub unit_s: f64,
}

impl AffineTime {
    /// Seconds of a share; none for no share.
    fn seconds(&self, share: usize) -> f64 {
        if share == 0 {
            return 0.0;
        }
        self.fixed_s + self.unit_s * share as f64
    }
}

/// Splits `total` so that the slowest rank is as fast as it can be: in proportion to measured
/// speed, less what a rank's fixed time costs it. Shares are multiples of `multiple`, but for the
/// remainder of `total`. A rank whose first unit would take longer than the others need for all
/// gets nothing.
///
/// # Errors
/// [`MoeError::Split`] without ranks, with `multiple` zero, or if a time is not a number.
pub fn balanced_shares(total: usize, times: &[AffineTime], multiple: usize) -> Result<Vec<usize>> {
    let proper = |t: &AffineTime| t.fixed_s.is_finite() && t.unit_s.is_finite();
    if times.is_empty() || multiple == 0 || !times.iter().all(proper) {
        return Err(MoeError::Split {
            got: format!("times {times:?}, multiple {multiple}"),
            allowed: "one finite time per rank, at least one, and multiple >= 1",
        }
        .into());
    }
    let mut shares = vec![0; times.len()];
    // Units that are alike, given one by one to whoever is done with it first: no other allocation
    // has a faster slowest rank. Among equals, the one that has least.
    let mut give = |units: usize| {
        let after = |rank: usize| times[rank].seconds(shares[rank] + units);
        let first = (0..times.len()).min_by(|&a, &b| {
            let by_time = after(a).total_cmp(&after(b));
            by_time.then(shares[a].cmp(&shares[b]))
        });
        if let Some(rank) = first {
            shares[rank] += units;
        }
    };
    for _ in 0..total / multiple {
        give(multiple);
    }
    give(total % multiple);
    Ok(shares)
}

/// The multiple in which hidden units are shared out: what kernels' tiles like, as long as that
/// leaves each rank a choice of eight shares or more.
pub fn width_multiple(d_ff: usize, ranks: usize) -> usize {
    [16, 8, 4, 2]
        .into_iter()
        .find(|multiple| d_ff.is_multiple_of(*multiple) && d_ff >= 8 * multiple * ranks)
        .unwrap_or(1)
}
