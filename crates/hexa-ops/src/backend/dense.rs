//! The dense product as a node of Burn's graph, its operands rounded on the way in.
//!
//! Rounding is a part of the node, so that the backward pass multiplies what the forward pass
//! multiplied, saved in the narrow type, and a weight's gradient is summed in f32 and handed to an
//! f32 weight without having been rounded.

use burn::tensor::TensorMetadata;
use burn::tensor::ops::FloatTensor;
use burn::tensor::{DType, FloatDType};
use burn_autodiff::Autodiff;
use burn_autodiff::NodeId;
use burn_autodiff::checkpoint::base::Checkpointer;
use burn_autodiff::checkpoint::strategy::CheckpointStrategy;
use burn_autodiff::grads::Gradients;
use burn_autodiff::ops::{Backward, Ops, OpsKind};

use super::ExpertKernels;
use crate::types::MatmulPrecision;

/// Both operands in the type that `precision` multiplies.
pub(super) fn operands<B: ExpertKernels>(
    lhs: FloatTensor<B>,
    rhs: FloatTensor<B>,
    precision: MatmulPrecision,
) -> (FloatTensor<B>, FloatTensor<B>) {
    let dtype = precision.operand_dtype(lhs.dtype());
    (rounded::<B>(lhs, dtype), rounded::<B>(rhs, dtype))
}

fn rounded<B: ExpertKernels>(tensor: FloatTensor<B>, dtype: DType) -> FloatTensor<B> {
    if tensor.dtype() == dtype {
        tensor
    } else {
        B::float_cast(tensor, dtype.into())
    }
}

/// The product as [`ExpertKernels::dense_matmul`] gives it, in a type that it has: a gradient's
/// type may be none of the operands'.
fn product<B: ExpertKernels>(
    lhs: FloatTensor<B>,
    rhs: FloatTensor<B>,
    precision: MatmulPrecision,
    wanted: DType,
) -> FloatTensor<B> {
    let of_kernel = if wanted == DType::F32 || wanted == lhs.dtype() {
        wanted
    } else {
        lhs.dtype()
    };
    let y = <B as ExpertKernels>::dense_matmul(lhs, rhs, precision, of_kernel.into());
    rounded::<B>(y, wanted)
}

/// An operand that the backward pass reads.
#[derive(Debug, Clone)]
enum Saved<F> {
    /// The parent itself, through Burn's checkpointer.
    Parent(NodeId),
    /// Its rounded copy.
    Rounded(F),
}

/// Parents `[lhs, rhs]`.
#[derive(Debug)]
struct DenseMatmul;

#[derive(Debug, Clone)]
struct State<F> {
    lhs: Option<Saved<F>>,
    rhs: Option<Saved<F>>,
    /// Types of the parents, and so of their gradients.
    dtypes: [DType; 2],
    precision: MatmulPrecision,
}

impl<B: ExpertKernels> Backward<B, 2> for DenseMatmul {
    type State = State<FloatTensor<B>>;

    fn backward(
        self,
        ops: Ops<Self::State, 2>,
        grads: &mut Gradients,
        checkpointer: &mut Checkpointer,
    ) {
        let grad = grads.consume::<B>(&ops.node);
        let [lhs_node, rhs_node] = ops.parents;
        let State {
            lhs,
            rhs,
            dtypes: [lhs_dtype, rhs_dtype],
            precision,
        } = ops.state;
        let grad = rounded::<B>(grad, precision.operand_dtype(lhs_dtype));
        let mut transposed = |saved| {
            let tensor = match saved {
                Saved::Parent(id) => checkpointer.retrieve_node_output::<FloatTensor<B>>(id),
                Saved::Rounded(tensor) => tensor,
            };
            let rank = tensor.rank();
            B::float_swap_dims(tensor, rank - 2, rank - 1)
        };
        if let (Some(node), Some(rhs)) = (lhs_node, rhs) {
            let rhs = transposed(rhs);
            let grad = product::<B>(grad.clone(), rhs, precision, lhs_dtype);
            grads.register::<B>(node.id, grad);
        }
        if let (Some(node), Some(lhs)) = (rhs_node, lhs) {
            let lhs = transposed(lhs);
            let grad = product::<B>(lhs, grad, precision, rhs_dtype);
            grads.register::<B>(node.id, grad);
        }
    }
}

/// The product on differentiated tensors.
pub(super) fn differentiable<B: ExpertKernels, C: CheckpointStrategy>(
    lhs: FloatTensor<Autodiff<B, C>>,
    rhs: FloatTensor<Autodiff<B, C>>,
    precision: MatmulPrecision,
    out: FloatDType,
) -> FloatTensor<Autodiff<B, C>> {
    let dtypes = [lhs.primitive.dtype(), rhs.primitive.dtype()];
    let narrow = precision.operand_dtype(dtypes[0]);
    let prep = DenseMatmul
        .prepare::<C>([lhs.node.clone(), rhs.node.clone()])
        .compute_bound()
        .stateful();
    let (a, b) = operands::<B>(lhs.primitive.clone(), rhs.primitive.clone(), precision);
    let output = <B as ExpertKernels>::dense_matmul(a.clone(), b.clone(), precision, out);
    match prep {
        OpsKind::Tracked(mut prep) => {
            // An operand is kept only if the other one's gradient is wanted.
            let mut saved = |parent: &FloatTensor<Autodiff<B, C>>, copy| {
                if parent.primitive.dtype() == narrow {
                    Saved::Parent(prep.checkpoint(parent))
                } else {
                    Saved::Rounded(copy)
                }
            };
            let state = State {
                lhs: rhs.is_tracked().then(|| saved(&lhs, a)),
                rhs: lhs.is_tracked().then(|| saved(&rhs, b)),
                dtypes,
                precision,
            };
            prep.finish(state, output)
        }
        OpsKind::UnTracked(prep) => prep.finish(output),
    }
}
