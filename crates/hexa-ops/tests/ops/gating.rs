//! Top-k softmax gating and its gradients.

use burn::tensor::Tensor;
use hexa_ops::testing::backend::TestBackend;
use hexa_ops::testing::compare::{check_tensor, host};
use hexa_ops::testing::oracle;
use hexa_ops::{ExpertIndex, TrainingBackend, backend_test, topk_gating};
use proptest::prelude::*;

use crate::cases::{
    CASES, Layout, Numbers, Outcome, check, fewest_tokens, integers, laid_out, layout, most_tokens,
    same_bits, tensor,
};

#[derive(Debug, Clone)]
struct GatingCase {
    tokens: usize,
    num_experts: usize,
    top_k: usize,
    normalize: bool,
    /// Logits are multiples of a quarter, so that many are equal, times this.
    scale: f64,
    /// Which of the results the loss depends on.
    through: (bool, bool),
    layout: Layout,
    seed: u64,
}

impl GatingCase {
    fn logits(&self) -> Vec<f64> {
        let mut numbers = Numbers::new(self.seed);
        (0..self.tokens * self.num_experts)
            .map(|_| (numbers.below(17) as f64 - 8.0) / 4.0 * self.scale)
            .collect()
    }
}

/// Numbers of experts around those of a plane's units, and above a cube's. Lavapipe ends a kernel's
/// loops after 65,535 iterations in all: choosing 257 of 257 experts takes more.
fn many_experts() -> Vec<usize> {
    let emulated = TestBackend::selected().is_ok_and(TestBackend::prefers_small_shapes);
    let most = if emulated { 130 } else { 257 };
    vec![31, 32, 33, 64, 130, most]
}

fn gating_case(most: usize) -> impl Strategy<Value = GatingCase> {
    let experts = prop_oneof![
        1 => Just(1_usize),
        6 => 2..=19_usize,
        1 => prop::sample::select(many_experts()),
    ];
    let experts_and_k = experts.prop_flat_map(|e| {
        (
            Just(e),
            prop_oneof![4 => 1..=e.min(4), 1 => Just(e), 1 => 1..=e],
        )
    });
    let tokens = prop_oneof![1 => Just(fewest_tokens()), 1 => Just(1), 6 => 2..=most];
    let scale = prop::sample::select(vec![0.25, 1.0, 1.0, 8.0]);
    let through = prop::sample::select(vec![(true, true), (true, false), (false, true)]);
    (
        tokens,
        experts_and_k,
        any::<bool>(),
        scale,
        through,
        layout(),
        any::<u64>(),
    )
        .prop_map(
            |(tokens, (num_experts, top_k), normalize, scale, through, layout, seed)| GatingCase {
                tokens,
                num_experts,
                top_k,
                normalize,
                scale,
                through,
                layout,
                seed,
            },
        )
}

fn one_case<B: TrainingBackend>(case: &GatingCase) -> Outcome {
    let &GatingCase {
        tokens,
        num_experts,
        top_k,
        normalize,
        ..
    } = case;
    let logits = case.logits();
    let expected = oracle::topk_gating(&logits, num_experts, top_k, normalize);

    let shape = [tokens, num_experts];
    let leaf = laid_out::<B, 2>(&logits, shape, case.layout).require_grad();
    let got = topk_gating(leaf.clone(), top_k, normalize)?;
    prop_assert_eq!(
        integers(got.expert_ids.clone()),
        expected.expert_ids.clone(),
        "of equal logits the lower id comes first"
    );
    check_tensor("probs", got.probs.clone(), &expected.probs, shape)?;
    let choices = [tokens, top_k];
    check_tensor("weights", got.weights.clone(), &expected.weights, choices)?;

    let index = ExpertIndex::from_gating(&got);
    let routing = oracle::Routing::new(tokens, top_k, num_experts, expected.expert_ids.clone());
    prop_assert_eq!(integers(index.slots()), routing.slots());

    let mut numbers = Numbers::new(case.seed ^ 1);
    let mut cotangent = |len: usize, wanted: bool| {
        let values = numbers.values(len);
        if wanted { values } else { vec![0.0; len] }
    };
    let grad_probs = cotangent(tokens * num_experts, case.through.0);
    let grad_weights = cotangent(tokens * top_k, case.through.1);
    if tokens == 0 {
        // `sum_dim` over no rows is not for every back-end; the gradient of nothing is.
        let grads = (got.weights.clone() * tensor(&grad_weights, choices)).backward();
        let got = leaf.grad(&grads).expect("the logits are tracked");
        check_tensor("gradient of no logits", got, &[], shape)?;
        return Ok(());
    }
    let probs = || (got.probs.clone() * tensor(&grad_probs, shape)).sum_dim(1);
    let weights = || (got.weights.clone() * tensor(&grad_weights, choices)).sum_dim(1);
    let loss: Tensor<B, 2> = match case.through {
        (true, true) => probs() + weights(),
        (true, false) => probs(),
        _ => weights(),
    };
    let grads = loss.backward();
    let expected = oracle::gating_backward(
        &expected,
        num_experts,
        normalize,
        &grad_probs,
        &grad_weights,
    );
    let got = leaf.grad(&grads).expect("the logits are tracked");
    check_tensor("gradient of the logits", got, &expected, shape)?;
    Ok(())
}

