//! The fused FFN in few launches: two forward, five backward, and sums over the choices.
//!
//! The first product stores pre-activation and activation; the second adds the bias, multiplies
//! with the gate weight and, with one choice per token, writes the result's rows. Backward, the
//! product with `W2ᵀ` ends with the activation's gradient, writes the pre-activation's gradient
//! over the pre-activation if nobody else holds it, and leaves a share of the gate weights'
//! gradient for each column tile and, where rows stay in shared memory, of the bias' for every 16
//! rows. With one choice per token, or if memory is favored, it is done in two pieces of the hidden
//! width, and if memory is favored with more choices the forward pass in two windows of positions, so
//! that only half of the activations are there at one time.

use std::ops::Range;

use burn::tensor::DType;

use super::finish::{add_slabs, gate_gradient, prepared_rows, slabs};
use super::launch::{
    Rows, accepts, contiguous_index, multiprocessors, packed, rows_aligned, slice, sums, sums_into,
};
use super::plan::{first_window, gradient_piece};
use super::source::{Epilogue, Schedule};
use super::{FfnArgs, Tensor};
use crate::backend::{FfnBackwardArgs, FfnForward, FfnGrads, FfnWeights, RawExpertIndex};
use crate::ops::combine::launch::combine;
use crate::ops::device::empty;
use crate::ops::ess::launch::ess;
use crate::types::RowOrder;

/// Order in which one row per slot is written, so that a token's rows are its result or lie
/// together.
fn result_order(index: &RawExpertIndex<Tensor>) -> RowOrder {
    if index.top_k == 1 {
        RowOrder::Token
    } else {
        RowOrder::Slot
    }
}

/// The sum of each token's rows, which are in [`result_order`].
fn add_choices(rows: Tensor, index: RawExpertIndex<Tensor>) -> Tensor {
    if index.top_k == 1 {
        rows
    } else {
        combine(rows, RowOrder::Slot, None, index)
    }
}

/// See [`super::expert_ffn`].
pub(super) fn forward(args: FfnArgs<Tensor>) -> Result<FfnForward<Tensor>, FfnArgs<Tensor>> {
    let d_model = args.weights.w1.meta.shape()[1];
    let width = args.weights.w1.meta.shape()[2];
    let d_ff = args.weights.w2.meta.shape()[1];
    if args.options.dropout > 0.0 || !accepts(&args.x, &[d_model, d_ff, width], &args.index) {
        return Err(args);
    }
    let index = contiguous_index(args.index);
    let num_slots = index.num_slots();
    let (x, x_order) = prepared_rows(args.x, d_ff, &index);
    let gates = packed(args.gates);
    let FfnWeights { w1, b1, w2, b2 } = args.weights;
    let (w1, w2) = (rows_aligned(w1), rows_aligned(w2));
    let (b1, b2) = (b1.map(rows_aligned), b2.map(rows_aligned));

    let pre_activation = empty(&x, [num_slots, width], x.dtype);
    let rows = empty(&x, [num_slots, d_model], x.dtype);
    let run = |x: Tensor, window: Range<usize>| {
        let activated = empty(&x, [window.len(), d_ff], x.dtype);
        let first = Rows {
            a: &x,
            a_order: x_order,
            w: &w1,
            transposed: false,
            bias: b1.as_ref(),
            gates: None,
            index: &index,
            window: window.clone(),
            out_order: RowOrder::Expert,
        };
        first.launch(
            Epilogue::Activate(args.options.activation),
            &[&activated, &pre_activation],
        );
        drop(x);
        let second = Rows {
            a: &activated,
            a_order: RowOrder::Expert,
            w: &w2,
            transposed: false,
            bias: b2.as_ref(),
            gates: Some(&gates),
            index: &index,
            window,
            out_order: result_order(&index),
        };
        second.launch(Epilogue::Store, &[&rows]);
    };
    let cut = first_window(
        args.options.favor,
        (num_slots, index.top_k),
        index.num_experts,
        (d_model, d_ff),
        multiprocessors(&x),
    );
    if cut > 0 {
        run(x.clone(), 0..cut);
    }
    run(x, cut..num_slots);
    Ok(FfnForward {
        output: add_choices(rows, index),
        pre_activation,
    })
}

