//! ESMM, ESTMM and the fused expert FFN on Hopper's matrix units, for bf16 and f16.
//!
//! CubeCL 0.10 has no words for `wgmma`; these kernels are CUDA sources (`grouped.cu`,
//! `stationary.cu`, `finish.cu`) that go through CubeCL's queue and buffers like any other.
//! Contracts are those of the portable kernels ([`super::esmm`], [`super::estmm`],
//! [`super::ffn`]): same operands, same results up to rounding, sums in f32, the same bits every
//! time. What they do not cover (other devices and types, widths that are no multiple of eight)
//! they hand back, and the portable kernels run: a choice by capability and shape, the same in
//! every run.

#![allow(
    clippy::result_large_err,
    reason = "an Err hands the operands back to the caller, who goes on with them"
)]

mod ffn;
mod finish;
mod launch;
mod plan;
mod source;
mod task;

use std::any::Any;
use std::sync::atomic::{AtomicBool, Ordering};

use burn_cubecl::CubeRuntime;
use burn_cubecl::tensor::CubeTensor;
use cubecl::cuda::CudaRuntime;

use crate::backend::{EsmmArgs, FfnBackwardArgs, FfnForward, FfnGrads, FfnWeights, RawExpertIndex};
use crate::types::{FfnOptions, RowOrder};

/// Whether these kernels are passed over; see [`use_portable_kernels`].
static IS_OFF: AtomicBool = AtomicBool::new(false);

/// With `true` this process runs from now on the portable kernels alone, with `false` the faster ones
/// again where the device has them: to compare both, or to tell in which of them a fault lies. Results
/// are the same up to rounding.
///
/// ```
/// hexa_ops::use_portable_kernels(true);
/// // … operators on CUDA run the kernels that they run on Vulkan …
/// hexa_ops::use_portable_kernels(false);
/// ```
pub fn use_portable_kernels(alone: bool) {
    IS_OFF.store(alone, Ordering::Relaxed);
}

/// A tensor on CUDA.
type Tensor = CubeTensor<CudaRuntime>;

/// The value as its CUDA type, or the value itself if it is of another runtime.
fn as_cuda<A: 'static, B: 'static>(value: A) -> Result<B, A> {
    let mut slot = Some(value);
    if let Some(cuda) = (&mut slot as &mut dyn Any).downcast_mut::<Option<B>>()
        && let Some(value) = cuda.take()
    {
        return Ok(value);
    }
    match slot {
        Some(value) => Err(value),
        None => unreachable!("only the branch above takes the value"),
    }
}

/// The value as the type of runtime `R`, which is CUDA.
fn from_cuda<B: 'static, A: 'static>(value: B) -> A {
    as_cuda(value)
        .ok()
        .expect("only called for operands that came from CUDA")
}

/// Runs `kernel` if `args` are of CUDA and it accepts them; gives them back otherwise.
fn on_cuda<A: 'static, C: 'static, Out: 'static, CudaOut: 'static>(
    args: A,
    kernel: impl FnOnce(C) -> Result<CudaOut, C>,
) -> Result<Out, A> {
    match kernel(as_cuda::<A, C>(args)?) {
        Ok(out) => Ok(from_cuda(out)),
        Err(args) => Err(from_cuda(args)),
    }
}

/// [`crate::ExpertKernels::esmm`], or its arguments back.
pub(crate) fn esmm<R: CubeRuntime>(
    args: EsmmArgs<CubeTensor<R>, CubeTensor<R>>,
) -> Result<CubeTensor<R>, EsmmArgs<CubeTensor<R>, CubeTensor<R>>> {
    on_cuda(args, launch::esmm)
}

/// Operands of ESTMM.
pub(crate) struct EstmmArgs<T> {
    pub(crate) a: T,
    pub(crate) a_order: RowOrder,
    pub(crate) b: T,
    pub(crate) b_order: RowOrder,
    pub(crate) index: RawExpertIndex<T>,
}

/// [`crate::ExpertKernels::estmm`], or its arguments back.
pub(crate) fn estmm<R: CubeRuntime>(
    args: EstmmArgs<CubeTensor<R>>,
) -> Result<CubeTensor<R>, EstmmArgs<CubeTensor<R>>> {
    on_cuda(args, launch::estmm)
}

/// Operands of the fused FFN's forward pass, which has no dropout.
pub(crate) struct FfnArgs<T> {
    pub(crate) x: T,
    pub(crate) gates: T,
    pub(crate) weights: FfnWeights<T>,
    pub(crate) index: RawExpertIndex<T>,
    pub(crate) options: FfnOptions,
}

/// [`crate::ExpertKernels::expert_ffn`], or its arguments back.
pub(crate) fn expert_ffn<R: CubeRuntime>(
    args: FfnArgs<CubeTensor<R>>,
) -> Result<FfnForward<CubeTensor<R>>, FfnArgs<CubeTensor<R>>> {
    on_cuda(args, ffn::forward)
}

/// Operands of the fused FFN's backward pass.
type BackwardArgs<R> = FfnBackwardArgs<CubeTensor<R>, CubeTensor<R>>;

/// [`crate::ExpertKernels::expert_ffn_backward`], or its arguments back.
pub(crate) fn expert_ffn_backward<R: CubeRuntime>(
    args: BackwardArgs<R>,
) -> Result<FfnGrads<CubeTensor<R>>, BackwardArgs<R>> {
    on_cuda(args, ffn::backward)
}
