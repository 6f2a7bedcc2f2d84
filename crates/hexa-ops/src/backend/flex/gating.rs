//! Top-k softmax gating and its gradients, one token at a time.

use burn_flex::FlexTensor;

use super::element::{Matrix, Real, dims2, read_int, write, write_int};
use super::transcendental::Transcendental;
use crate::backend::RawGating;

/// Index of the largest value that is not taken; of equal values, and if none compares greater
/// (NaN), the first.
fn largest<A: Real>(values: &[A], taken: &[bool]) -> usize {
    let mut best: Option<usize> = None;
    for (e, &v) in values.iter().enumerate() {
        if !taken[e] && best.is_none_or(|b| v > values[b]) {
            best = Some(e);
        }
    }
    best.unwrap_or(0)
}

/// See [`crate::ExpertKernels::topk_gating`].
pub fn topk_gating<A: Real>(
    logits: &FlexTensor,
    top_k: usize,
    normalize: bool,
) -> RawGating<FlexTensor, FlexTensor> {
    let dtype = logits.dtype();
    let [tokens, num_experts] = dims2(logits);
    let logits = Matrix::<A>::read(logits);
    let mut probs = logits.as_slice().to_vec();
    let mut weights = Vec::with_capacity(tokens * top_k);
    let mut expert_ids = Vec::with_capacity(tokens * top_k);
    let mut taken = vec![false; num_experts];

    for row in probs.chunks_exact_mut(num_experts) {
        softmax(row);
        taken.fill(false);
        let first = weights.len();
        for _ in 0..top_k {
            let e = largest(row, &taken);
            taken[e] = true;
            weights.push(row[e]);
            expert_ids.push(e as i32);
        }
        if normalize {
            let sum = clamped_sum(&weights[first..]);
            weights[first..].iter_mut().for_each(|w| *w = *w / sum);
        }
    }
    RawGating {
        probs: write(probs, [tokens, num_experts], dtype),
        weights: write(weights, [tokens, top_k], dtype),
        expert_ids: write_int(expert_ids, [tokens, top_k]),
    }
}

fn softmax<A: Real>(row: &mut [A]) {
    let max = row.iter().copied().fold(
        A::from_f64(f64::NEG_INFINITY),
        |m, v| if v > m { v } else { m },
    );
    let mut sum = A::from_f64(0.0);
    for v in row.iter_mut() {
        *v = (*v - max).exp();
        sum = sum + *v;
    }
    row.iter_mut().for_each(|v| *v = *v / sum);
}

/// A token's sum of weights, at least the accumulator's epsilon.
fn clamped_sum<A: Real>(weights: &[A]) -> A {
    let sum = weights.iter().fold(A::from_f64(0.0), |s, &w| s + w);
    let epsilon = <A as Transcendental>::EPSILON;
    if sum > epsilon { sum } else { epsilon }
}

/// See [`crate::ExpertKernels::topk_weights_backward`].
pub fn topk_weights_backward<A: Real>(
    probs: &FlexTensor,
    expert_ids: &FlexTensor,
    grad_weights: &FlexTensor,
    normalize: bool,
) -> FlexTensor {
    let dtype = probs.dtype();
    let [tokens, num_experts] = dims2(probs);
    let [_, top_k] = dims2(expert_ids);
    let probs = Matrix::<A>::read(probs);
    let ids = read_int(expert_ids);
    let grads = Matrix::<A>::read(grad_weights);
    let zero = A::from_f64(0.0);

    let mut out = vec![zero; tokens * num_experts];
    for (t, row) in out.chunks_exact_mut(num_experts).enumerate() {
        let ids = &ids[t * top_k..(t + 1) * top_k];
        let grads = &grads.as_slice()[t * top_k..(t + 1) * top_k];
        let chosen: Vec<A> = ids
            .iter()
            .map(|&e| probs.as_slice()[t * num_experts + e as usize])
            .collect();
        // w_j = p_j / S with S = max(Σ p, ε); below ε the sum is a constant.
        let (scale, shift) = if normalize {
            let sum = clamped_sum(&chosen);
            let dot = grads
                .iter()
                .zip(&chosen)
                .fold(zero, |s, (&g, &p)| s + g * p);
            let shift = if sum > A::EPSILON {
                dot / (sum * sum)
            } else {
                zero
            };
            (A::from_f64(1.0) / sum, shift)
        } else {
            (A::from_f64(1.0), zero)
        };
        for (&e, &g) in ids.iter().zip(grads) {
            row[e as usize] = g * scale - shift;
        }
    }
    write(out, [tokens, num_experts], dtype)
}

/// See [`crate::ExpertKernels::softmax_backward`].
pub fn softmax_backward<A: Real>(probs: &FlexTensor, grad: &FlexTensor) -> FlexTensor {
    let dtype = probs.dtype();
    let [tokens, num_experts] = dims2(probs);
    let probs = Matrix::<A>::read(probs);
    let grad = Matrix::<A>::read(grad);
    let mut out = grad.as_slice().to_vec();
    for (row, p) in out
        .chunks_exact_mut(num_experts)
        .zip(probs.as_slice().chunks_exact(num_experts))
    {
        let dot = row
            .iter()
            .zip(p)
            .fold(A::from_f64(0.0), |s, (&g, &p)| s + g * p);
        row.iter_mut()
            .zip(p)
            .for_each(|(g, &p)| *g = p * (*g - dot));
    }
    write(out, [tokens, num_experts], dtype)
}
