//! Costs from measurements: least squares of relative errors, no cost below zero.

/// Coefficients `c ≥ 0` that minimise `Σ ((Σ_j c_j · f_ij − t_i) / t_i)²` over measurements
/// `(f_i, t_i)`; times must be above zero. `None` if no coefficient is determined.
///
/// Relative errors, because a microsecond matters in a small message and not in a large one. The
/// minimum under `c ≥ 0` is a plain least-squares solution on its own support, and supports of a
/// handful of coefficients can all be tried.
pub fn non_negative<const N: usize>(points: &[([f64; N], f64)]) -> Option<[f64; N]> {
    // Columns of size one, so that pivots can be compared with rounding errors.
    let mut scale = [0.0f64; N];
    for (features, seconds) in points {
        for (scale, feature) in scale.iter_mut().zip(features) {
            *scale = scale.max((feature / seconds).abs());
        }
    }
    let rows: Vec<[f64; N]> = points
        .iter()
        .map(|(features, seconds)| core::array::from_fn(|j| features[j] / seconds / scale[j]))
        .collect();
    let mut best: Option<(f64, [f64; N])> = None;
    for support in 1u32..1 << N {
        let columns: Vec<usize> = (0..N)
            .filter(|&j| support >> j & 1 == 1 && scale[j] > 0.0)
            .collect();
        let Some(solution) = solve(&rows, &columns) else {
            continue;
        };
        if solution.iter().any(|&c| c < 0.0) {
            continue;
        }
        let mut scaled = [0.0; N];
        for (&j, c) in columns.iter().zip(solution) {
            scaled[j] = c;
        }
        let error = |row: &[f64; N]| {
            let predicted: f64 = row.iter().zip(&scaled).map(|(f, c)| f * c).sum();
            (predicted - 1.0).powi(2)
        };
        let residual: f64 = rows.iter().map(error).sum();
        if best.is_none_or(|(least, _)| residual < least) {
            best = Some((residual, scaled));
        }
    }
    let (_, scaled) = best?;
    Some(core::array::from_fn(|j| {
        if scale[j] > 0.0 {
            scaled[j] / scale[j]
        } else {
            0.0
        }
    }))
}

/// Least squares of `rows · c = 1` on some columns, by the normal equations.
fn solve<const N: usize>(rows: &[[f64; N]], columns: &[usize]) -> Option<Vec<f64>> {
    let n = columns.len();
    if n == 0 || rows.len() < n {
        return None;
    }
    let mut matrix: Vec<Vec<f64>> = columns
        .iter()
        .map(|&i| {
            let products = columns
                .iter()
                .map(|&j| rows.iter().map(|row| row[i] * row[j]).sum::<f64>());
            let rhs = rows.iter().map(|row| row[i]).sum::<f64>();
            products.chain([rhs]).collect()
        })
        .collect();
    for i in 0..n {
        let pivot = (i..n).max_by(|&a, &b| matrix[a][i].abs().total_cmp(&matrix[b][i].abs()))?;
        matrix.swap(i, pivot);
        // Columns that measurements do not tell apart leave nothing but rounding errors.
        if matrix[i][i].abs() < 1e-10 * rows.len() as f64 {
            return None;
        }
        let pivot_row = matrix[i].clone();
        for (_, row) in matrix.iter_mut().enumerate().filter(|(j, _)| *j != i) {
            let factor = row[i] / pivot_row[i];
            for (value, pivot) in row.iter_mut().zip(&pivot_row) {
                *value -= factor * pivot;
            }
        }
    }
    Some((0..n).map(|i| matrix[i][n] / matrix[i][i]).collect())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Exact measurements give back the coefficients, some of which are zero.
        #[test]
        fn known_coefficients_are_recovered(
            known in prop::array::uniform3(prop_oneof![Just(0.0), 1e-3f64..1.0]),
            units in prop::collection::vec((1usize..200, 1usize..300), 8..16),
        ) {
            prop_assume!(known.iter().any(|&c| c > 0.0));
            let features = |&(a, b): &(usize, usize)| [1.0, a as f64, (a * b) as f64];
            let points: Vec<_> = units
                .iter()
                .map(features)
                .map(|f| (f, f.iter().zip(&known).map(|(f, c)| f * c).sum::<f64>()))
                .collect();
            let fitted = non_negative(&points).unwrap();
            for (f, seconds) in &points {
                let predicted: f64 = f.iter().zip(&fitted).map(|(f, c)| f * c).sum();
                prop_assert!((predicted / seconds - 1.0).abs() < 1e-4, "{fitted:?} {known:?}");
            }
        }

        /// No other non-negative coefficients come closer.
        #[test]
        fn the_fit_is_the_best_of_all(
            seconds in prop::collection::vec(0.1f64..10.0, 3..8),
            other in prop::array::uniform2(0.0f64..5.0),
        ) {
            let points: Vec<_> = seconds
                .iter()
                .enumerate()
                .map(|(i, &t)| ([1.0, i as f64], t))
                .collect();
            let residual = |c: &[f64; 2]| -> f64 {
                let error = |(f, t): &([f64; 2], f64)| ((c[0] * f[0] + c[1] * f[1]) / t - 1.0).powi(2);
                points.iter().map(error).sum()
            };
            let fitted = non_negative(&points).unwrap();
            prop_assert!(fitted.iter().all(|&c| c >= 0.0));
            prop_assert!(residual(&fitted) <= residual(&other) + 1e-9);
        }
    }

    #[test]
    fn measurements_that_tell_nothing_apart_leave_one_cause() {
        let fitted = non_negative(&[([1.0, 2.0], 4.0), ([1.0, 2.0], 4.0)]).unwrap();
        assert!((fitted[0] + 2.0 * fitted[1] - 4.0).abs() < 1e-12);
        assert!(fitted.contains(&0.0));
        assert_eq!(non_negative::<2>(&[]), None);
    }
}
