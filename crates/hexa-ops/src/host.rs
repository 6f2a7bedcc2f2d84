//! Transfers between host and device that hold for tensors without elements too.
//!
//! CubeCL 0.10's CUDA runtime refuses the strides of a tensor without elements when it is copied,
//! and then fails all later work. A batch without tokens is an ordinary input here; these
//! functions do not ask the device for what is not there.

use burn::tensor::backend::{Backend, ExecutionError};
use burn::tensor::{BasicOps, Tensor, TensorCreationOptions, TensorData};

/// A tensor's elements, in row-major order.
///
/// # Errors
/// The back-end's own, if the copy or work before it failed.
pub fn download<B, const D: usize, K>(
    tensor: Tensor<B, D, K>,
) -> core::result::Result<TensorData, ExecutionError>
where
    B: Backend,
    K: BasicOps<B>,
{
    if tensor.shape().num_elements() == 0 {
        return Ok(TensorData::from_bytes_vec(
            Vec::new(),
            tensor.shape(),
            tensor.dtype(),
        ));
    }
    tensor.try_into_data()
}

/// A tensor of this data, as [`Tensor::from_data`] makes it.
pub fn upload<B, const D: usize, K>(
    data: TensorData,
    options: impl Into<TensorCreationOptions<B>>,
) -> Tensor<B, D, K>
where
    B: Backend,
    K: BasicOps<B>,
{
    if data.num_elements() == 0 {
        return Tensor::empty(data.shape, options);
    }
    Tensor::from_data(data, options)
}
