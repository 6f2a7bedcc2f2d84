//! Cross entropy with label smoothing.

use burn::tensor::activation::log_softmax;
use burn::tensor::backend::Backend;
use burn::tensor::{Int, Tensor};

/// What a batch of images shows.
#[derive(Debug, Clone)]
pub struct Targets<B: Backend> {
    /// Class of each image: `[batch]`.
    pub labels: Tensor<B, 1, Int>,
    /// Class of what was mixed into each image, `[batch]`, and the share of the image itself.
    pub mixed: Option<(Tensor<B, 1, Int>, f32)>,
}

/// Mean over the batch of `−Σ_c q_c log softmax(logits)_c`, where `q` is `1 − smoothing` on the
/// label plus `smoothing / num_classes` everywhere; of a mixed image, the label's part is shared
/// between both classes.
///
/// # Shapes
/// - `logits`: `[batch, num_classes]`, float; accumulated in its own type
/// - `targets`: in `0..num_classes`
/// - result: `[1]`
pub fn cross_entropy<B: Backend>(
    logits: Tensor<B, 2>,
    targets: Targets<B>,
    smoothing: f64,
) -> Tensor<B, 1> {
    let log_probs = log_softmax(logits, 1);
    let batch = log_probs.dims()[0];
    let mean_of = |labels: Tensor<B, 1, Int>| {
        log_probs
            .clone()
            .gather(1, labels.reshape([batch, 1]))
            .mean()
    };
    // The loss is linear in the target.
    let of_labels = match targets.mixed {
        Some((partners, share)) => {
            mean_of(targets.labels).mul_scalar(share)
                + mean_of(partners).mul_scalar(1.0 - f64::from(share))
        }
        None => mean_of(targets.labels),
    };
    let label_term = of_labels.mul_scalar(-(1.0 - smoothing));
    if smoothing == 0.0 {
        return label_term;
    }
    // The mean over batch and classes is the batch mean of Σ_c / num_classes.
    label_term - log_probs.mean().mul_scalar(smoothing)
}
