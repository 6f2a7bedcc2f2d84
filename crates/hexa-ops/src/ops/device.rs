//! What the CubeCL launchers share: allocation, accumulator types, address types.

use burn::tensor::{DType, Shape};
use burn_cubecl::ops::numeric::{empty_device_contiguous_dtype, zeros_client};
use burn_cubecl::{CubeRuntime, kernel::into_contiguous, tensor::CubeTensor};
use cubecl::ir::AddressType;
use cubecl::prelude::{CubeCount, CubeDim};
use cubecl::{Runtime, calculate_cube_count_elemwise, client::ComputeClient};

use crate::memory::{DeviceMemory, note_with};

/// Uninitialised contiguous tensor on the device of `like`.
pub(crate) fn empty<R: CubeRuntime>(
    like: &CubeTensor<R>,
    shape: impl Into<Shape>,
    dtype: DType,
) -> CubeTensor<R> {
    note(&like.client);
    let tensor = empty_device_contiguous_dtype(
        like.client.clone(),
        like.device.clone(),
        shape.into(),
        dtype,
    );
    note(&like.client);
    tensor
}

/// What is in use on a device.
pub(crate) fn usage<R: Runtime>(client: &ComputeClient<R>) -> Option<DeviceMemory> {
    let usage = client.memory_usage().ok()?;
    Some(DeviceMemory {
        in_use_bytes: usage.bytes_in_use,
        reserved_bytes: usage.bytes_reserved,
    })
}

fn note<R: Runtime>(client: &ComputeClient<R>) {
    note_with(|| usage(client));
}

/// Contiguous tensor of zeros on the device of `like`.
pub(crate) fn zeros<R: CubeRuntime>(
    like: &CubeTensor<R>,
    shape: impl Into<Shape>,
    dtype: DType,
) -> CubeTensor<R> {
    let shape = shape.into();
    let num_elements = shape.num_elements();
    if num_elements == 0 {
        return empty(like, shape, dtype);
    }
    // Rows of a matrix may be padded, a vector's elements are not.
    let flat = zeros_client(
        like.client.clone(),
        like.device.clone(),
        Shape::new([num_elements]),
        dtype,
    );
    CubeTensor::new_contiguous(flat.client, flat.device, shape, flat.handle, dtype)
}

/// Type that sums over tensors of `dtype` are accumulated in.
pub(crate) fn accumulator(dtype: DType) -> DType {
    match dtype {
        DType::F64 => DType::F64,
        _ => DType::F32,
    }
}

/// Address type that reaches every element of `tensors`.
pub(crate) fn address_type<R: CubeRuntime>(tensors: &[&CubeTensor<R>]) -> AddressType {
    tensors
        .iter()
        .map(|tensor| tensor.required_address_type())
        .max()
        .unwrap_or_default()
}

/// Length of dimension `dim`.
pub(crate) fn dim<R: CubeRuntime>(tensor: &CubeTensor<R>, dim: usize) -> usize {
    tensor.meta.shape()[dim]
}

/// Geometry of a launch with one unit per item.
pub(crate) fn unit_per_item<R: Runtime>(
    client: &ComputeClient<R>,
    items: usize,
) -> (CubeCount, CubeDim) {
    let cube_dim = CubeDim::new(client, items);
    (
        calculate_cube_count_elemwise(client, items, cube_dim),
        cube_dim,
    )
}

/// At least `cubes` cubes, spread over the axes where one axis is too short for them.
pub(crate) fn cube_per_item<R: Runtime>(client: &ComputeClient<R>, cubes: usize) -> CubeCount {
    calculate_cube_count_elemwise(client, cubes, CubeDim::new_1d(1))
}

/// The tensor, or a copy of it, with element `i` at address `i`.
pub(crate) fn contiguous<R: CubeRuntime>(tensor: CubeTensor<R>) -> CubeTensor<R> {
    into_contiguous(tensor)
}
