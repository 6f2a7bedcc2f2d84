//! Being told how far a backward pass has come.

use std::sync::Arc;

use burn::tensor::{Tensor, TensorPrimitive};

use super::check;
use crate::backend::{ExpertOps, WhenReached};
use crate::error::Result;

/// The same tensor, at which every backward pass that comes to it calls `then`: all that depends on
/// the tensor was differentiated before. On a device that computes while the host goes on, the work
/// has been handed to it, not done.
///
/// Never called where nothing is differentiated: without autodiff, or for a tensor that no
/// parameter had a part in.
///
/// # Shapes
/// `x` and result: any, float
///
/// # Errors
/// [`OpsError::DType`](crate::OpsError::DType) for quantised tensors.
pub fn when_reached<B: ExpertOps, const D: usize>(
    x: Tensor<B, D>,
    then: impl Fn() + Send + Sync + 'static,
) -> Result<Tensor<B, D>> {
    check::float_dtype("when_reached", "x", &x)?;
    let then = WhenReached(Arc::new(then));
    let y = B::when_reached(x.into_primitive().tensor(), then);
    Ok(Tensor::from_primitive(TensorPrimitive::Float(y)))
}
