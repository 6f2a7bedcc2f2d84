//! What a model asks of its back-end: the differentiable operators.

use burn::tensor::FloatDType;
use burn::tensor::backend::{AutodiffBackend, Backend};
use burn::tensor::ops::{FloatTensor, IntTensor};

use super::{
    EsmmArgs, ExpertKernels, FfnExecutor, FfnInputs, FfnWeights, RawExpertIndex, RawGating,
    WhenReached, dense,
};
use crate::memory::DeviceMemory;
use crate::types::{FfnOptions, MatmulPrecision, RowOrder};

/// A back-end with the expert-specific operators.
///
/// Implemented for every [`ExpertKernels`] back-end and for `Autodiff` over one. Use the checked
/// functions of [`crate::api`] rather than these methods, which trust their arguments.
pub trait ExpertOps: Backend {
    /// See [`ExpertKernels::tile_rows`].
    fn tile_rows(device: &Self::Device) -> usize;

    /// See [`ExpertKernels::topk_gating`]; `probs` and `weights` are differentiable.
    fn topk_gating(
        logits: FloatTensor<Self>,
        top_k: usize,
        normalize: bool,
    ) -> RawGating<FloatTensor<Self>, IntTensor<Self>>;

    /// See [`ExpertKernels::expert_index`].
    fn expert_index(
        expert_ids: IntTensor<Self>,
        num_experts: usize,
    ) -> RawExpertIndex<IntTensor<Self>>;

    /// See [`ExpertKernels::esmm`]; differentiable in `x`, `w` and `bias`.
    fn esmm(args: EsmmArgs<FloatTensor<Self>, IntTensor<Self>>) -> FloatTensor<Self>;

    /// See [`ExpertKernels::estmm`]; differentiable in `a` and `b`.
    fn estmm(
        a: FloatTensor<Self>,
        a_order: RowOrder,
        b: FloatTensor<Self>,
        b_order: RowOrder,
        index: RawExpertIndex<IntTensor<Self>>,
    ) -> FloatTensor<Self>;

    /// See [`ExpertKernels::ess`], without gates; differentiable in `x`.
    fn ess(
        x: FloatTensor<Self>,
        x_order: RowOrder,
        index: RawExpertIndex<IntTensor<Self>>,
    ) -> FloatTensor<Self>;

    /// See [`ExpertKernels::expert_ffn`]; differentiable in `x`, `gates` and all weights.
    fn expert_ffn(
        x: FloatTensor<Self>,
        gates: FloatTensor<Self>,
        weights: FfnWeights<FloatTensor<Self>>,
        index: RawExpertIndex<IntTensor<Self>>,
        options: FfnOptions,
        dropout_seed: Option<IntTensor<Self>>,
    ) -> FloatTensor<Self>;

    /// An expert FFN that `executor` computes, as one operation; differentiable in `x`, `gates`
    /// and all weights.
    ///
    /// # Errors
    /// The executor's.
    fn expert_ffn_by<X: FfnExecutor>(
        executor: &X,
        inputs: FfnInputs<FloatTensor<Self>, IntTensor<Self>>,
    ) -> Result<FloatTensor<Self>, X::Error>;

    /// See [`ExpertKernels::dense_matmul`]; differentiable in both.
    ///
    /// Operands may be of any float types: both are rounded to what `precision` says, and each
    /// gradient comes back in its operand's type, from sums that were not rounded in between.
    fn dense_matmul(
        lhs: FloatTensor<Self>,
        rhs: FloatTensor<Self>,
        precision: MatmulPrecision,
        out: FloatDType,
    ) -> FloatTensor<Self>;

    /// See [`ExpertKernels::gelu`]; differentiable.
    fn gelu(x: FloatTensor<Self>) -> FloatTensor<Self>;

    /// The same tensor; `then` is called whenever a backward pass has come to it.
    fn when_reached(x: FloatTensor<Self>, then: WhenReached) -> FloatTensor<Self>;

