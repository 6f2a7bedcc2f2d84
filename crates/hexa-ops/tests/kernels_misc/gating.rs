//! Top-k softmax gating and its gradients.

use hexa_ops::testing::oracle::{gating_backward, topk_gating};
use hexa_ops::{ExpertKernels, backend_test};

use crate::{Numbers, assert_close, float, floats, int, ints, raw};

const SHAPES: [[usize; 3]; 6] = [
    [1, 1, 1],
    [1, 3, 1],
    [5, 4, 4],
    [37, 7, 2],
    [130, 8, 2],
    [65, 67, 5],
];
const TOLERANCE: [f64; 2] = [1e-7, 2e-6];

fn forward<K: ExpertKernels>() {
    let mut numbers = Numbers(2);
    for [tokens, num_experts, top_k] in SHAPES {
        for normalize in [false, true] {
            let logits: Vec<f64> = numbers
                .values(tokens * num_experts)
                .iter()
                .map(|v| 4.0 * v)
                .collect();
            let expected = topk_gating(&logits, num_experts, top_k, normalize);
            let gating = <K as ExpertKernels>::topk_gating(
                raw(float::<K, 2>(&logits, [tokens, num_experts])),
                top_k,
                normalize,
            );
            assert_eq!(ints::<K, 2>(gating.expert_ids), expected.expert_ids);
            let (shape, probs) = floats::<K, 2>(gating.probs);
            assert_eq!(shape, [tokens, num_experts]);
            assert_close("probs", &probs, &expected.probs, TOLERANCE);
            let (shape, weights) = floats::<K, 2>(gating.weights);
            assert_eq!(shape, [tokens, top_k]);
            assert_close("weights", &weights, &expected.weights, TOLERANCE);
        }
    }
}
backend_test!(kernels gating_equals_the_definition, forward);

fn ties<K: ExpertKernels>() {
    let logits = [
        1.0, 3.0, 3.0, 1.0, 3.0, 2.0, 0.0, -0.0, 0.0, -1.0, 0.0, -0.0,
    ];
    let gating = <K as ExpertKernels>::topk_gating(raw(float::<K, 2>(&logits, [2, 6])), 4, false);
    assert_eq!(ints::<K, 2>(gating.expert_ids), [1, 2, 4, 5, 0, 1, 2, 4]);
}
backend_test!(kernels of_equal_logits_the_lower_id_comes_first, ties);

fn views<K: ExpertKernels>() {
    let mut numbers = Numbers(3);
    let values = numbers.values(5 * 9);
    let view = float::<K, 2>(&values, [5, 9])
        .transpose()
        .slice([1..8, 0..5]);
    let copy: Vec<f64> = view.clone().into_data().iter::<f64>().collect();
    let expected = topk_gating(&copy, 5, 2, true);
    let gating = <K as ExpertKernels>::topk_gating(raw(view), 2, true);
    assert_eq!(ints::<K, 2>(gating.expert_ids), expected.expert_ids);
    let (_, weights) = floats::<K, 2>(gating.weights);
    assert_close("weights", &weights, &expected.weights, TOLERANCE);
}
backend_test!(kernels logits_may_have_any_strides, views);

fn not_a_number<K: ExpertKernels>() {
    let logits = [f64::NAN; 8];
    let gating = <K as ExpertKernels>::topk_gating(raw(float::<K, 2>(&logits, [2, 4])), 3, true);
    for ids in ints::<K, 2>(gating.expert_ids).chunks(3) {
        assert!(ids.iter().all(|&id| id < 4), "{ids:?}");
    }
    let (_, probs) = floats::<K, 2>(gating.probs);
    assert!(probs.iter().all(|p| p.is_nan()), "{probs:?}");
}
backend_test!(kernels not_a_number_stays_one_and_ids_stay_in_range, not_a_number);

fn no_tokens<K: ExpertKernels>() {
    let gating = <K as ExpertKernels>::topk_gating(raw(float::<K, 2>(&[], [0, 4])), 2, true);
    assert_eq!(floats::<K, 2>(gating.probs).0, [0, 4]);
    assert!(ints::<K, 2>(gating.expert_ids).is_empty());
}
backend_test!(kernels no_tokens_give_empty_results, no_tokens);

fn backward<K: ExpertKernels>() {
    let mut numbers = Numbers(4);
    for [tokens, num_experts, top_k] in SHAPES {
        for normalize in [false, true] {
            let logits = numbers.values(tokens * num_experts);
            let gating = topk_gating(&logits, num_experts, top_k, normalize);
            let grad_probs = numbers.values(tokens * num_experts);
            let grad_weights = numbers.values(tokens * top_k);
            let expected =
                gating_backward(&gating, num_experts, normalize, &grad_probs, &grad_weights);

            let probs = float::<K, 2>(&gating.probs, [tokens, num_experts]);
            let ids: Vec<i64> = gating.expert_ids.iter().map(|&id| id as i64).collect();
            let of_weights = K::topk_weights_backward(
                raw(probs.clone()),
                int::<K, 2>(&ids, [tokens, top_k]).into_primitive(),
                raw(float::<K, 2>(&grad_weights, [tokens, top_k])),
                normalize,
            );
            let grad_probs = float::<K, 2>(&grad_probs, [tokens, num_experts]);
            let sum = K::float_add(raw(grad_probs), of_weights);
            let (shape, got) = floats::<K, 2>(K::softmax_backward(raw(probs), sum));
            assert_eq!(shape, [tokens, num_experts]);
            assert_close("grad_logits", &got, &expected, [1e-6, 1e-5]);
        }
    }
}
backend_test!(kernels gating_gradients_are_those_of_the_jacobians, backward);
