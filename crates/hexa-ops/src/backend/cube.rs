//! The kernels on every CubeCL runtime, without fusion.

use burn::tensor::backend::Backend;
use burn::tensor::{DType, FloatDType};
use burn_backend::DeviceOps;
use burn_cubecl::tensor::CubeTensor;
use burn_cubecl::{BoolElement, CubeBackend, CubeRuntime, FloatElement, IntElement};
use cubecl::server::ComputeServer;

use super::{
    EsmmArgs, ExpertKernels, FfnActivationGradArgs, FfnActivationGrads, RawExpertIndex, RawGating,
};
#[cfg(feature = "cuda")]
use super::{FfnBackwardArgs, FfnForward, FfnGrads, FfnWeights};
use crate::memory::DeviceMemory;
use crate::ops::device::usage;
use crate::ops::tile::plan::TILE_ROWS;
use crate::ops::{activation, combine, dense, esmm, ess, estmm, gating, gelu, index};
#[cfg(feature = "cuda")]
use crate::ops::{ffn, hopper};
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
        #[cfg(feature = "cuda")]
        let args = match hopper::esmm(args) {
            Ok(y) => return y,
            Err(args) => args,
        };
        esmm::launch::esmm(args)
    }

    fn estmm(
        a: CubeTensor<R>,
        a_order: RowOrder,
        b: CubeTensor<R>,
        b_order: RowOrder,
        index: RawExpertIndex<CubeTensor<R>>,
    ) -> CubeTensor<R> {
        #[cfg(feature = "cuda")]
        let hopper::EstmmArgs {
            a,
            a_order,
            b,
            b_order,
            index,
        } = match hopper::estmm(hopper::EstmmArgs {
            a,
            a_order,
            b,
            b_order,
            index,
        }) {
            Ok(sums) => return sums,
            Err(args) => args,
        };
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

    #[cfg(feature = "cuda")]
    fn expert_ffn(
        x: CubeTensor<R>,
        gates: CubeTensor<R>,
        weights: FfnWeights<CubeTensor<R>>,
        index: RawExpertIndex<CubeTensor<R>>,
        options: FfnOptions,
        dropout_seed: Option<CubeTensor<R>>,
    ) -> FfnForward<CubeTensor<R>> {
        match hopper::expert_ffn(hopper::FfnArgs {
            x,
            gates,
            weights,
            index,
            options,
        }) {
            Ok(forward) => forward,
            Err(args) => ffn::forward::<Self>(
                args.x,
                args.gates,
                args.weights,
                args.index,
                args.options,
                dropout_seed,
            ),
        }
    }

    #[cfg(feature = "cuda")]
    fn expert_ffn_backward(
        args: FfnBackwardArgs<CubeTensor<R>, CubeTensor<R>>,
    ) -> FfnGrads<CubeTensor<R>> {
        match hopper::expert_ffn_backward(args) {
            Ok(grads) => grads,
            Err(args) => ffn::backward::<Self>(args),
        }
    }

    fn dense_matmul(
        lhs: CubeTensor<R>,
        rhs: CubeTensor<R>,
        precision: MatmulPrecision,
        out: FloatDType,
    ) -> CubeTensor<R> {
        dense::launch::dense_matmul(lhs, rhs, precision, out.into())
    }

    fn gelu(x: CubeTensor<R>) -> CubeTensor<R> {
        gelu::launch::gelu(x)
    }

    fn gelu_backward(x: CubeTensor<R>, grad: CubeTensor<R>) -> CubeTensor<R> {
        gelu::launch::gelu_backward(x, grad)
    }

    fn supports_precision(device: &Self::Device, precision: MatmulPrecision) -> bool {
        match precision {
            MatmulPrecision::Strict => true,
            MatmulPrecision::Tf32 => dense::launch::has_tf32(&R::client(device)),
            MatmulPrecision::Bf16 => Self::supports_dtype(device, DType::BF16),
            MatmulPrecision::F16 => Self::supports_dtype(device, DType::F16),
        }
    }

    fn device_memory(device: &Self::Device) -> Option<DeviceMemory> {
        usage(&R::client(device))
    }
}
