//! A node of Burn's graph that changes nothing and tells when the backward pass has come to it.

use std::fmt;
use std::sync::Arc;

use burn::tensor::ops::FloatTensor;
use burn_autodiff::Autodiff;
use burn_autodiff::checkpoint::base::Checkpointer;
use burn_autodiff::checkpoint::strategy::CheckpointStrategy;
use burn_autodiff::grads::Gradients;
use burn_autodiff::ops::{Backward, Ops, OpsKind};

use super::ExpertKernels;

/// What is called.
#[derive(Clone)]
pub struct WhenReached(pub Arc<dyn Fn() + Send + Sync>);

impl fmt::Debug for WhenReached {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("WhenReached")
    }
}

#[derive(Debug)]
struct Reached;

impl<B: ExpertKernels> Backward<B, 1> for Reached {
    type State = WhenReached;

    fn backward(
        self,
        ops: Ops<Self::State, 1>,
        grads: &mut Gradients,
        _checkpointer: &mut Checkpointer,
    ) {
        let grad = grads.consume::<B>(&ops.node);
        let [parent] = ops.parents;
        if let Some(node) = parent {
            grads.register::<B>(node.id, grad);
        }
        (ops.state.0)();
    }
}

/// The identity on differentiated tensors.
pub(super) fn differentiable<B: ExpertKernels, C: CheckpointStrategy>(
    x: FloatTensor<Autodiff<B, C>>,
    then: WhenReached,
) -> FloatTensor<Autodiff<B, C>> {
    let prep = Reached
        .prepare::<C>([x.node.clone()])
        .compute_bound()
        .stateful();
    match prep {
        OpsKind::Tracked(prep) => prep.finish(then, x.primitive),
        OpsKind::UnTracked(prep) => prep.finish(x.primitive),
    }
}
