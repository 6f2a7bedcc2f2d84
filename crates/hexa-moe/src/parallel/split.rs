//! Unequal shares in whole numbers.

use super::comm::CommError;
use crate::error::{MoeError, Result};

/// Splits `total` in proportion to `weights`: multiples of `multiple` (but for the remainder of
/// `total`, which goes to the largest share) that sum exactly, by largest remainders, the lower
/// index first among equals. A weight of zero gets nothing.
///
/// # Errors
/// [`MoeError::Split`] without weights, if a weight is negative or not finite, if all are zero, or
/// if `multiple` is zero.
///
/// ```
/// # use hexa_moe::parallel::split_proportional;
/// assert_eq!(split_proportional(1536, &[5.0, 2.0, 1.0], 64)?, [960, 384, 192]);
/// assert_eq!(split_proportional(10, &[1.0, 0.0], 1)?, [10, 0]);
/// # Ok::<(), hexa_moe::MoeError>(())
/// ```
pub fn split_proportional(total: usize, weights: &[f64], multiple: usize) -> Result<Vec<usize>> {
    let refuse = |allowed| {
        Err(MoeError::Split {
            got: format!("weights {weights:?}, multiple {multiple}"),
            allowed,
        })
    };
    if multiple == 0 {
        return refuse("multiple >= 1");
    }
    let sum: f64 = weights.iter().sum();
    let proper = weights.iter().all(|w| w.is_finite() && *w >= 0.0);
    if !proper || !sum.is_finite() || sum <= 0.0 {
        return refuse("finite weights >= 0, at least one above 0");
    }

    let units = total / multiple;
    let exact: Vec<f64> = weights.iter().map(|w| w / sum * units as f64).collect();
    let mut shares: Vec<usize> = exact.iter().map(|x| x.floor() as usize).collect();
    let mut order: Vec<usize> = (0..weights.len()).filter(|&i| weights[i] > 0.0).collect();
    order.sort_by(|&a, &b| {
        exact[b]
            .fract()
            .total_cmp(&exact[a].fract())
            .then(a.cmp(&b))
    });
    // Rounding may have given a unit too many or too few; both are corrected by remainders.
    let given: usize = shares.iter().sum();
    for i in order.iter().cycle().take(units.saturating_sub(given)) {
        shares[*i] += 1;
    }
    let mut excess = given.saturating_sub(units);
    for i in order.iter().rev().cycle() {
        if excess == 0 {
            break;
        }
        if shares[*i] > 0 {
            shares[*i] -= 1;
            excess -= 1;
        }
    }

    let mut shares: Vec<usize> = shares.iter().map(|units| units * multiple).collect();
    let largest = (0..weights.len())
        .filter(|&i| weights[i] > 0.0)
        .reduce(|a, b| if shares[b] > shares[a] { b } else { a });
    if let Some(largest) = largest {
        shares[largest] += total % multiple;
    }
    Ok(shares)
}

impl From<CommError> for MoeError {
    fn from(error: CommError) -> Self {
        MoeError::Comm(error)
    }
}
