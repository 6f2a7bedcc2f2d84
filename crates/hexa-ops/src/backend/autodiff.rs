//! Differentiation: the vector-Jacobian products of the operators as nodes of Burn's graph.
//!
//! What a node keeps for its backward pass is retrieved through Burn's checkpointer, so that a
//! cheap parent is recomputed under `BalancedCheckpointing`; the operators themselves are
//! compute-bound and never run twice. An operand is kept only if another operand's gradient
//! needs it and is wanted.

use burn::tensor::FloatDType;
use burn::tensor::backend::Backend;
use burn::tensor::ops::{FloatTensor, IntTensor};
use burn_autodiff::checkpoint::base::Checkpointer;
use burn_autodiff::checkpoint::strategy::CheckpointStrategy;
use burn_autodiff::grads::Gradients;
use burn_autodiff::ops::{Backward, Ops, OpsKind};
use burn_autodiff::{Autodiff, NodeId};

use super::{
    EsmmArgs, ExpertKernels, ExpertOps, FfnBackwardArgs, FfnExecutor, FfnInputs, FfnNeeds,
    FfnWeights, RawExpertIndex, RawGating, WhenReached, dense, executor, gelu, reached,
};
use crate::memory::DeviceMemory;
use crate::types::{FfnOptions, MatmulPrecision, RowOrder};

/// Reads a saved tensor back.
fn retrieve<B: Backend>(checkpointer: &mut Checkpointer, id: NodeId) -> FloatTensor<B> {
    checkpointer.retrieve_node_output::<FloatTensor<B>>(id)
}

/// Gradient of the logits through the softmax.
#[derive(Debug)]
struct Softmax;

impl<B: ExpertKernels> Backward<B, 1> for Softmax {
    type State = FloatTensor<B>;

    fn backward(
        self,
        ops: Ops<Self::State, 1>,
        grads: &mut Gradients,
        _checkpointer: &mut Checkpointer,
    ) {
        let grad = grads.consume::<B>(&ops.node);
        let [logits] = ops.parents;
        if let Some(node) = logits {
            grads.register::<B>(node.id, B::softmax_backward(ops.state, grad));
        }
    }
}

/// Gradient of the probabilities through the choice of the top k.
#[derive(Debug)]
struct TopKWeights;

impl<B: ExpertKernels> Backward<B, 1> for TopKWeights {
    type State = (FloatTensor<B>, IntTensor<B>, bool);

    fn backward(
        self,
        ops: Ops<Self::State, 1>,
        grads: &mut Gradients,
        _checkpointer: &mut Checkpointer,
    ) {
        let grad = grads.consume::<B>(&ops.node);
        let [probs_node] = ops.parents;
        let (probs, expert_ids, normalize) = ops.state;
        if let Some(node) = probs_node {
            let grad = B::topk_weights_backward(probs, expert_ids, grad, normalize);
            grads.register::<B>(node.id, grad);
        }
    }
}

/// ESMM; parents `[x, w, bias]`, with `x` again in the place of a missing bias.
#[derive(Debug)]
struct Esmm;

#[derive(Debug, Clone)]
struct EsmmState<I> {
    x: Option<NodeId>,
    w: Option<NodeId>,
    has_bias: bool,
    x_order: RowOrder,
    transposed: bool,
    out_order: RowOrder,
    index: RawExpertIndex<I>,
}

impl<B: ExpertKernels> Backward<B, 3> for Esmm {
    type State = EsmmState<IntTensor<B>>;

    fn backward(
        self,
        ops: Ops<Self::State, 3>,
        grads: &mut Gradients,
        checkpointer: &mut Checkpointer,
    ) {
        let grad = grads.consume::<B>(&ops.node);
        let [x_node, w_node, bias_node] = ops.parents;
        let state = ops.state;

        if let (Some(node), Some(w)) = (x_node, state.w) {
            let w = retrieve::<B>(checkpointer, w);
            let dx = rows_gradient::<B>(
                grad.clone(),
                state.out_order,
                w,
                !state.transposed,
                state.x_order,
                state.index.clone(),
            );
            grads.register::<B>(node.id, dx);
        }
        if let (Some(node), Some(x)) = (w_node, state.x) {
            let x = retrieve::<B>(checkpointer, x);
            let (x, dy) = ((x, state.x_order), (grad.clone(), state.out_order));
            let (a, b) = if state.transposed { (dy, x) } else { (x, dy) };
            let dw = <B as ExpertKernels>::estmm(a.0, a.1, b.0, b.1, state.index.clone());
            grads.register::<B>(node.id, dw);
        }
        if let Some(node) = bias_node.filter(|_| state.has_bias) {
            let db = <B as ExpertKernels>::ess(grad, state.out_order, None, state.index);
            grads.register::<B>(node.id, db);
        }
    }
}

