//! Stochastic depth: whole samples skip a residual branch on back-ends with autodiff.

use burn::tensor::backend::Backend;
use burn::tensor::{Distribution, Tensor};

/// In training, zeroes the branch of each sample with probability `p`, and scales the others by
/// `1 / (1 − p)`.
///
/// # Shapes
/// `x` and result: `[batch · tokens, dim]`
pub fn drop_path<B: Backend>(x: Tensor<B, 2>, batch: usize, p: f64) -> Tensor<B, 2> {
    if p == 0.0 || batch == 0 || !B::ad_enabled(&x.device()) {
        return x;
    }
    let [rows, dim] = x.dims();
    let keep = 1.0 - p;
    let mask = Tensor::<B, 3>::random([batch, 1, 1], Distribution::Bernoulli(keep), &x.device())
        .div_scalar(keep);
    (x.reshape([batch, rows / batch, dim]) * mask).reshape([rows, dim])
}
