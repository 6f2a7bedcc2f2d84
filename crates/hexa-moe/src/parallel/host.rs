//! Tensors to host memory and back.

use burn::tensor::backend::Backend;
use burn::tensor::ops::{FloatTensor, IntTensor};
use burn::tensor::{DType, Int, Shape, Tensor, TensorData, TensorMetadata, try_read_sync};
use hexa_ops::OpsError;

use crate::error::{MoeError, Result};

/// A tensor's elements in f32, row-major. This waits for the device.
pub fn read<B: Backend>(tensor: FloatTensor<B>, name: &'static str) -> Result<Vec<f32>> {
    if tensor.shape().num_elements() == 0 {
        return Ok(Vec::new());
    }
    let failed = |reason: String| {
        MoeError::Ops(OpsError::Device {
            tensor: name,
            reason,
        })
    };
    let data = try_read_sync(B::float_into_data(tensor))
        .ok_or_else(|| failed("the back-end cannot be read synchronously".to_owned()))?
        .map_err(|error| failed(error.to_string()))?;
    data.convert::<f32>()
        .into_vec::<f32>()
        .map_err(|error| failed(format!("{error:?}")))
}

/// A tensor of these elements, rounded to `dtype`.
pub fn write<B: Backend>(
    data: Vec<f32>,
    shape: impl Into<Shape>,
    dtype: DType,
    device: &B::Device,
) -> FloatTensor<B> {
    let shape = shape.into();
    if shape.num_elements() == 0 {
        return B::float_empty(shape, device, dtype.into());
    }
    let tensor = B::float_from_data(TensorData::new(data, shape), device);
    if dtype == DType::F32 {
        tensor
    } else {
        B::float_cast(tensor, dtype.into())
    }
}

/// Expert ids as they are sent.
pub fn read_ids<B: Backend>(ids: Tensor<B, 2, Int>) -> Result<Vec<u32>> {
    if ids.shape().num_elements() == 0 {
        return Ok(Vec::new());
    }
    let data = ids.try_into_data().map_err(|error| {
        MoeError::Ops(OpsError::Device {
            tensor: "expert_ids",
            reason: error.to_string(),
        })
    })?;
    // Ids are of a router's choices, and thus within 0..num_experts.
    Ok(data.iter::<i64>().map(|id| id as u32).collect())
}

/// Expert ids as the kernels take them.
pub fn write_ids<B: Backend>(
    ids: Vec<u32>,
    [tokens, top_k]: [usize; 2],
    device: &B::Device,
) -> IntTensor<B> {
    let ids: Vec<i32> = ids.into_iter().map(|id| id as i32).collect();
    Tensor::<B, 2, Int>::from_data(TensorData::new(ids, [tokens, top_k]), device).into_primitive()
}