/// `y · W[R]` (or with its transpose) as the gradient of rows in `order`: a token's slots are
/// summed.
fn rows_gradient<B: ExpertKernels>(
    y: FloatTensor<B>,
    y_order: RowOrder,
    w: FloatTensor<B>,
    transposed: bool,
    order: RowOrder,
    index: RawExpertIndex<IntTensor<B>>,
) -> FloatTensor<B> {
    let out_order = match order {
        RowOrder::Slot => RowOrder::Slot,
        RowOrder::Token | RowOrder::Expert => RowOrder::Expert,
    };
    let rows = <B as ExpertKernels>::esmm(EsmmArgs {
        x: y,
        x_order: y_order,
        w,
        transposed,
        bias: None,
        out_order,
        index: index.clone(),
    });
    match order {
        RowOrder::Token => B::combine(rows, out_order, None, index),
        RowOrder::Slot | RowOrder::Expert => rows,
    }
}

/// ESTMM; parents `[a, b]`.
#[derive(Debug)]
struct Estmm;

#[derive(Debug, Clone)]
struct EstmmState<I> {
    a: Option<NodeId>,
    b: Option<NodeId>,
    a_order: RowOrder,
    b_order: RowOrder,
    index: RawExpertIndex<I>,
}

impl<B: ExpertKernels> Backward<B, 2> for Estmm {
    type State = EstmmState<IntTensor<B>>;

    fn backward(
        self,
        ops: Ops<Self::State, 2>,
        grads: &mut Gradients,
        checkpointer: &mut Checkpointer,
    ) {
        // M_e = Σ a_iᵀ b_i, so da_i = b_i · dM_eᵀ and db_i = a_i · dM_e.
        let grad = grads.consume::<B>(&ops.node);
        let [a_node, b_node] = ops.parents;
        let state = ops.state;
        if let (Some(node), Some(b)) = (a_node, state.b) {
            let b = retrieve::<B>(checkpointer, b);
            let index = state.index.clone();
            let da = rows_gradient::<B>(b, state.b_order, grad.clone(), true, state.a_order, index);
            grads.register::<B>(node.id, da);
        }
        if let (Some(node), Some(a)) = (b_node, state.a) {
            let a = retrieve::<B>(checkpointer, a);
            let db = rows_gradient::<B>(a, state.a_order, grad, false, state.b_order, state.index);
            grads.register::<B>(node.id, db);
        }
    }
}

/// ESS; parent `[x]`.
#[derive(Debug)]
struct Ess;

impl<B: ExpertKernels> Backward<B, 1> for Ess {
    type State = (RowOrder, RawExpertIndex<IntTensor<B>>);

    fn backward(
        self,
        ops: Ops<Self::State, 1>,
        grads: &mut Gradients,
        _checkpointer: &mut Checkpointer,
    ) {
        // dx_i = ds[R(i)], which is ESMM of a column of ones with ds as `[experts, 1, n]`.
        let grad = grads.consume::<B>(&ops.node);
        let [x_node] = ops.parents;
        let (order, index) = ops.state;
        if let Some(node) = x_node {
            let (experts, n) = (grad_dims::<B>(&grad, 0), grad_dims::<B>(&grad, 1));
            let ones = B::float_ones(
                [index.num_slots(), 1].into(),
                &B::float_device(&grad),
                dtype_of::<B>(&grad),
            );
            let w = B::float_reshape(grad, [experts, 1, n].into());
            let dx = rows_gradient::<B>(ones, RowOrder::Expert, w, false, order, index);
            grads.register::<B>(node.id, dx);
        }
    }
}

fn grad_dims<B: Backend>(tensor: &FloatTensor<B>, dim: usize) -> usize {
    burn::tensor::TensorMetadata::shape(tensor)[dim]
}

fn dtype_of<B: Backend>(tensor: &FloatTensor<B>) -> burn::tensor::FloatDType {
    burn::tensor::TensorMetadata::dtype(tensor).into()
}

/// The fused expert FFN; parents `[x, gates, w1, w2, b1, b2]`, with `x` again in the place of a
/// missing bias.
#[derive(Debug)]
struct ExpertFfn;

