//! The kernels on every CubeCL runtime, without fusion.

use burn_backend::DeviceOps;
use burn_cubecl::tensor::CubeTensor;
use burn_cubecl::{BoolElement, CubeBackend, CubeRuntime, FloatElement, IntElement};
use cubecl::server::ComputeServer;

use super::{
    EsmmArgs, ExpertKernels, FfnActivationGradArgs, FfnActivationGrads, RawExpertIndex, RawGating,
};
use crate::ops::tile::plan::TILE_ROWS;
use crate::ops::{activation, combine, dense, esmm, ess, estmm, gating, index};
use crate::types::{FfnOptions, MatmulPrecision, RowOrder};

impl<R, F, I, BT> ExpertKernels for CubeBackend<R, F, I, BT>
where
    R: CubeRuntime,
    R::Server: ComputeServer,
    R::Device: DeviceOps,
    F: FloatElement,
    I: IntElement,
    BT: BoolElement,
{
    fn tile_rows(_device: &Self::Device) -> usize {
        TILE_ROWS
    }

    fn topk_gating(
        logits: CubeTensor<R>,
        top_k: usize,
        normalize: bool,
    ) -> RawGating<CubeTensor<R>, CubeTensor<R>> {
        gating::launch::topk_gating(logits, top_k, normalize, I::dtype())
    }

    fn topk_weights_backward(
        probs: CubeTensor<R>,
        expert_ids: CubeTensor<R>,
        grad_weights: CubeTensor<R>,
        normalize: bool,
    ) -> CubeTensor<R> {
        gating::launch::topk_weights_backward(probs, expert_ids, grad_weights, normalize)
    }

    fn softmax_backward(probs: CubeTensor<R>, grad: CubeTensor<R>) -> CubeTensor<R> {
        gating::launch::softmax_backward(probs, grad)
    }

    fn expert_index(
        expert_ids: CubeTensor<R>,
        num_experts: usize,
    ) -> RawExpertIndex<CubeTensor<R>> {
        index::launch::expert_index(expert_ids, num_experts)
    }

    fn esmm(args: EsmmArgs<CubeTensor<R>, CubeTensor<R>>) -> CubeTensor<R> {
        esmm::launch::esmm(args)
    }

    fn estmm(
        a: CubeTensor<R>,
        a_order: RowOrder,
        b: CubeTensor<R>,
        b_order: RowOrder,
        index: RawExpertIndex<CubeTensor<R>>,
    ) -> CubeTensor<R> {
        estmm::launch::estmm(a, a_order, b, b_order, index)
    }

    fn ess(
        x: CubeTensor<R>,
        x_order: RowOrder,
        gates: Option<CubeTensor<R>>,
        index: RawExpertIndex<CubeTensor<R>>,
    ) -> CubeTensor<R> {
        ess::launch::ess(x, x_order, gates, index)
    }

    fn combine(
        y: CubeTensor<R>,
        y_order: RowOrder,
        gates: Option<CubeTensor<R>>,
        index: RawExpertIndex<CubeTensor<R>>,
    ) -> CubeTensor<R> {
        combine::launch::combine(y, y_order, gates, index)
    }

    fn ffn_activation(
        pre_activation: CubeTensor<R>,
        index: RawExpertIndex<CubeTensor<R>>,
        options: FfnOptions,
        dropout_seed: Option<CubeTensor<R>>,
    ) -> CubeTensor<R> {
        activation::launch::ffn_activation(pre_activation, index, options, dropout_seed)
    }

    fn ffn_activation_backward(
        args: FfnActivationGradArgs<CubeTensor<R>, CubeTensor<R>>,
    ) -> FfnActivationGrads<CubeTensor<R>> {
        activation::launch::ffn_activation_backward(args)
    }

    fn dense_matmul(
        lhs: CubeTensor<R>,
        rhs: CubeTensor<R>,
        precision: MatmulPrecision,
    ) -> CubeTensor<R> {
        dense::launch::dense_matmul(lhs, rhs, precision)
    }
}
