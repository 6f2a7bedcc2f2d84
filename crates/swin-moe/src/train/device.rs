//! Small talk with the device: uploads, reads and health checks.

use burn::tensor::backend::Backend;
use burn::tensor::{Tensor, TensorData};

use super::error::{Result, TrainError};
use super::loss::Targets;
use super::params::{HostTensor, read_tensor};
use crate::data::Batch;

/// Copies a batch to the device: images `[batch, channels, height, width]`, and what they show.
pub(super) fn upload<B: Backend>(batch: Batch, device: &B::Device) -> (Tensor<B, 4>, Targets<B>) {
    let classes = |labels: &[u32]| {
        let labels: Vec<i32> = labels.iter().map(|&label| label as i32).collect();
        let len = labels.len();
        Tensor::from_data(TensorData::new(labels, [len]), device)
    };
    let targets = Targets {
        labels: classes(&batch.labels),
        mixed: batch
            .partners
            .as_ref()
            .map(|partners| (classes(partners), batch.share)),
    };
    let images = TensorData::new(batch.images, batch.shape);
    (Tensor::from_data(images, device), targets)
}

/// Copies a tensor to the host; `what` names it in messages. This waits for the device.
pub(super) fn read<B: Backend, const D: usize>(
    tensor: Tensor<B, D>,
    what: &str,
) -> Result<HostTensor> {
    read_tensor(tensor).map_err(|reason| TrainError::Device {
        when: format!("while {what} were read"),
        reason,
    })
}

/// Reads a tensor of one element; this waits for the device.
pub(super) fn scalar<B: Backend>(tensor: Tensor<B, 1>) -> Result<f32> {
    let values = read(tensor, "losses")?.values;
    values.first().copied().ok_or_else(|| TrainError::Device {
        when: "while losses were read".to_owned(),
        reason: "it gave no value".to_owned(),
    })
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
