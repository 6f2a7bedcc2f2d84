//! Host's side of GELU.

use burn_cubecl::{CubeRuntime, tensor::CubeTensor};

use super::kernel;
use crate::ops::device::{accumulator, address_type, contiguous, empty, unit_per_item};

/// Contract in [`crate::ExpertKernels::gelu`].
pub fn gelu<R: CubeRuntime>(x: CubeTensor<R>) -> CubeTensor<R> {
    let out = empty(&x, x.meta.shape().clone(), x.dtype);
    let num_elements = out.meta.num_elements();
    if num_elements == 0 {
        return out;
    }
    let x = contiguous(x);
    let (cube_count, cube_dim) = unit_per_item(&out.client, num_elements);
    let dtypes = [x.dtype.into(), accumulator(x.dtype).into()];
    // SAFETY: units past the last element leave at once; both tensors are contiguous and of one
    // shape.
    unsafe {
        kernel::forward::launch_unchecked(
            &out.client,
            cube_count,
            cube_dim,
            address_type(&[&x, &out]),
            x.into_array_arg(),
            out.clone().into_array_arg(),
            num_elements,
            dtypes,
        );
    }
    out
}

/// Contract in [`crate::ExpertKernels::gelu_backward`].
pub fn gelu_backward<R: CubeRuntime>(x: CubeTensor<R>, grad: CubeTensor<R>) -> CubeTensor<R> {
    let out = empty(&x, x.meta.shape().clone(), x.dtype);
    let num_elements = out.meta.num_elements();
    if num_elements == 0 {
        return out;
    }
    let (x, grad) = (contiguous(x), contiguous(grad));
    let (cube_count, cube_dim) = unit_per_item(&out.client, num_elements);
    let dtypes = [x.dtype.into(), accumulator(x.dtype).into()];
    // SAFETY: as above.
    unsafe {
        kernel::backward::launch_unchecked(
            &out.client,
            cube_count,
            cube_dim,
            address_type(&[&x, &grad, &out]),
            x.into_array_arg(),
            grad.into_array_arg(),
            out.clone().into_array_arg(),
            num_elements,
            dtypes,
        );
    }
    out
}
