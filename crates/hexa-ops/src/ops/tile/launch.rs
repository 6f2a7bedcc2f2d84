//! Host code shared by the launchers.

use burn::tensor::{DType, Shape};
use burn_cubecl::CubeRuntime;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::ops::numeric::empty_device_contiguous_dtype;
use burn_cubecl::tensor::CubeTensor;
use cubecl::ir::AddressType;
use cubecl::prelude::*;
use cubecl::server::CubeCountSelection;

use super::kernel;
use super::plan::ELEMWISE_UNITS;

/// The tensor with neighbouring columns next to each other in memory; rows keep any stride.
pub(crate) fn with_unit_columns<R: CubeRuntime>(tensor: CubeTensor<R>) -> CubeTensor<R> {
    let last = tensor.meta.num_dims() - 1;
    if tensor.meta.shape()[last] <= 1 || tensor.meta.strides()[last] == 1 {
        tensor
    } else {
        into_contiguous(tensor)
    }
}

/// Element type of sums over elements of type `dtype`.
pub(crate) fn accumulator(dtype: DType) -> StorageType {
    match dtype {
        DType::F64 => DType::F64.into(),
        _ => DType::F32.into(),
    }
}

/// The accumulator as the element type of a tensor of partial sums.
pub(crate) fn accumulator_dtype(dtype: DType) -> DType {
    match dtype {
        DType::F64 => DType::F64,
        _ => DType::F32,
    }
}

/// The address type that reaches every element of all tensors.
pub(crate) fn address_type<R: CubeRuntime>(tensors: &[&CubeTensor<R>]) -> AddressType {
    tensors
        .iter()
        .map(|tensor| tensor.required_address_type())
        .max()
        .unwrap_or_default()
}

/// A contiguous tensor without defined values, on the device of `like`.
pub(crate) fn empty<R: CubeRuntime>(
    like: &CubeTensor<R>,
    shape: impl Into<Shape>,
    dtype: DType,
) -> CubeTensor<R> {
    empty_device_contiguous_dtype(
        like.client.clone(),
        like.device.clone(),
        shape.into(),
        dtype,
    )
}

/// A contiguous tensor of zeros, of the type and on the device of `like`.
///
/// Written from the host: it serves inputs without any row, for which there is nothing to launch.
pub(crate) fn zeros<R: CubeRuntime>(
    like: &CubeTensor<R>,
    shape: impl Into<Shape>,
) -> CubeTensor<R> {
    let shape = shape.into();
    if shape.num_elements() == 0 {
        return empty(like, shape, like.dtype);
    }
    // All bits zero is zero in every float type.
    let bytes = vec![0u8; shape.num_elements() * like.dtype.size()];
    let handle = like.client.create_from_slice(&bytes);
    CubeTensor::new_contiguous(
        like.client.clone(),
        like.device.clone(),
        shape,
        handle,
        like.dtype,
    )
}

/// At least `cubes` cubes, laid out within the device's limits; kernels skip those in excess.
pub(crate) fn cube_count<R: CubeRuntime>(client: &ComputeClient<R>, cubes: usize) -> CubeCount {
    CubeCountSelection::new(client, cubes as u32).cube_count()
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
            cube_count(&client, len.div_ceil(ELEMWISE_UNITS)),
            CubeDim::new_1d(ELEMWISE_UNITS as u32),
            address_type(&[&parts, &out]),
            parts.into_array_arg(),
            out.clone().into_array_arg(),
            len,
            num_parts,
            [dtype.into(), accumulator(dtype)],
        );
    }
    out
}
