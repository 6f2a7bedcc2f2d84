//! The fused expert feed-forward network on Burn tensors.

use burn::tensor::backend::Backend;
use burn::tensor::{Int, Tensor, TensorPrimitive};

use super::check;
use super::index::ExpertIndex;
use crate::backend::{ExpertOps, FfnWeights};
use crate::error::{OpsError, Result};
use crate::types::FfnOptions;

/// Parameters of all experts' feed-forward networks.
#[derive(Debug, Clone)]
pub struct ExpertParams<B: Backend> {
    /// First layer: `[num_experts, d_model, hidden_width]`, `hidden_width` being `d_ff`, or
    /// `2 · d_ff` with interleaved gate and value columns for gated activations.
    pub w1: Tensor<B, 3>,
    /// First layer's bias: `[num_experts, hidden_width]`.
    pub b1: Option<Tensor<B, 2>>,
    /// Second layer: `[num_experts, d_ff, d_model]`.
    pub w2: Tensor<B, 3>,
    /// Second layer's bias: `[num_experts, d_model]`.
    pub b2: Option<Tensor<B, 2>>,
}

/// `y_t = Σ_j g_tj · (act(x_t · W1_e + b1_e) · W2_e + b2_e)`, `e` being token t's j-th expert: one
/// differentiable operation that saves the pre-activation only (arXiv:2411.01288v4, section 4.2).
///
/// Differentiable in `x`, `gate_weights` and all parameters. Products and sums are accumulated in
/// f32 (f64 for f64 tensors).
///
/// # Shapes
/// - `x`: `[tokens, d_model]`, float
/// - `gate_weights`: `[tokens, top_k]`, of the dtype of `x`
/// - `params`: see [`ExpertParams`], of the dtype of `x`
/// - `dropout_seed`: `[2]`, int; 64 bits of which the dropout mask is a function
/// - result: `[tokens, d_model]`
///
/// # Errors
/// [`OpsError::Shape`] and [`OpsError::DType`] if the operands do not fit each other,
/// [`OpsError::Value`] if dropout is out of range or wanted without a seed.
pub fn expert_ffn<B: ExpertOps>(
    x: Tensor<B, 2>,
    gate_weights: Tensor<B, 2>,
    params: ExpertParams<B>,
    index: &ExpertIndex<B>,
    options: FfnOptions,
    dropout_seed: Option<Tensor<B, 1, Int>>,
) -> Result<Tensor<B, 2>> {
    validate(&x, &gate_weights, &params, index, options)?;
    let dropout_seed = check_seed(options, dropout_seed)?;
    let float = |t: Tensor<B, 2>| t.into_primitive().tensor();
    let y = B::expert_ffn(
        float(x),
        float(gate_weights),
        FfnWeights {
            w1: params.w1.into_primitive().tensor(),
            b1: params.b1.map(float),
            w2: params.w2.into_primitive().tensor(),
            b2: params.b2.map(float),
        },
        index.raw().clone(),
        options,
        dropout_seed.map(Tensor::into_primitive),
    );
    Ok(Tensor::from_primitive(TensorPrimitive::Float(y)))
}

const OP: &str = "expert_ffn";

fn validate<B: ExpertOps>(
    x: &Tensor<B, 2>,
    gate_weights: &Tensor<B, 2>,
    params: &ExpertParams<B>,
    index: &ExpertIndex<B>,
    options: FfnOptions,
) -> Result<()> {
    options.validate()?;
    let dtype = check::float_dtype(OP, "x", x)?;
    let [_, d_model] = x.dims();
    let experts = index.num_experts();
    check::shape(OP, "x", x, [index.tokens(), d_model], "tokens, d_model")?;

    check::same_dtype(OP, "gate_weights", gate_weights, dtype)?;
    let expected = [index.tokens(), index.top_k()];
    check::shape(OP, "gate_weights", gate_weights, expected, "tokens, top_k")?;

    check::same_dtype(OP, "w2", &params.w2, dtype)?;
    let [_, d_ff, _] = check::weights(OP, "w2", &params.w2, "num_experts, d_ff, d_model")?;
    let expected = [experts, d_ff, d_model];
    check::shape(OP, "w2", &params.w2, expected, "num_experts, d_ff, d_model")?;

    let hidden = options.activation.hidden_width(d_ff);
    check::same_dtype(OP, "w1", &params.w1, dtype)?;
    let expected = [experts, d_model, hidden];
    let what = "num_experts, d_model, hidden width of the activation";
    check::shape(OP, "w1", &params.w1, expected, what)?;

    if let Some(b1) = &params.b1 {
        check::same_dtype(OP, "b1", b1, dtype)?;
        check::shape(OP, "b1", b1, [experts, hidden], "num_experts, hidden width")?;
    }
    if let Some(b2) = &params.b2 {
        check::same_dtype(OP, "b2", b2, dtype)?;
        check::shape(OP, "b2", b2, [experts, d_model], "num_experts, d_model")?;
    }
    Ok(())
}

/// The seed, if dropout needs one.
fn check_seed<B: Backend>(
    options: FfnOptions,
    seed: Option<Tensor<B, 1, Int>>,
) -> Result<Option<Tensor<B, 1, Int>>> {
    if options.dropout == 0.0 {
        return Ok(None);
    }
    match seed {
        Some(seed) if seed.dims() == [2] => Ok(Some(seed)),
        Some(seed) => Err(OpsError::Shape {
            op: OP,
            tensor: "dropout_seed",
            got: seed.dims().to_vec(),
            expected: "[2]".into(),
            remedy: "draw two integers",
        }),
        None => Err(OpsError::Value {
            name: "dropout_seed",
            got: "none".into(),
            allowed: "a tensor of two integers when dropout > 0",
            remedy: "draw a seed per call, or set dropout to 0",
        }),
    }
}
