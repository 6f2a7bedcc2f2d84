//! ESMM, ESS and ESTMM on Burn tensors.

use burn::tensor::{Tensor, TensorPrimitive};

use super::check;
use super::index::ExpertIndex;
use crate::backend::{EsmmArgs, ExpertOps};
use crate::error::{OpsError, Result};
use crate::types::RowOrder;

/// How [`esmm`] reads its operands and writes its result.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EsmmOptions {
    /// Order of the rows of `x`.
    pub x_order: RowOrder,
    /// Whether to multiply with the transpose of each expert's stored matrix.
    pub transposed: bool,
    /// Order of the rows of the result, [`RowOrder::Slot`] or [`RowOrder::Expert`].
    pub out_order: RowOrder,
}

impl Default for EsmmOptions {
    /// One row per token in, one row per slot out.
    fn default() -> Self {
        Self {
            x_order: RowOrder::Token,
            transposed: false,
            out_order: RowOrder::Slot,
        }
    }
}

/// Expert-specific matrix multiplication: `y_i = x_i · W[R(i)] + b[R(i)]`
/// (arXiv:2411.01288v4, ESMM), accumulated in f32 (f64 for f64 tensors).
///
/// Differentiable in `x`, `w` and `bias`.
///
/// # Shapes
/// - `x`: `[tokens, in]` or `[slots, in]`, by `options.x_order`
/// - `w`: `[num_experts, in, out]`, or `[num_experts, out, in]` if `options.transposed`
/// - `bias`: `[num_experts, out]`
/// - result: `[slots, out]`
///
/// # Errors
/// [`OpsError::Shape`] and [`OpsError::DType`] if the operands do not fit each other,
/// [`OpsError::Value`] if `options.out_order` is [`RowOrder::Token`].
pub fn esmm<B: ExpertOps>(
    x: Tensor<B, 2>,
    w: Tensor<B, 3>,
    bias: Option<Tensor<B, 2>>,
    index: &ExpertIndex<B>,
    options: EsmmOptions,
) -> Result<Tensor<B, 2>> {
    const OP: &str = "esmm";
    if options.out_order == RowOrder::Token {
        return Err(OpsError::Value {
            name: "out_order",
            got: "Token".into(),
            allowed: "Slot or Expert",
            remedy: "a token has one row per choice; combine them with gate weights in expert_ffn",
        });
    }
    let dtype = check::float_dtype(OP, "x", &x)?;
    check::same_dtype(OP, "w", &w, dtype)?;
    let [_, rows, columns] = check::weights(OP, "w", &w, "experts, in, out")?;
    let (input, output) = if options.transposed {
        (columns, rows)
    } else {
        (rows, columns)
    };
    let num_rows = options.x_order.num_rows(index.tokens(), index.top_k());
    check::shape(OP, "x", &x, [num_rows, input], "rows, in")?;
    check::shape(
        OP,
        "w",
        &w,
        [index.num_experts(), rows, columns],
        "num_experts, in, out",
    )?;
    if let Some(bias) = &bias {
        check::same_dtype(OP, "bias", bias, dtype)?;
        let expected = [index.num_experts(), output];
        check::shape(OP, "bias", bias, expected, "num_experts, out")?;
    }
    let y = B::esmm(EsmmArgs {
        x: x.into_primitive().tensor(),
        x_order: options.x_order,
        w: w.into_primitive().tensor(),
        transposed: options.transposed,
        bias: bias.map(|b| b.into_primitive().tensor()),
        out_order: options.out_order,
        index: index.raw().clone(),
    });
    Ok(Tensor::from_primitive(TensorPrimitive::Float(y)))
}

/// Expert-specific transposed matrix multiplication: `M_e = Σ_{R(i)=e} a_iᵀ b_i`
/// (arXiv:2411.01288v4, ESTMM), accumulated in f32 (f64 for f64 tensors); exactly zero for an
/// expert without tokens.
///
/// Differentiable in `a` and `b`.
///
/// # Shapes
/// - `a`: `[tokens, m]` or `[slots, m]`, by its order
/// - `b`: `[tokens, n]` or `[slots, n]`, by its order
/// - result: `[num_experts, m, n]`
///
/// # Errors
/// [`OpsError::Shape`] and [`OpsError::DType`] if the operands do not fit each other.
pub fn estmm<B: ExpertOps>(
    a: Tensor<B, 2>,
    a_order: RowOrder,
    b: Tensor<B, 2>,
    b_order: RowOrder,
    index: &ExpertIndex<B>,
) -> Result<Tensor<B, 3>> {
    const OP: &str = "estmm";
    let dtype = check::float_dtype(OP, "a", &a)?;
    check::same_dtype(OP, "b", &b, dtype)?;
    check::rows(OP, "a", &a, a_order, index.tokens(), index.top_k())?;
    check::rows(OP, "b", &b, b_order, index.tokens(), index.top_k())?;
    let m = B::estmm(
        a.into_primitive().tensor(),
        a_order,
        b.into_primitive().tensor(),
        b_order,
        index.raw().clone(),
    );
    Ok(Tensor::from_primitive(TensorPrimitive::Float(m)))
}

/// Expert-specific summation: `s_e = Σ_{R(i)=e} x_i` (arXiv:2411.01288v4, ESS), accumulated in
/// f32 (f64 for f64 tensors); exactly zero for an expert without tokens.
///
/// Differentiable in `x`.
///
/// # Shapes
/// - `x`: `[tokens, n]` or `[slots, n]`, by its order
/// - result: `[num_experts, n]`
///
/// # Errors
/// [`OpsError::Shape`] and [`OpsError::DType`] if `x` does not fit the index.
pub fn ess<B: ExpertOps>(
    x: Tensor<B, 2>,
    x_order: RowOrder,
    index: &ExpertIndex<B>,
) -> Result<Tensor<B, 2>> {
    const OP: &str = "ess";
    check::float_dtype(OP, "x", &x)?;
    check::rows(OP, "x", &x, x_order, index.tokens(), index.top_k())?;
    let s = B::ess(x.into_primitive().tensor(), x_order, index.raw().clone());
    Ok(Tensor::from_primitive(TensorPrimitive::Float(s)))
}
