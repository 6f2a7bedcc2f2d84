//! Cross entropy with label smoothing.

use burn::tensor::activation::log_softmax;
use burn::tensor::backend::Backend;
use burn::tensor::{Int, Tensor};

/// Mean over the batch of `−Σ_c q_c log softmax(logits)_c`, where `q` is `1 − smoothing` on the
/// label plus `smoothing / num_classes` everywhere.
///
/// # Shapes
/// - `logits`: `[batch, num_classes]`, float; accumulated in its own type
/// - `labels`: `[batch]`, int in `0..num_classes`
/// - result: `[1]`
pub fn cross_entropy<B: Backend>(
    logits: Tensor<B, 2>,
    labels: Tensor<B, 1, Int>,
    smoothing: f64,
) -> Tensor<B, 1> {
    let log_probs = log_softmax(logits, 1);
    let batch = log_probs.dims()[0];
    let of_label = log_probs.clone().gather(1, labels.reshape([batch, 1]));
    let label_term = of_label.mean().mul_scalar(-(1.0 - smoothing));
    if smoothing == 0.0 {
        return label_term;
    }
    // The mean over batch and classes is the batch mean of Σ_c / num_classes.
    label_term - log_probs.mean().mul_scalar(smoothing)
}
