//! Shares that let all ranks finish together.

use super::super::split::split_proportional;
use super::error::Result;

/// Seconds of a rank as a function of its share: `fixed_s + unit_s · share`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AffineTime {
    /// What any share at all takes.
    pub fixed_s: f64,
    /// What one more unit takes.
    pub unit_s: f64,
}

/// Splits `total` so that all ranks take equally long, in multiples of `multiple`: in proportion
/// to measured speed, less what a rank's fixed time costs it. A rank whose fixed time alone is
/// longer than the others need gets nothing. Ranks that take no time for any share are equal.
///
/// # Errors
/// [`MoeError::Split`](crate::MoeError::Split) without ranks or with `multiple` zero.
pub fn balanced_shares(total: usize, times: &[AffineTime], multiple: usize) -> Result<Vec<usize>> {
    let slowest = times.iter().map(|t| t.unit_s).fold(0.0, f64::max);
    if slowest <= 0.0 || total == 0 {
        let equal = vec![1.0; times.len()];
        return Ok(split_proportional(total, &equal, multiple)?);
    }
    // A unit that takes no time would be infinite speed.
    let unit = |t: &AffineTime| t.unit_s.max(1e-9 * slowest);
    let shares_at = |deadline: f64| {
        times
            .iter()
            .map(move |t| ((deadline - t.fixed_s) / unit(t)).max(0.0))
    };
    // Between nobody's work and everybody's work done by the slowest.
    let mut low = 0.0;
    let mut high = times
        .iter()
        .map(|t| t.fixed_s + unit(t) * total as f64)
        .fold(0.0, f64::max);
    for _ in 0..200 {
        let middle = 0.5 * (low + high);
        if shares_at(middle).sum::<f64>() < total as f64 {
            low = middle;
        } else {
            high = middle;
        }
    }
    let weights: Vec<f64> = shares_at(high).collect();
    Ok(split_proportional(total, &weights, multiple)?)
}

/// The multiple in which hidden units are shared out: what kernels' tiles like, as long as that
/// leaves each rank a choice of eight shares or more.
pub fn width_multiple(d_ff: usize, ranks: usize) -> usize {
    [16, 8, 4, 2]
        .into_iter()
        .find(|multiple| d_ff.is_multiple_of(*multiple) && d_ff >= 8 * multiple * ranks)
        .unwrap_or(1)
}
