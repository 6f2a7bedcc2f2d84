//! Accuracy, loss and experts' load on the test set.

use hexa_moe::LoadStats;
use hexa_ops::ExpertOps;

use super::classes::Confusion;
use super::device::{read, upload};
use super::error::Result;
use super::images::TestImages;
use super::ranks::Ranks;
use super::tally::{LoadTally, Tally};
use crate::model::SwinMoe;

/// Sums over the test set.
#[derive(Debug, Clone, Default)]
pub struct Evaluation {
    /// Accuracy and loss.
    pub tally: Tally,
    /// Experts' load.
    pub loads: LoadTally,
    /// What each class was taken for.
    pub confusion: Confusion,
}

/// Runs the model over all test images, the last partial batch included.
///
/// # Errors
/// [`super::TrainError`] if images cannot be read or the device fails.
pub fn evaluate<B: ExpertOps>(
    model: &SwinMoe<B>,
    images: &TestImages,
    batch_size: usize,
    device: &B::Device,
) -> Result<Evaluation> {
    evaluate_together(&Ranks::alone(), model, images, batch_size, device)
}

/// [`evaluate`] by all ranks, each its part of every batch; all have the same result.
pub(super) fn evaluate_together<B: ExpertOps>(
    ranks: &Ranks,
    model: &SwinMoe<B>,
    images: &TestImages,
    batch_size: usize,
    device: &B::Device,
) -> Result<Evaluation> {
    let mut evaluation = Evaluation::default();
    for batch in images.batches(batch_size, ranks.batch_part())? {
        let batch = batch?;
        let labels: Vec<usize> = batch.labels.iter().map(|&label| label as usize).collect();
        let output = if batch.is_empty() {
            model.forward_without_images(device)?
        } else {
            let (images, _) = upload::<B>(batch, device);
            let output = model.forward(images)?;
            let logits = read(output.logits.clone(), "scores")?;
            evaluation.tally.add(&logits.values, &labels);
            evaluation.confusion.add(&logits.values, &labels);
            output
        };
        evaluation.loads.add(&LoadStats::read_all(&output.loads)?);
    }
    evaluation.tally = ranks.sum_tally(evaluation.tally)?;
    evaluation.confusion = ranks.sum_confusion(evaluation.confusion)?;
    Ok(evaluation)
}
