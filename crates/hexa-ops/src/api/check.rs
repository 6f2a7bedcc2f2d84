//! Checks of shapes and dtypes, each naming what was given, what is allowed and what to do.

use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor};

use crate::error::{OpsError, Result};
use crate::types::RowOrder;

/// The dtypes that the operators compute in.
fn is_float(dtype: DType) -> bool {
    matches!(dtype, DType::F64 | DType::F32 | DType::F16 | DType::BF16)
}

/// The operator's leading float tensor: its dtype is the one that the others must have.
pub fn float_dtype<B: Backend, const D: usize>(
    op: &'static str,
    tensor: &'static str,
    value: &Tensor<B, D>,
) -> Result<DType> {
    let got = value.dtype();
    if is_float(got) {
        Ok(got)
    } else {
        Err(OpsError::DType {
            op,
            tensor,
            got,
            expected: "F64, F32, F16 or BF16".into(),
        })
    }
}

/// A float tensor that must have the leading tensor's dtype.
pub fn same_dtype<B: Backend, const D: usize>(
    op: &'static str,
    tensor: &'static str,
    value: &Tensor<B, D>,
    leading: DType,
) -> Result<()> {
    let got = value.dtype();
    if got == leading {
        Ok(())
    } else {
        Err(OpsError::DType {
            op,
            tensor,
            got,
            expected: format!("{leading:?}, as the operator's first tensor"),
        })
    }
}

/// A tensor whose shape follows from the others; `what` spells the expected dimensions.
pub fn shape<B: Backend, const D: usize>(
    op: &'static str,
    tensor: &'static str,
    value: &Tensor<B, D>,
    expected: [usize; D],
    what: &'static str,
) -> Result<()> {
    let got = value.dims();
    if got == expected {
        Ok(())
    } else {
        Err(mismatch(
            op,
            tensor,
            got.to_vec(),
            format!("{expected:?} ({what})"),
        ))
    }
}

/// A stack of matrices whose dimensions are all positive.
pub fn weights<B: Backend>(
    op: &'static str,
    tensor: &'static str,
    value: &Tensor<B, 3>,
    what: &'static str,
) -> Result<[usize; 3]> {
    let dims = value.dims();
    if dims.contains(&0) {
        Err(OpsError::Shape {
            op,
            tensor,
            got: dims.to_vec(),
            expected: format!("positive dimensions ({what})"),
            remedy: "a layer needs at least one expert and one column",
        })
    } else {
        Ok(dims)
    }
}

/// Rows of a matrix in an order of an index.
pub fn rows<B: Backend>(
    op: &'static str,
    tensor: &'static str,
    value: &Tensor<B, 2>,
    order: RowOrder,
    tokens: usize,
    top_k: usize,
) -> Result<()> {
    let [rows, width] = value.dims();
    let expected = order.num_rows(tokens, top_k);
    if rows != expected {
        return Err(mismatch(
            op,
            tensor,
            vec![rows, width],
            format!("[{expected}, _] (rows of {order:?} order)"),
        ));
    }
    if width == 0 {
        return Err(mismatch(
            op,
            tensor,
            vec![rows, width],
            format!("[{expected}, n] with n >= 1"),
        ));
    }
    Ok(())
}

fn mismatch(op: &'static str, tensor: &'static str, got: Vec<usize>, expected: String) -> OpsError {
    OpsError::Shape {
        op,
        tensor,
        got,
        expected,
        remedy: "check it against the operator's documented shapes",
    }
}
