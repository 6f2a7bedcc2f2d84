//! Host code shared by the launchers.

use burn::tensor::{DType, Shape};
use burn_cubecl::CubeRuntime;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::kernel;
use super::plan::ELEMWISE_UNITS;
use crate::ops::device::{accumulator, address_type, cube_per_item, empty};

/// The tensor with neighbouring columns next to each other in memory; rows keep any stride.
pub(crate) fn with_unit_columns<R: CubeRuntime>(tensor: CubeTensor<R>) -> CubeTensor<R> {
    let last = tensor.meta.num_dims() - 1;
    if tensor.meta.shape()[last] <= 1 || tensor.meta.strides()[last] == 1 {
        tensor
    } else {
        into_contiguous(tensor)
    }
}

/// Adds partial sums `[parts, …]` in order: a tensor of `shape` and type `dtype`.
pub(crate) fn sum_parts<R: CubeRuntime>(
    parts: CubeTensor<R>,
    num_parts: usize,
    shape: impl Into<Shape>,
    dtype: DType,
) -> CubeTensor<R> {
    let out = empty(&parts, shape, dtype);
    let len = out.meta.num_elements();
    let client = out.client.clone();
    // SAFETY: units at or after `len` return; `parts` has `num_parts · len` elements.
    unsafe {
        kernel::sum_parts::launch_unchecked::<R>(
            &client,
            cube_per_item(&client, len.div_ceil(ELEMWISE_UNITS)),
            CubeDim::new_1d(ELEMWISE_UNITS as u32),
            address_type(&[&parts, &out]),
            parts.into_array_arg(),
            out.clone().into_array_arg(),
            len,
            num_parts,
            [dtype.into(), accumulator(dtype).into()],
        );
    }
    out
}