fn equals_the_oracle<B: TrainingBackend>() {
    check(CASES, gating_case(most_tokens()), |case| {
        one_case::<B>(&case)
    });
}

/// Whatever the logits are, the ids are different ones in range: kernels index memory with them.
fn extreme_logits_keep_ids_in_range<B: TrainingBackend>() {
    let (nan, inf) = (f64::NAN, f64::INFINITY);
    let rows = [
        [nan, nan, nan, nan, nan],
        [inf, inf, 0.0, 1.0, -inf],
        [-inf, -inf, -inf, -inf, -inf],
        [0.0, nan, 1.0, nan, 2.0],
        [1e30, -1e30, 1e30, 0.0, 3.0],
    ];
    for top_k in [1, 2, 5] {
        let logits = tensor::<B, 2>(rows.as_flattened(), [rows.len(), 5]);
        let ids = integers(topk_gating(logits, top_k, true).unwrap().expert_ids);
        for (row, ids) in ids.chunks(top_k).enumerate() {
            let mut sorted = ids.to_vec();
            sorted.sort_unstable();
            sorted.dedup();
            assert_eq!(sorted.len(), top_k, "row {row}: {ids:?} are not distinct");
            assert!(sorted.iter().all(|&e| e < 5), "row {row}: {ids:?}");
        }
    }
}

fn large_logits_do_not_overflow<B: TrainingBackend>() {
    let logits = [1e4, -1e4, 0.0, 88.0, 89.0, 88.5, -1e4, -9_999.0, -9_998.0];
    let expected = oracle::topk_gating(&logits, 3, 2, true);
    let got = topk_gating(tensor::<B, 2>(&logits, [3, 3]), 2, true).unwrap();
    check_tensor("probs", got.probs, &expected.probs, [3, 3]).unwrap();
    check_tensor("weights", got.weights, &expected.weights, [3, 2]).unwrap();
}

fn weights_sum_to_one_and_descend<B: TrainingBackend>() {
    let logits = Numbers::new(5).values(31 * 8);
    let got = topk_gating(tensor::<B, 2>(&logits, [31, 8]), 3, true).unwrap();
    for row in host(got.weights).chunks(3) {
        assert!((row.iter().sum::<f64>() - 1.0).abs() < 1e-6, "{row:?}");
        assert!(row.is_sorted_by(|a, b| a >= b), "{row:?}");
    }
}

fn two_runs_have_the_same_bits<B: TrainingBackend>() {
    let logits = tensor::<B, 2>(&Numbers::new(11).values(67 * 13), [67, 13]);
    let a = topk_gating(logits.clone(), 4, true).unwrap();
    let b = topk_gating(logits, 4, true).unwrap();
    assert!(same_bits(a.probs, b.probs));
    assert!(same_bits(a.weights, b.weights));
    assert_eq!(integers(a.expert_ids), integers(b.expert_ids));
}

backend_test!(gating_equals_the_oracle, equals_the_oracle);
backend_test!(gating_keeps_ids_in_range, extreme_logits_keep_ids_in_range);
backend_test!(gating_of_large_logits, large_logits_do_not_overflow);
backend_test!(gating_weights_descend, weights_sum_to_one_and_descend);
backend_test!(gating_is_deterministic, two_runs_have_the_same_bits);
