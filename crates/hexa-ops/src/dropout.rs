//! The counter-based random numbers behind expert dropout.
//!
//! A mask is a function of a seed, a slot and a column: nothing is stored, the backward pass
//! derives the forward pass' mask, and all back-ends draw the same one.

/// PCG-RXS-M-XS 32: a permutation of the 32-bit integers with good avalanche
/// (M. O'Neill, PCG: A Family of Simple Fast Space-Efficient Statistically Good Algorithms, 2014).
#[inline]
pub fn pcg(v: u32) -> u32 {
    let state = v.wrapping_mul(747_796_405).wrapping_add(2_891_336_453);
    let word = ((state >> ((state >> 28) + 4)) ^ state).wrapping_mul(277_803_737);
    (word >> 22) ^ word
}

/// Uniform in `[0, 1)` with 24 random bits, for column `column` of slot `slot`.
#[inline]
pub fn dropout_uniform(seed: [u32; 2], slot: u32, column: u32) -> f32 {
    let row = pcg(slot ^ seed[0]);
    let bits = pcg(pcg(row ^ column).wrapping_add(seed[1]));
    (bits >> 8) as f32 * (1.0 / 16_777_216.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uniform_has_the_moments_of_a_uniform() {
        let n = 1 << 16;
        let draws: Vec<f64> = (0..n)
            .map(|i| dropout_uniform([7, 11], i / 256, i % 256) as f64)
            .collect();
        let mean = draws.iter().sum::<f64>() / n as f64;
        let var = draws.iter().map(|u| (u - mean).powi(2)).sum::<f64>() / n as f64;
        // Standard errors: 0.0011 for the mean, 0.0003 for the variance.
        assert!((mean - 0.5).abs() < 0.006, "{mean}");
        assert!((var - 1.0 / 12.0).abs() < 0.002, "{var}");
    }

    #[test]
    fn neighbouring_rows_and_columns_are_uncorrelated() {
        let n = 1 << 15;
        for (ds, dc) in [(0, 1), (1, 0), (1, 1)] {
            let cov = (0..n)
                .map(|i| {
                    let (s, c) = (i / 128, i % 128);
                    let a = dropout_uniform([3, 5], s, c) as f64 - 0.5;
                    let b = dropout_uniform([3, 5], s + ds, c + dc) as f64 - 0.5;
                    a * b
                })
                .sum::<f64>()
                / n as f64;
            assert!(cov.abs() * 12.0 < 0.03, "lag {ds},{dc}: {cov}");
        }
    }
}
