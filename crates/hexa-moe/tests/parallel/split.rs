//! Shares and slices.

use hexa_moe::MoeError;
use hexa_moe::parallel::{ExpertShards, HostExperts, split_proportional};
use proptest::prelude::*;

#[test]
fn named_splits() {
    let split = |total, weights: &[f64], multiple| split_proportional(total, weights, multiple);
    assert_eq!(split(16, &[5.0, 2.0, 1.0], 1).unwrap(), [10, 4, 2]);
    assert_eq!(split(7, &[1.0, 0.0], 1).unwrap(), [7, 0]);
    // Equal remainders go to the lower ranks.
    assert_eq!(split(8, &[1.0, 1.0, 1.0], 1).unwrap(), [3, 3, 2]);
    // What no multiple fits goes to the largest.
    assert_eq!(split(37, &[1.0, 2.0], 8).unwrap(), [8, 29]);
    assert_eq!(split(0, &[1.0, 2.0], 8).unwrap(), [0, 0]);
}

#[test]
fn improper_weights_are_refused() {
    for (weights, multiple) in [
        (&[][..], 1),
        (&[0.0, 0.0], 1),
        (&[1.0, -1.0], 1),
        (&[1.0, f64::NAN], 1),
        (&[1.0, f64::INFINITY], 1),
        (&[f64::MAX, f64::MAX], 1),
        (&[1.0], 0),
    ] {
        let error = split_proportional(8, weights, multiple).unwrap_err();
        assert!(matches!(error, MoeError::Split { .. }), "{error}");
    }
}

proptest! {
    #[test]
    fn shares_sum_exactly_and_follow_the_weights(
        total in 0usize..100_000,
        weights in prop::collection::vec(0.0f64..100.0, 1..9),
        multiple in 1usize..65,
    ) {
        prop_assume!(weights.iter().sum::<f64>() > 1e-6);
        let shares = split_proportional(total, &weights, multiple).unwrap();
        prop_assert_eq!(shares.iter().sum::<usize>(), total);
        let sum: f64 = weights.iter().sum();
        for (share, weight) in shares.iter().zip(&weights) {
            prop_assert!(*weight > 0.0 || *share == 0);
            let exact = weight / sum * total as f64;
            // One multiple by rounding, and less than one that no multiple fits.
            prop_assert!((*share as f64 - exact).abs() < 2.0 * multiple as f64 + 1e-6);
        }
    }

    /// Every element of the whole is in exactly one part, and parts make up the whole.
    #[test]
    fn slices_partition_the_experts(
        [num_experts, d_model, columns_per_unit] in [1usize..4, 1usize..4, 1usize..3],
        has_b1: bool,
        widths in prop::collection::vec(0usize..5, 1..5),
    ) {
        let shards = ExpertShards { num_experts, d_model, columns_per_unit, has_b1, widths };
        let columns = shards.columns(shards.d_ff());
        let numbers = |from: usize, len: usize| (from..from + len).map(|i| i as f32).collect();
        let w1_len = num_experts * d_model * columns;
        let b1_len = if has_b1 { num_experts * columns } else { 0 };
        let whole = HostExperts {
            w1: numbers(0, w1_len),
            b1: numbers(w1_len, b1_len),
            w2: numbers(w1_len + b1_len, num_experts * shards.d_ff() * d_model),
        };
        let parts = shards.scatter(&whole);
        prop_assert_eq!(shards.counts().iter().sum::<usize>(), parts.len());
        prop_assert_eq!(&shards.assemble(&parts), &whole);
        let mut rejoined = Vec::new();
        for rank in 0..shards.widths.len() {
            let part = shards.slice(rank, &whole);
            // Column c of row r of the slice is column start + c of row r of the whole.
            let (units, width) = (shards.units(rank), shards.columns(shards.widths[rank]));
            for (i, &value) in part.w1.iter().enumerate() {
                let (row, column) = (i / width, i % width);
                let at = row * columns + shards.columns(units.start) + column;
                prop_assert_eq!(value, whole.w1[at]);
            }
            rejoined.extend(ExpertShards::pack(part));
        }
        prop_assert_eq!(rejoined, parts);
    }
}
