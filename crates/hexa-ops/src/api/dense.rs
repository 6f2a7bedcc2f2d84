//! Dense matrix products in stated arithmetic.
//!
//! Burn's own matmul is autotuned: on CUDA it may compute f32 in TF32, and some of its candidates
//! sum one stage too many for certain inner dimensions. These never do.

use burn::tensor::{DType, Tensor, TensorPrimitive};

use super::check;
use crate::backend::ExpertOps;
use crate::error::{OpsError, Result};
use crate::types::MatmulPrecision;

/// Product of the last two dimensions, differentiable in both operands, as a tensor of the
/// operands' type in the product: theirs, or the half precision that they are rounded to.
///
/// # Shapes
/// - `lhs`: `[…, m, k]`, float
/// - `rhs`: `[…, k, n]`, of the same leading dimensions; of the same dtype unless `precision`
///   rounds both
/// - result: `[…, m, n]`
///
/// # Errors
/// [`OpsError::Shape`] and [`OpsError::DType`] if the operands do not fit each other.
pub fn matmul<B: ExpertOps, const D: usize>(
    lhs: Tensor<B, D>,
    rhs: Tensor<B, D>,
    precision: MatmulPrecision,
) -> Result<Tensor<B, D>> {
    let out = precision.operand_dtype(lhs.dtype());
    product(lhs, rhs, precision, out)
}

/// As [`matmul`], but the result of half-precision operands is the f32 sum, not rounded.
///
/// # Shapes
/// As [`matmul`].
///
/// # Errors
/// As [`matmul`].
pub fn matmul_to_f32<B: ExpertOps, const D: usize>(
    lhs: Tensor<B, D>,
    rhs: Tensor<B, D>,
    precision: MatmulPrecision,
) -> Result<Tensor<B, D>> {
    let out = match precision.operand_dtype(lhs.dtype()) {
        DType::F16 | DType::BF16 => DType::F32,
        wide => wide,
    };
    product(lhs, rhs, precision, out)
}

fn product<B: ExpertOps, const D: usize>(
    lhs: Tensor<B, D>,
    rhs: Tensor<B, D>,
    precision: MatmulPrecision,
    out: DType,
) -> Result<Tensor<B, D>> {
    const OP: &str = "matmul";
    let dtype = check::float_dtype(OP, "lhs", &lhs)?;
    if precision.operand_dtype(dtype) == precision.operand_dtype(rhs.dtype()) {
        check::float_dtype(OP, "rhs", &rhs)?;
    } else {
        check::same_dtype(OP, "rhs", &rhs, dtype)?;
    }
    let (left, right) = (lhs.dims(), rhs.dims());
    let fits = D >= 2 && left[..D - 2] == right[..D - 2] && left[D - 1] == right[D - 2];
    if !fits {
        return Err(OpsError::Shape {
            op: OP,
            tensor: "rhs",
            got: right.to_vec(),
            expected: format!("leading dimensions and inner dimension of lhs {left:?}"),
            remedy: "expand the leading dimensions first; they are not broadcast",
        });
    }
    let y = B::dense_matmul(
        lhs.into_primitive().tensor(),
        rhs.into_primitive().tensor(),
        precision,
        out.into(),
    );
    Ok(Tensor::from_primitive(TensorPrimitive::Float(y)))
}

/// `x · weight + bias`, differentiable in all, in the type of [`matmul`]'s result.
///
/// # Shapes
/// - `x`: `[rows, in]`, float
/// - `weight`: `[in, out]`, float; of the dtype of `x` unless `precision` rounds both
/// - `bias`: `[out]`, of the weight's dtype; rounded as the product is
/// - result: `[rows, out]`
///
/// # Errors
/// [`OpsError::Shape`] and [`OpsError::DType`] if the operands do not fit each other.
pub fn linear<B: ExpertOps>(
    x: Tensor<B, 2>,
    weight: Tensor<B, 2>,
    bias: Option<Tensor<B, 1>>,
    precision: MatmulPrecision,
) -> Result<Tensor<B, 2>> {
    if let Some(bias) = &bias {
        check::same_dtype("linear", "bias", bias, weight.dtype())?;
        check::shape("linear", "bias", bias, [weight.dims()[1]], "out")?;
    }
    let y = matmul(x, weight, precision)?;
    Ok(match bias {
        Some(bias) => {
            let bias = bias.cast(y.dtype());
            y + bias.unsqueeze()
        }
        None => y,
    })
}

/// `x · Φ(x)` of every element, Φ with the error function; differentiable, computed in f32 (f64 for
/// f64 tensors) and rounded once.
///
/// Burn's own has the derivative of the tanh approximation.
///
/// # Shapes
/// `x` and result: any, float
///
/// # Errors
/// [`OpsError::DType`] for quantised tensors.
pub fn gelu<B: ExpertOps, const D: usize>(x: Tensor<B, D>) -> Result<Tensor<B, D>> {
    check::float_dtype("gelu", "x", &x)?;
    let y = <B as ExpertOps>::gelu(x.into_primitive().tensor());
    Ok(Tensor::from_primitive(TensorPrimitive::Float(y)))
}