    /// See [`ExpertKernels::supports_precision`].
    fn supports_precision(device: &Self::Device, precision: MatmulPrecision) -> bool;

    /// See [`ExpertKernels::device_memory`].
    fn device_memory(device: &Self::Device) -> Option<DeviceMemory>;
}

impl<B: ExpertKernels> ExpertOps for B {
    fn tile_rows(device: &Self::Device) -> usize {
        <B as ExpertKernels>::tile_rows(device)
    }

    fn topk_gating(
        logits: FloatTensor<Self>,
        top_k: usize,
        normalize: bool,
    ) -> RawGating<FloatTensor<Self>, IntTensor<Self>> {
        <B as ExpertKernels>::topk_gating(logits, top_k, normalize)
    }

    fn expert_index(
        expert_ids: IntTensor<Self>,
        num_experts: usize,
    ) -> RawExpertIndex<IntTensor<Self>> {
        <B as ExpertKernels>::expert_index(expert_ids, num_experts)
    }

    fn esmm(args: EsmmArgs<FloatTensor<Self>, IntTensor<Self>>) -> FloatTensor<Self> {
        <B as ExpertKernels>::esmm(args)
    }

    fn estmm(
        a: FloatTensor<Self>,
        a_order: RowOrder,
        b: FloatTensor<Self>,
        b_order: RowOrder,
        index: RawExpertIndex<IntTensor<Self>>,
    ) -> FloatTensor<Self> {
        <B as ExpertKernels>::estmm(a, a_order, b, b_order, index)
    }

    fn ess(
        x: FloatTensor<Self>,
        x_order: RowOrder,
        index: RawExpertIndex<IntTensor<Self>>,
    ) -> FloatTensor<Self> {
        <B as ExpertKernels>::ess(x, x_order, None, index)
    }

    fn expert_ffn(
        x: FloatTensor<Self>,
        gates: FloatTensor<Self>,
        weights: FfnWeights<FloatTensor<Self>>,
        index: RawExpertIndex<IntTensor<Self>>,
        options: FfnOptions,
        dropout_seed: Option<IntTensor<Self>>,
    ) -> FloatTensor<Self> {
        <B as ExpertKernels>::expert_ffn(x, gates, weights, index, options, dropout_seed).output
    }

    fn expert_ffn_by<X: FfnExecutor>(
        executor: &X,
        inputs: FfnInputs<FloatTensor<Self>, IntTensor<Self>>,
    ) -> Result<FloatTensor<Self>, X::Error> {
        Ok(executor.forward::<B>(inputs, false)?.0)
    }

    fn dense_matmul(
        lhs: FloatTensor<Self>,
        rhs: FloatTensor<Self>,
        precision: MatmulPrecision,
        out: FloatDType,
    ) -> FloatTensor<Self> {
        let (lhs, rhs) = dense::operands::<B>(lhs, rhs, precision);
        <B as ExpertKernels>::dense_matmul(lhs, rhs, precision, out)
    }

    fn gelu(x: FloatTensor<Self>) -> FloatTensor<Self> {
        <B as ExpertKernels>::gelu(x)
    }

    fn when_reached(x: FloatTensor<Self>, _then: WhenReached) -> FloatTensor<Self> {
        x
    }

    fn supports_precision(device: &Self::Device, precision: MatmulPrecision) -> bool {
        <B as ExpertKernels>::supports_precision(device, precision)
    }

    fn device_memory(device: &Self::Device) -> Option<DeviceMemory> {
        <B as ExpertKernels>::device_memory(device)
    }
}

/// A back-end that trains and evaluates with the expert-specific operators.
pub trait TrainingBackend: AutodiffBackend<InnerBackend: ExpertOps> + ExpertOps {}

impl<B> TrainingBackend for B where B: AutodiffBackend<InnerBackend: ExpertOps> + ExpertOps {}
