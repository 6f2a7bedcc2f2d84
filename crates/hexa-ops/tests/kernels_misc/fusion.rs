//! Under burn-fusion the same kernels run on the same tensors: every bit is equal.

use burn::tensor::FloatDType;
use burn::tensor::ops::{FloatTensor, IntTensor};
use hexa_ops::backend::{FfnBackwardArgs, FfnNeeds, FfnWeights, RawExpertIndex};
use hexa_ops::{Activation, ExpertKernels, FfnOptions, MatmulPrecision, backend_test};

use crate::{Numbers, float, floats, int, ints, raw};

const TOKENS: usize = 13;
const EXPERTS: usize = 5;
const TOP_K: usize = 2;
const D_MODEL: usize = 11;
const D_FF: usize = 7;

/// Runs every operator once and lists all results.
fn everything<K: ExpertKernels>(options: FfnOptions, biased: bool) -> Vec<Vec<f64>> {
    let mut numbers = Numbers(14);
    let mut results = Vec::new();
    let logits = float::<K, 2>(&numbers.values(TOKENS * EXPERTS), [TOKENS, EXPERTS]);
    // An elementwise operation first, so that there is something to fuse around.
    let gating = <K as ExpertKernels>::topk_gating(raw(logits.mul_scalar(3.0)), TOP_K, true);
    let index = <K as ExpertKernels>::expert_index(gating.expert_ids.clone(), EXPERTS);
    results.push(list(ints::<K, 1>(index.positions.clone())));
    let grad_probs = K::topk_weights_backward(
        gating.probs.clone(),
        gating.expert_ids,
        gating.weights.clone(),
        true,
    );
    results.push(floats::<K, 2>(K::softmax_backward(gating.probs, grad_probs)).1);
    results.extend(ffn::<K>(
        &mut numbers,
        gating.weights,
        index,
        options,
        biased,
    ));

    let lhs = float::<K, 2>(&numbers.values(TOKENS * D_MODEL), [TOKENS, D_MODEL]);
    let rhs = float::<K, 2>(&numbers.values(D_MODEL * D_FF), [D_MODEL, D_FF]);
    let out = K::dense_matmul(raw(lhs), raw(rhs), MatmulPrecision::Strict, FloatDType::F32);
    results.push(floats::<K, 2>(out).1);
    results
}

fn list(values: Vec<usize>) -> Vec<f64> {
    values.into_iter().map(|value| value as f64).collect()
}

fn ffn<K: ExpertKernels>(
    numbers: &mut Numbers,
    gates: FloatTensor<K>,
    index: RawExpertIndex<IntTensor<K>>,
    options: FfnOptions,
    biased: bool,
) -> Vec<Vec<f64>> {
    let hidden = options.activation.hidden_width(D_FF);
    let mut weights = |shape: [usize; 3]| {
        raw(float::<K, 3>(
            &numbers.values(shape.iter().product()),
            shape,
        ))
    };
    let (w1, w2) = (
        weights([EXPERTS, D_MODEL, hidden]),
        weights([EXPERTS, D_FF, D_MODEL]),
    );
    let mut matrix = |rows, columns| {
        raw(float::<K, 2>(
            &numbers.values(rows * columns),
            [rows, columns],
        ))
    };
    let weights = FfnWeights {
        w1,
        b1: biased.then(|| matrix(EXPERTS, hidden)),
        w2,
        b2: biased.then(|| matrix(EXPERTS, D_MODEL)),
    };
    let (x, grad_output) = (matrix(TOKENS, D_MODEL), matrix(TOKENS, D_MODEL));
    let seed = (options.dropout > 0.0).then(|| int::<K, 1>(&[3, -7], [2]).into_primitive());
    let forward = <K as ExpertKernels>::expert_ffn(
        x.clone(),
        gates.clone(),
        weights.clone(),
        index.clone(),
        options,
        seed.clone(),
    );
    let needs = FfnNeeds {
        x: true,
        gates: true,
        w1: true,
        b1: biased,
        w2: false,
        b2: biased,
    };
    let grads = <K as ExpertKernels>::expert_ffn_backward(FfnBackwardArgs {
        grad_output,
        x,
        gates,
        weights,
        pre_activation: forward.pre_activation,
        index,
        options,
        dropout_seed: seed,
        needs,
    });
    assert!(grads.w2.is_none(), "what is not needed is not computed");
    let matrices = [
        Some(forward.output),
        grads.x,
        grads.gates,
        grads.b1,
        grads.b2,
    ];
    let mut results: Vec<Vec<f64>> = matrices
        .into_iter()
        .flatten()
        .map(|tensor| floats::<K, 2>(tensor).1)
        .collect();
    results.extend(grads.w1.map(|tensor| floats::<K, 3>(tensor).1));
    results
}

fn same_bits<P: ExpertKernels, F: ExpertKernels>() {
    for (activation, dropout, biased) in [
        (Activation::Gelu, 0.25, true),
        (Activation::SwiGlu, 0.0, false),
    ] {
        let options = FfnOptions {
            activation,
            dropout,
            ..FfnOptions::default()
        };
        let fused = everything::<F>(options, biased);
        let plain = everything::<P>(options, biased);
        assert_eq!(fused.len(), plain.len());
        for (i, (fused, plain)) in fused.iter().zip(&plain).enumerate() {
            // Not `assert_eq`, which would print all elements.
            assert!(
                !plain.is_empty() && fused == plain,
                "result {i}, {options:?}"
            );
        }
    }
    let device = F::Device::default();
    F::sync(&device).expect("no operation failed");
    assert_eq!(
        <F as ExpertKernels>::tile_rows(&device),
        <P as ExpertKernels>::tile_rows(&P::Device::default())
    );
}
backend_test!(fusion fusion_changes_no_bit, same_bits);
