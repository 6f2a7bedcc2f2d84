//! An expert FFN that somebody else executes: one differentiable operation whose two passes are a
//! caller's. The parallel modes use it to communicate inside them, in an order of their own.

use core::fmt::Debug;

use burn::tensor::ops::{FloatTensor, IntTensor};
use burn_autodiff::checkpoint::base::Checkpointer;
use burn_autodiff::checkpoint::strategy::CheckpointStrategy;
use burn_autodiff::grads::Gradients;
use burn_autodiff::ops::{Backward, Ops, OpsKind};
use burn_autodiff::{Autodiff, NodeId};

use super::{ExpertKernels, FfnGrads, FfnNeeds, FfnWeights};
use crate::types::FfnOptions;

/// What an expert FFN is computed from; shapes as in [`ExpertKernels::expert_ffn`], but that
/// weights may be a part of the hidden width, of zero columns even.
#[derive(Debug, Clone)]
pub struct FfnInputs<F, I> {
    /// Tokens: `[tokens, d_model]`.
    pub x: F,
    /// Gate weights: `[tokens, top_k]`.
    pub gates: F,
    /// This device's parameters.
    pub weights: FfnWeights<F>,
    /// Chosen experts: `[tokens, top_k]`.
    pub expert_ids: I,
    /// Activation and dropout.
    pub options: FfnOptions,
    /// `[2]`, with dropout.
    pub dropout_seed: Option<I>,
}

/// Computes an expert FFN and its vector-Jacobian product on tensors without differentiation.
pub trait FfnExecutor: Clone + Debug + Send + 'static {
    /// Why a forward pass failed.
    type Error;

    /// What the backward pass needs beside the parameters.
    type Saved<B: ExpertKernels>: Clone + Debug + Send + 'static;

    /// Computes `[tokens, d_model]`; `differentiate` says whether a backward pass may follow.
    ///
    /// # Errors
    /// The executor's.
    #[allow(
        clippy::type_complexity,
        reason = "a result of two parts, which an alias over associated types would hide"
    )]
    fn forward<B: ExpertKernels>(
        &self,
        inputs: FfnInputs<FloatTensor<B>, IntTensor<B>>,
        differentiate: bool,
    ) -> Result<(FloatTensor<B>, Self::Saved<B>), Self::Error>;

    /// Gradients of everything that `needs` names, each shaped as this device's tensor.
    ///
    /// Burn's backward pass has no way to fail: an executor that fails here remembers it, returns
    /// zeros, and reports the failure when it is next called.
    fn backward<B: ExpertKernels>(
        &self,
        grad_output: FloatTensor<B>,
        weights: FfnWeights<FloatTensor<B>>,
        saved: Self::Saved<B>,
        needs: FfnNeeds,
    ) -> FfnGrads<FloatTensor<B>>;
}

/// Parents `[x, gates, w1, w2, b1, b2]`, with `x` again in the place of a missing bias.
#[derive(Debug)]
struct ExecutedFfn<X>(X);

#[derive(Debug, Clone)]
struct ExecutedFfnState<S> {
    w1: NodeId,
    b1: Option<NodeId>,
    w2: NodeId,
    b2: Option<NodeId>,
    saved: S,
}

impl<B: ExpertKernels, X: FfnExecutor> Backward<B, 6> for ExecutedFfn<X> {
    type State = ExecutedFfnState<X::Saved<B>>;

    fn backward(
        self,
        ops: Ops<Self::State, 6>,
        grads: &mut Gradients,
        checkpointer: &mut Checkpointer,
    ) {
        let grad_output = grads.consume::<B>(&ops.node);
        let [x, gates, w1, w2, b1, b2] = ops.parents;
        let state = ops.state;
        let b1 = b1.filter(|_| state.b1.is_some());
        let b2 = b2.filter(|_| state.b2.is_some());
        let mut retrieve = |id| checkpointer.retrieve_node_output::<FloatTensor<B>>(id);
        let weights = FfnWeights {
            w1: retrieve(state.w1),
            b1: state.b1.map(&mut retrieve),
            w2: retrieve(state.w2),
            b2: state.b2.map(&mut retrieve),
        };
        let needs = FfnNeeds {
            x: x.is_some(),
            gates: gates.is_some(),
            w1: w1.is_some(),
            b1: b1.is_some(),
            w2: w2.is_some(),
            b2: b2.is_some(),
        };
        let out = self
            .0
            .backward::<B>(grad_output, weights, state.saved, needs);
        let pairs = [
            (x, out.x),
            (gates, out.gates),
            (w1, out.w1),
            (w2, out.w2),
            (b1, out.b1),
            (b2, out.b2),
        ];
        for (node, grad) in pairs {
            if let (Some(node), Some(grad)) = (node, grad) {
                grads.register::<B>(node.id, grad);
            }
        }
    }
}

/// The executor's forward pass as a node of the graph.
pub(super) fn differentiable<B, C, X>(
    executor: &X,
    inputs: FfnInputs<FloatTensor<Autodiff<B, C>>, IntTensor<B>>,
) -> Result<FloatTensor<Autodiff<B, C>>, X::Error>
where
    B: ExpertKernels,
    C: CheckpointStrategy,
    X: FfnExecutor,
{
    let FfnInputs {
        x,
        gates,
        weights: FfnWeights { w1, b1, w2, b2 },
        expert_ids,
        options,
        dropout_seed,
    } = inputs;
    let node_or_x =
        |t: &Option<FloatTensor<Autodiff<B, C>>>| t.as_ref().map_or(&x.node, |t| &t.node).clone();
    let nodes = [
        x.node.clone(),
        gates.node.clone(),
        w1.node.clone(),
        w2.node.clone(),
        node_or_x(&b1),
        node_or_x(&b2),
    ];
    let inner = FfnInputs {
        x: x.primitive.clone(),
        gates: gates.primitive.clone(),
        weights: FfnWeights {
            w1: w1.primitive.clone(),
            b1: b1.as_ref().map(|b| b.primitive.clone()),
            w2: w2.primitive.clone(),
            b2: b2.as_ref().map(|b| b.primitive.clone()),
        },
        expert_ids,
        options,
        dropout_seed,
    };
    let prep = ExecutedFfn(executor.clone())
        .prepare::<C>(nodes)
        .compute_bound()
        .stateful();
    Ok(match prep {
        OpsKind::Tracked(mut prep) => {
            let (output, saved) = executor.forward::<B>(inner, true)?;
            let state = ExecutedFfnState {
                w1: prep.checkpoint(&w1),
                b1: b1.as_ref().map(|b| prep.checkpoint(b)),
                w2: prep.checkpoint(&w2),
                b2: b2.as_ref().map(|b| prep.checkpoint(b)),
                saved,
            };
            prep.finish(state, output)
        }
        OpsKind::UnTracked(prep) => prep.finish(executor.forward::<B>(inner, false)?.0),
    })
}
