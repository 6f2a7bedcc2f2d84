//! Host's side of the gating.

use burn::tensor::DType;
use burn_cubecl::{CubeRuntime, kernel::into_contiguous, tensor::CubeTensor};
use cubecl::prelude::InputScalar;

use super::kernel::{softmax_vjp, topk_softmax, topk_weights_vjp};
use crate::backend::RawGating;
use crate::ops::device::{accumulator, address_type, dim, empty, unit_per_item};

/// Top-k softmax gating; contract in [`crate::ExpertKernels::topk_gating`].
///
/// # Shapes
/// - `logits`: `[tokens, num_experts]`, float; arithmetic in f32, in f64 for f64
/// - results: probs `[tokens, num_experts]`, weights and expert ids (`int_dtype`)
///   `[tokens, top_k]`
pub fn topk_gating<R: CubeRuntime>(
    logits: CubeTensor<R>,
    top_k: usize,
    normalize: bool,
    int_dtype: DType,
) -> RawGating<CubeTensor<R>, CubeTensor<R>> {
    let (tokens, num_experts) = (dim(&logits, 0), dim(&logits, 1));
    let dtype = logits.dtype;
    let gating = RawGating {
        probs: empty(&logits, [tokens, num_experts], dtype),
        weights: empty(&logits, [tokens, top_k], dtype),
        expert_ids: empty(&logits, [tokens, top_k], int_dtype),
    };
    if tokens == 0 {
        return gating;
    }
    let client = logits.client.clone();
    let (cube_count, cube_dim) = unit_per_item(&client, tokens);
    let (row_stride, step) = (logits.meta.strides()[0], logits.meta.strides()[1]);
    let address = address_type(&[&logits, &gating.probs, &gating.weights, &gating.expert_ids]);
    // SAFETY: units past the last token leave at once; chosen ids are below `num_experts` for
    // any logits; the outputs have the shapes that the indices are computed from.
    unsafe {
        topk_softmax::launch_unchecked(
            &client,
            cube_count,
            cube_dim,
            address,
            logits.into_array_arg(),
            gating.probs.clone().into_array_arg(),
            gating.weights.clone().into_array_arg(),
            gating.expert_ids.clone().into_array_arg(),
            tokens,
            num_experts,
            row_stride,
            step,
            top_k,
            epsilon(dtype),
            normalize,
            [dtype.into(), accumulator(dtype).into(), int_dtype.into()],
        );
    }
    gating
}

/// Gradient of the probabilities from that of the weights; contract in
/// [`crate::ExpertKernels::topk_weights_backward`].
///
/// # Shapes
/// - `probs`: `[tokens, num_experts]`, float
/// - `expert_ids`, `grad_weights`: `[tokens, top_k]`
pub fn topk_weights_backward<R: CubeRuntime>(
    probs: CubeTensor<R>,
    expert_ids: CubeTensor<R>,
    grad_weights: CubeTensor<R>,
    normalize: bool,
) -> CubeTensor<R> {
    let (tokens, num_experts) = (dim(&probs, 0), dim(&probs, 1));
    let dtype = probs.dtype;
    let grad_probs = empty(&probs, [tokens, num_experts], dtype);
    let num_elements = tokens * num_experts;
    if num_elements == 0 {
        return grad_probs;
    }
    let client = probs.client.clone();
    let top_k = dim(&expert_ids, 1);
    let [probs, expert_ids, grad_weights] = [probs, expert_ids, grad_weights].map(into_contiguous);
    let (cube_count, cube_dim) = unit_per_item(&client, num_elements);
    let address = address_type(&[&probs, &expert_ids, &grad_weights, &grad_probs]);
    let dtypes = [
        dtype.into(),
        accumulator(dtype).into(),
        expert_ids.dtype.into(),
    ];
    // SAFETY: units past the last element leave at once; ids are clamped into range.
    unsafe {
        topk_weights_vjp::launch_unchecked(
            &client,
            cube_count,
            cube_dim,
            address,
            probs.into_array_arg(),
            expert_ids.into_array_arg(),
            grad_weights.into_array_arg(),
            grad_probs.clone().into_array_arg(),
            num_elements,
            num_experts,
            top_k,
            epsilon(dtype),
            normalize,
            dtypes,
        );
    }
    grad_probs
}

/// Gradient of the logits from that of the probabilities; contract in
/// [`crate::ExpertKernels::softmax_backward`].
///
/// # Shapes
/// - `probs`, `grad`: `[tokens, num_experts]`, float
pub fn softmax_backward<R: CubeRuntime>(
    probs: CubeTensor<R>,
    grad: CubeTensor<R>,
) -> CubeTensor<R> {
    let (tokens, num_experts) = (dim(&probs, 0), dim(&probs, 1));
    let dtype = probs.dtype;
    let grad_logits = empty(&probs, [tokens, num_experts], dtype);
    if tokens == 0 {
        return grad_logits;
    }
    let client = probs.client.clone();
    let [probs, grad] = [probs, grad].map(into_contiguous);
    let (cube_count, cube_dim) = unit_per_item(&client, tokens);
    let address = address_type(&[&probs, &grad, &grad_logits]);
    // SAFETY: units past the last token leave at once; all three tensors have one shape.
    unsafe {
        softmax_vjp::launch_unchecked(
            &client,
            cube_count,
            cube_dim,
            address,
            probs.into_array_arg(),
            grad.into_array_arg(),
            grad_logits.clone().into_array_arg(),
            tokens,
            num_experts,
            [dtype.into(), accumulator(dtype).into()],
        );
    }
    grad_logits
}

/// Smallest divisor of a normalisation: the epsilon of the accumulator's type, in that type.
fn epsilon(dtype: DType) -> InputScalar {
    let accumulator = accumulator(dtype);
    let epsilon = match accumulator {
        DType::F64 => f64::EPSILON,
        _ => f64::from(f32::EPSILON),
    };
    InputScalar::new(epsilon, accumulator)
}