/// See [`super::expert_ffn_backward`].
pub(super) fn backward(
    args: FfnBackwardArgs<Tensor, Tensor>,
) -> Result<FfnGrads<Tensor>, FfnBackwardArgs<Tensor, Tensor>> {
    let d_model = args.weights.w1.meta.shape()[1];
    let width = args.weights.w1.meta.shape()[2];
    let d_ff = args.weights.w2.meta.shape()[1];
    if args.options.dropout > 0.0 || !accepts(&args.x, &[d_model, d_ff, width], &args.index) {
        return Err(args);
    }
    let index = contiguous_index(args.index);
    let num_slots = index.num_slots();
    let needs = args.needs;
    let grad_output = rows_aligned(args.grad_output);
    let gates = packed(args.gates);
    let mut grads = FfnGrads {
        x: None,
        gates: None,
        w1: None,
        b1: None,
        w2: None,
        b2: None,
    };
    // With the gate weights' gradient the bias' is a by-product.
    if needs.b2 && !needs.gates {
        let dy = grad_output.clone();
        grads.b2 = Some(ess(dy, RowOrder::Token, Some(gates.clone()), index.clone()));
    }
    if !(needs.x || needs.gates || needs.w1 || needs.b1 || needs.w2) {
        return Ok(grads);
    }

    let w2 = rows_aligned(args.weights.w2);
    let (grad_rows, grad_order) = prepared_rows(grad_output.clone(), d_ff, &index);
    let pre_activation = packed(args.pre_activation);
    let grad_pre = if pre_activation.can_mut() {
        pre_activation.clone()
    } else {
        empty(&pre_activation, [num_slots, width], pre_activation.dtype)
    };
    let piece = gradient_piece(
        args.options.favor,
        (num_slots, index.top_k),
        index.num_experts,
        (d_model, d_ff),
    );
    let w2_piece = slice(&w2, 1, 0, piece);
    let through = Rows {
        a: &grad_rows,
        a_order: grad_order,
        w: &w2_piece,
        transposed: true,
        bias: None,
        gates: Some(&gates),
        index: &index,
        window: 0..num_slots,
        out_order: RowOrder::Expert,
    };
    let vjp = |sums_bias| Epilogue::ActivateVjp {
        activation: args.options.activation,
        sums_bias,
    };
    let (tile, schedule) = through.schedule(vjp(false));
    let sums_bias = needs.b1 && schedule != Schedule::Ring;
    let tiles = piece.div_ceil(tile.columns);
    let gate_parts = empty(&grad_output, [d_ff / piece * tiles, num_slots], DType::F32);
    if needs.w2 {
        let shape = [index.num_experts, d_ff, d_model];
        grads.w2 = Some(empty(&grad_output, shape, grad_output.dtype));
    }
    if sums_bias {
        let shape = [index.num_experts, width];
        grads.b1 = Some(empty(&grad_output, shape, grad_output.dtype));
    }
    for start in (0..d_ff).step_by(piece) {
        let weighted = empty(&grad_output, [num_slots, piece], grad_output.dtype);
        let columns = |tensor| slice(tensor, 1, start * width / d_ff, piece * width / d_ff);
        let parts = slice(&gate_parts, 0, start / piece * tiles, tiles);
        let w = slice(&w2, 1, start, piece);
        let through = Rows {
            w: &w,
            ..through.clone()
        };
        let bias_slabs = sums_bias.then(|| slabs(&grad_output, &index, piece));
        let (h, grad_h) = (columns(&pre_activation), columns(&grad_pre));
        let mut buffers = vec![&h, &parts];
        buffers.extend(&bias_slabs);
        buffers.extend([&weighted, &grad_h]);
        through.launch(vjp(sums_bias), &buffers);
        if let (Some(slabs), Some(b1)) = (bias_slabs, &grads.b1) {
            add_slabs(&slabs, &index, &columns(b1));
        }
        if let Some(w2) = &grads.w2 {
            let out = slice(w2, 1, start, piece);
            sums_into(&grad_rows, grad_order, &weighted, &index, true, &out);
        }
    }
    drop((pre_activation, grad_rows));

    if needs.gates {
        let bias = args.weights.b2.map(rows_aligned);
        let out = empty(&gates, [index.tokens, index.top_k], gates.dtype);
        if needs.b2 {
            let shape = [index.num_experts, d_model];
            grads.b2 = Some(empty(&grad_output, shape, grad_output.dtype));
        }
        gate_gradient(
            &gate_parts,
            &grad_output,
            bias.as_ref(),
            &gates,
            &index,
            &out,
            grads.b2.as_ref(),
        );
        grads.gates = Some(out);
    }
    drop(gate_parts);
    if needs.w1 {
        let (x, x_order) = prepared_rows(args.x, d_ff, &index);
        grads.w1 = Some(sums(&x, x_order, &grad_pre, &index, false));
    }
    if needs.b1 && !sums_bias {
        grads.b1 = Some(ess(grad_pre.clone(), RowOrder::Expert, None, index.clone()));
    }
    if needs.x {
        let w1 = rows_aligned(args.weights.w1);
        let back = Rows {
            a: &grad_pre,
            a_order: RowOrder::Expert,
            w: &w1,
            transposed: true,
            bias: None,
            gates: None,
            index: &index,
            window: 0..num_slots,
            out_order: result_order(&index),
        };
        let rows = back.product(num_slots);
        drop(grad_pre);
        grads.x = Some(add_choices(rows, index));
    }
    Ok(grads)
}
