//! The fused expert feed-forward network, composed of the expert-specific kernels.
//!
//! For slot `s = (t, j)` routed to expert `e` with gate weight `g`:
//!
//! ```text
//! h_s = x_t · W1_e + b1_e          pre-activation, the only thing saved
//! a_s = dropout(act(h_s))
//! y_t = Σ_j g_tj · (a_s · W2_e + b2_e)
//! ```
//!
//! and backwards, from `dy`:
//!
//! ```text
//! u_s   = dy_t · W2_eᵀ
//! dg_tj = u_s · a_s + dy_t · b2_e      no second forward product is needed
//! dh_s  = g_tj · dropout(u_s) ⊙ act'(h_s)
//! dW2_e = Σ (g_tj a_s)ᵀ dy_t           db2_e = Σ g_tj dy_t
//! dW1_e = Σ x_tᵀ dh_s                  db1_e = Σ dh_s
//! dx_t  = Σ_j dh_s · W1_eᵀ
//! ```
//!
//! Source: arXiv:2411.01288v4, section 4.2, with the gate weights that its released code forgets.

use burn::tensor::ops::{FloatTensor, IntTensor};

use crate::backend::{
    EsmmArgs, ExpertKernels, FfnActivationGradArgs, FfnBackwardArgs, FfnForward, FfnGrads,
    FfnWeights, RawExpertIndex,
};
use crate::types::{FfnOptions, RowOrder};

/// Forward pass out of the kernels of `B`; contract in [`ExpertKernels::expert_ffn`].
pub fn forward<B: ExpertKernels>(
    x: FloatTensor<B>,
    gates: FloatTensor<B>,
    weights: FfnWeights<FloatTensor<B>>,
    index: RawExpertIndex<IntTensor<B>>,
    options: FfnOptions,
    dropout_seed: Option<IntTensor<B>>,
) -> FfnForward<FloatTensor<B>> {
    let pre_activation = <B as ExpertKernels>::esmm(EsmmArgs {
        x,
        x_order: RowOrder::Token,
        w: weights.w1,
        transposed: false,
        bias: weights.b1,
        out_order: RowOrder::Expert,
        index: index.clone(),
    });
    let activated = B::ffn_activation(pre_activation.clone(), index.clone(), options, dropout_seed);
    let y = <B as ExpertKernels>::esmm(EsmmArgs {
        x: activated,
        x_order: RowOrder::Expert,
        w: weights.w2,
        transposed: false,
        bias: weights.b2,
        out_order: RowOrder::Expert,
        index: index.clone(),
    });
    let output = B::combine(y, RowOrder::Expert, Some(gates), index);
    FfnForward {
        output,
        pre_activation,
    }
}

/// Backward pass out of the kernels of `B`; contract in [`ExpertKernels::expert_ffn_backward`].
pub fn backward<B: ExpertKernels>(
    args: FfnBackwardArgs<FloatTensor<B>, IntTensor<B>>,
) -> FfnGrads<FloatTensor<B>> {
    let FfnBackwardArgs {
        grad_output,
        x,
        gates,
        weights,
        pre_activation,
        index,
        options,
        dropout_seed,
        needs,
    } = args;

    let b2_grad = needs.b2.then(|| {
        <B as ExpertKernels>::ess(
            grad_output.clone(),
            RowOrder::Token,
            Some(gates.clone()),
            index.clone(),
        )
    });
    let mut grads = FfnGrads {
        x: None,
        gates: None,
        w1: None,
        b1: None,
        w2: None,
        b2: b2_grad,
    };
    if !(needs.x || needs.gates || needs.w1 || needs.b1 || needs.w2) {
        return grads;
    }

    let grad_activated = <B as ExpertKernels>::esmm(EsmmArgs {
        x: grad_output.clone(),
        x_order: RowOrder::Token,
        w: weights.w2,
        transposed: true,
        bias: None,
        out_order: RowOrder::Expert,
        index: index.clone(),
    });
    let output_bias = weights
        .b2
        .filter(|_| needs.gates)
        .map(|b2| (grad_output.clone(), b2));
    let through = B::ffn_activation_backward(FfnActivationGradArgs {
        pre_activation,
        grad_activated,
        gates,
        output_bias,
        index: index.clone(),
        options,
        dropout_seed,
    });

    grads.gates = needs.gates.then_some(through.gates);
    grads.w2 = needs.w2.then(|| {
        <B as ExpertKernels>::estmm(
            through.weighted_activated,
            RowOrder::Expert,
            grad_output,
            RowOrder::Token,
            index.clone(),
        )
    });
    let grad_pre = through.pre_activation;
    grads.w1 = needs.w1.then(|| {
        <B as ExpertKernels>::estmm(
            x,
            RowOrder::Token,
            grad_pre.clone(),
            RowOrder::Expert,
            index.clone(),
        )
    });
    grads.b1 = needs.b1.then(|| {
        <B as ExpertKernels>::ess(grad_pre.clone(), RowOrder::Expert, None, index.clone())
    });
    grads.x = needs.x.then(|| {
        let slots = <B as ExpertKernels>::esmm(EsmmArgs {
            x: grad_pre,
            x_order: RowOrder::Expert,
            w: weights.w1,
            transposed: true,
            bias: None,
            out_order: RowOrder::Expert,
            index: index.clone(),
        });
        B::combine(slots, RowOrder::Expert, None, index)
    });
    grads
}
