//! CPU kernels on burn-flex: contiguous per-expert blocks through the `gemm` crate, rayon across
//! experts and row tiles.
//!
//! Work is cut into pieces whose sizes do not depend on the number of threads, and each piece is
//! computed by one thread: the bits of a result depend on its input alone.

mod activation;
mod element;
mod gating;
mod index;
mod matmul;
mod rows;
mod transcendental;

use burn::tensor::backend::Backend;
use burn::tensor::ops::{FloatTensor, FloatTensorOps, IntTensor};
use burn::tensor::{DType, FloatDType};
use burn_flex::Flex;

use super::{
    EsmmArgs, ExpertKernels, FfnActivationGradArgs, FfnActivationGrads, RawExpertIndex, RawGating,
};
use crate::types::{FfnOptions, MatmulPrecision, RowOrder};

/// Calls a function generic over the accumulator: f64 for f64 tensors, f32 for all others.
macro_rules! with_accumulator {
    ($tensor:expr, $($function:ident)::+, $($arg:expr),* $(,)?) => {
        match $tensor.dtype() {
            DType::F64 => $($function)::+::<f64>($($arg),*),
            _ => $($function)::+::<f32>($($arg),*),
        }
    };
}

impl ExpertKernels for Flex {
    fn tile_rows(_device: &<Self as burn::tensor::backend::BackendTypes>::Device) -> usize {
        1
    }

    fn topk_gating(
        logits: FloatTensor<Self>,
        top_k: usize,
        normalize: bool,
    ) -> RawGating<FloatTensor<Self>, IntTensor<Self>> {
        with_accumulator!(logits, gating::topk_gating, &logits, top_k, normalize)
    }

    fn topk_weights_backward(
        probs: FloatTensor<Self>,
        expert_ids: IntTensor<Self>,
        grad_weights: FloatTensor<Self>,
        normalize: bool,
    ) -> FloatTensor<Self> {
        with_accumulator!(
            probs,
            gating::topk_weights_backward,
            &probs,
            &expert_ids,
            &grad_weights,
            normalize
        )
    }

    fn softmax_backward(probs: FloatTensor<Self>, grad: FloatTensor<Self>) -> FloatTensor<Self> {
        with_accumulator!(probs, gating::softmax_backward, &probs, &grad)
    }

    fn expert_index(
        expert_ids: IntTensor<Self>,
        num_experts: usize,
    ) -> RawExpertIndex<IntTensor<Self>> {
        index::expert_index(&expert_ids, num_experts)
    }

    fn esmm(args: EsmmArgs<FloatTensor<Self>, IntTensor<Self>>) -> FloatTensor<Self> {
        with_accumulator!(args.x, matmul::esmm, args)
    }

    fn estmm(
        a: FloatTensor<Self>,
        a_order: RowOrder,
        b: FloatTensor<Self>,
        b_order: RowOrder,
        index: RawExpertIndex<IntTensor<Self>>,
    ) -> FloatTensor<Self> {
        with_accumulator!(a, matmul::estmm, &a, a_order, &b, b_order, &index)
    }

    fn ess(
        x: FloatTensor<Self>,
        x_order: RowOrder,
        gates: Option<FloatTensor<Self>>,
        index: RawExpertIndex<IntTensor<Self>>,
    ) -> FloatTensor<Self> {
        with_accumulator!(x, rows::ess, &x, x_order, gates.as_ref(), &index)
    }

    fn combine(
        y: FloatTensor<Self>,
        y_order: RowOrder,
        gates: Option<FloatTensor<Self>>,
        index: RawExpertIndex<IntTensor<Self>>,
    ) -> FloatTensor<Self> {
        with_accumulator!(y, rows::combine, &y, y_order, gates.as_ref(), &index)
    }

    fn ffn_activation(
        pre_activation: FloatTensor<Self>,
        index: RawExpertIndex<IntTensor<Self>>,
        options: FfnOptions,
        dropout_seed: Option<IntTensor<Self>>,
    ) -> FloatTensor<Self> {
        with_accumulator!(
            pre_activation,
            activation::forward,
            &pre_activation,
            &index,
            options,
            dropout_seed.as_ref()
        )
    }

    fn ffn_activation_backward(
        args: FfnActivationGradArgs<FloatTensor<Self>, IntTensor<Self>>,
    ) -> FfnActivationGrads<FloatTensor<Self>> {
        with_accumulator!(args.pre_activation, activation::backward, args)
    }

    fn dense_matmul(
        lhs: FloatTensor<Self>,
        rhs: FloatTensor<Self>,
        _precision: MatmulPrecision,
        out: FloatDType,
    ) -> FloatTensor<Self> {
        let cast = <Self as FloatTensorOps<Self>>::float_cast;
        match lhs.dtype() {
            // Burn's own product of f16 matrices rounds its sums to f16 on the way.
            DType::F16 | DType::BF16 => {
                let [lhs, rhs] = [lhs, rhs].map(|tensor| cast(tensor, FloatDType::F32));
                cast(<Self as FloatTensorOps<Self>>::float_matmul(lhs, rhs), out)
            }
            _ => <Self as FloatTensorOps<Self>>::float_matmul(lhs, rhs),
        }
    }

    fn gelu(x: FloatTensor<Self>) -> FloatTensor<Self> {
        with_accumulator!(x, activation::gelu, &x)
    }

    fn gelu_backward(x: FloatTensor<Self>, grad: FloatTensor<Self>) -> FloatTensor<Self> {
        with_accumulator!(x, activation::gelu_backward, &x, &grad)
    }

    fn supports_precision(
        _device: &<Self as burn::tensor::backend::BackendTypes>::Device,
        precision: MatmulPrecision,
    ) -> bool {
        precision != MatmulPrecision::Tf32
    }
}

/// Compile-time reminder that the blanket [`super::ExpertOps`] covers this back-end.
const _: fn() = || {
    fn assert<B: super::ExpertOps + Backend>() {}
    assert::<Flex>();
};
