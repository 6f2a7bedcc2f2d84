//! Accuracy, loss and experts' load on the test set.

use hexa_ops::ExpertOps;

use super::device::upload;
use super::error::{Result, TrainError};
use super::params::read_tensor;
use super::tally::{LoadTally, Tally};
use crate::data::Dataset;
use crate::model::SwinMoe;

/// Sums over the test set.
#[derive(Debug, Clone, Default)]
pub struct Evaluation {
    /// Accuracy and loss.
    pub tally: Tally,
    /// Experts' load.
    pub loads: LoadTally,
}

/// Runs the model over all test images, the last partial batch included.
///
/// # Errors
/// [`TrainError`] if images cannot be read or the device fails.
pub fn evaluate<B: ExpertOps>(
    model: &SwinMoe<B>,
    data: &Dataset,
    batch_size: usize,
    device: &B::Device,
) -> Result<Evaluation> {
    let mut evaluation = Evaluation::default();
    for batch in data.test_batches(batch_size)? {
        let batch = batch?;
        let labels: Vec<usize> = batch.labels.iter().map(|&label| label as usize).collect();
        let (images, _) = upload::<B>(batch, device);
        let output = model.forward(images)?;
        let logits = read_tensor(output.logits).map_err(|reason| TrainError::Device {
            when: "while scores were read".to_owned(),
            reason,
        })?;
        evaluation.tally.add(&logits.values, &labels);
        let reports = output
            .loads
            .iter()
            .map(|load| Ok(load.read()?))
            .collect::<Result<Vec<_>>>()?;
        evaluation.loads.add(&reports);
    }
    Ok(evaluation)
}