#[derive(Debug, Clone)]
struct ExpertFfnState<F, I> {
    x: NodeId,
    gates: NodeId,
    w1: NodeId,
    w2: NodeId,
    b2: Option<NodeId>,
    has_b1: bool,
    pre_activation: F,
    index: RawExpertIndex<I>,
    options: FfnOptions,
    dropout_seed: Option<I>,
}

impl<B: ExpertKernels> Backward<B, 6> for ExpertFfn {
    type State = ExpertFfnState<FloatTensor<B>, IntTensor<B>>;

    fn backward(
        self,
        ops: Ops<Self::State, 6>,
        grads: &mut Gradients,
        checkpointer: &mut Checkpointer,
    ) {
        let grad_output = grads.consume::<B>(&ops.node);
        let [x, gates, w1, w2, b1, b2] = ops.parents;
        let state = ops.state;
        let b1 = b1.filter(|_| state.has_b1);
        let b2 = b2.filter(|_| state.b2.is_some());

        let out = <B as ExpertKernels>::expert_ffn_backward(FfnBackwardArgs {
            grad_output,
            x: retrieve::<B>(checkpointer, state.x),
            gates: retrieve::<B>(checkpointer, state.gates),
            weights: FfnWeights {
                w1: retrieve::<B>(checkpointer, state.w1),
                b1: None,
                w2: retrieve::<B>(checkpointer, state.w2),
                b2: state.b2.map(|id| retrieve::<B>(checkpointer, id)),
            },
            pre_activation: state.pre_activation,
            index: state.index,
            options: state.options,
            dropout_seed: state.dropout_seed,
            needs: FfnNeeds {
                x: x.is_some(),
                gates: gates.is_some(),
                w1: w1.is_some(),
                b1: b1.is_some(),
                w2: w2.is_some(),
                b2: b2.is_some(),
            },
        });
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

impl<B: ExpertKernels, C: CheckpointStrategy> ExpertOps for Autodiff<B, C> {
    fn tile_rows(device: &Self::Device) -> usize {
        <B as ExpertKernels>::tile_rows(device)
    }

    fn topk_gating(
        logits: FloatTensor<Self>,
        top_k: usize,
        normalize: bool,
    ) -> RawGating<FloatTensor<Self>, IntTensor<Self>> {
        let raw = <B as ExpertKernels>::topk_gating(logits.primitive.clone(), top_k, normalize);
        let probs = match Softmax
            .prepare::<C>([logits.node])
            .compute_bound()
            .stateful()
        {
            OpsKind::Tracked(prep) => prep.finish(raw.probs.clone(), raw.probs.clone()),
            OpsKind::UnTracked(prep) => prep.finish(raw.probs.clone()),
        };
        let weights = match TopKWeights
            .prepare::<C>([probs.node.clone()])
            .compute_bound()
            .stateful()
        {
            OpsKind::Tracked(prep) => {
                prep.finish((raw.probs, raw.expert_ids.clone(), normalize), raw.weights)
            }
            OpsKind::UnTracked(prep) => prep.finish(raw.weights),
        };
        RawGating {
            probs,
            weights,
            expert_ids: raw.expert_ids,
        }
    }

    fn expert_index(
        expert_ids: IntTensor<Self>,
        num_experts: usize,
    ) -> RawExpertIndex<IntTensor<Self>> {
        <B as ExpertKernels>::expert_index(expert_ids, num_experts)
    }

    fn esmm(args: EsmmArgs<FloatTensor<Self>, IntTensor<Self>>) -> FloatTensor<Self> {
        let EsmmArgs {
            x,
            x_order,
            w,
            transposed,
            bias,
            out_order,
            index,
        } = args;
        let bias_node = bias.as_ref().map_or(&x.node, |b| &b.node).clone();
        let prep = Esmm
            .prepare::<C>([x.node.clone(), w.node.clone(), bias_node])
            .compute_bound()
            .stateful();
        let has_bias = bias.is_some();
        let compute = |index| {
            <B as ExpertKernels>::esmm(EsmmArgs {
                x: x.primitive.clone(),
                x_order,
                w: w.primitive.clone(),
                transposed,
                bias: bias.map(|b| b.primitive),
                out_order,
                index,
            })
        };
        match prep {
            OpsKind::Tracked(mut prep) => {
                let state = EsmmState {
                    x: w.is_tracked().then(|| prep.checkpoint(&x)),
                    w: x.is_tracked().then(|| prep.checkpoint(&w)),
                    has_bias,
                    x_order,
                    transposed,
                    out_order,
                    index: index.clone(),
                };
                prep.finish(state, compute(index))
            }
            OpsKind::UnTracked(prep) => prep.finish(compute(index)),
        }
    }

    fn estmm(
        a: FloatTensor<Self>,
        a_order: RowOrder,
        b: FloatTensor<Self>,
        b_order: RowOrder,
        index: RawExpertIndex<IntTensor<Self>>,
    ) -> FloatTensor<Self> {
        let prep = Estmm
            .prepare::<C>([a.node.clone(), b.node.clone()])
            .compute_bound()
            .stateful();
        let output = <B as ExpertKernels>::estmm(
            a.primitive.clone(),
            a_order,
            b.primitive.clone(),
            b_order,
            index.clone(),
        );
        match prep {
            OpsKind::Tracked(mut prep) => {
                let state = EstmmState {
                    a: b.is_tracked().then(|| prep.checkpoint(&a)),
                    b: a.is_tracked().then(|| prep.checkpoint(&b)),
                    a_order,
                    b_order,
                    index,
                };
                prep.finish(state, output)
            }
            OpsKind::UnTracked(prep) => prep.finish(output),
        }
    }

    fn ess(
        x: FloatTensor<Self>,
        x_order: RowOrder,
        index: RawExpertIndex<IntTensor<Self>>,
    ) -> FloatTensor<Self> {
        let output = <B as ExpertKernels>::ess(x.primitive, x_order, None, index.clone());
        match Ess.prepare::<C>([x.node]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish((x_order, index), output),
            OpsKind::UnTracked(prep) => prep.finish(output),
        }
    }

    fn expert_ffn(
        x: FloatTensor<Self>,
        gates: FloatTensor<Self>,
        weights: FfnWeights<FloatTensor<Self>>,
        index: RawExpertIndex<IntTensor<Self>>,
        options: FfnOptions,
        dropout_seed: Option<IntTensor<Self>>,
    ) -> FloatTensor<Self> {
        let FfnWeights { w1, b1, w2, b2 } = weights;
        let node_or_x =
            |t: &Option<FloatTensor<Self>>| t.as_ref().map_or(&x.node, |t| &t.node).clone();
        let prep = ExpertFfn
            .prepare::<C>([
                x.node.clone(),
                gates.node.clone(),
                w1.node.clone(),
                w2.node.clone(),
                node_or_x(&b1),
                node_or_x(&b2),
            ])
            .compute_bound()
            .stateful();
        let has_b1 = b1.is_some();
        let forward = <B as ExpertKernels>::expert_ffn(
            x.primitive.clone(),
            gates.primitive.clone(),
            FfnWeights {
                w1: w1.primitive.clone(),
                b1: b1.map(|b| b.primitive),
                w2: w2.primitive.clone(),
                b2: b2.as_ref().map(|b| b.primitive.clone()),
            },
            index.clone(),
            options,
            dropout_seed.clone(),
        );
        match prep {
            OpsKind::Tracked(mut prep) => {
                let state = ExpertFfnState {
                    x: prep.checkpoint(&x),
                    gates: prep.checkpoint(&gates),
                    w1: prep.checkpoint(&w1),
                    w2: prep.checkpoint(&w2),
                    b2: b2.as_ref().map(|b2| prep.checkpoint(b2)),
                    has_b1,
                    pre_activation: forward.pre_activation,
                    index,
                    options,
                    dropout_seed,
                };
                prep.finish(state, forward.output)
            }
            OpsKind::UnTracked(prep) => prep.finish(forward.output),
        }
    }

    fn expert_ffn_by<X: FfnExecutor>(
        executor: &X,
        inputs: FfnInputs<FloatTensor<Self>, IntTensor<Self>>,
    ) -> Result<FloatTensor<Self>, X::Error> {
        executor::differentiable::<B, C, X>(executor, inputs)
    }

    fn dense_matmul(
        lhs: FloatTensor<Self>,
        rhs: FloatTensor<Self>,
        precision: MatmulPrecision,
        out: FloatDType,
    ) -> FloatTensor<Self> {
        dense::differentiable::<B, C>(lhs, rhs, precision, out)
    }

    fn gelu(x: FloatTensor<Self>) -> FloatTensor<Self> {
        gelu::differentiable::<B, C>(x)
    }

    fn when_reached(x: FloatTensor<Self>, then: WhenReached) -> FloatTensor<Self> {
        reached::differentiable::<B, C>(x, then)
    }

    fn supports_precision(device: &Self::Device, precision: MatmulPrecision) -> bool {
        <B as ExpertKernels>::supports_precision(device, precision)
    }

    fn device_memory(device: &Self::Device) -> Option<DeviceMemory> {
        <B as ExpertKernels>::device_memory(device)
    }
}
