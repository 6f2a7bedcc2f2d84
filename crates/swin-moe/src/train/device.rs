//! Small talk with the device: uploads, reads and health checks.

use burn::tensor::backend::Backend;
use burn::tensor::{Int, Tensor, TensorData};

use super::error::{Result, TrainError};
use crate::data::Batch;

/// Copies a batch to the device: images `[batch, channels, height, width]`, labels `[batch]`.
pub(super) fn upload<B: Backend>(
    batch: Batch,
    device: &B::Device,
) -> (Tensor<B, 4>, Tensor<B, 1, Int>) {
    let labels: Vec<i32> = batch.labels.iter().map(|&label| label as i32).collect();
    let len = labels.len();
    let images = TensorData::new(batch.images, batch.shape);
    (
        Tensor::from_data(images, device),
        Tensor::from_data(TensorData::new(labels, [len]), device),
    )
}

/// Reads a tensor of one element; this waits for the device.
pub(super) fn scalar<B: Backend>(tensor: Tensor<B, 1>) -> Result<f32> {
    let failed = |reason: String| TrainError::Device {
        when: "while a loss was read".to_owned(),
        reason,
    };
    let data = tensor
        .try_into_data()
        .map_err(|error| failed(error.to_string()))?;
    data.iter::<f32>()
        .next()
        .ok_or_else(|| failed("it gave no value".to_owned()))
}

/// Waits for the device and asks whether anything failed since the last time.
///
/// Failed launches are reported here alone: without the question a run would go on with rubbish.
pub(super) fn check<B: Backend>(device: &B::Device, step: u64) -> Result<()> {
    B::sync(device).map_err(|error| TrainError::Device {
        when: format!("by step {step}"),
        reason: error.to_string(),
    })
}
