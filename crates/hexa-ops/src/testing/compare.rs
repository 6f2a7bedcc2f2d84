//! Comparison of tensors with references in f64.

use core::fmt;

use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor};

use crate::host::download;

/// How far an element may be from its reference: `atol + rtol · |reference|`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Tolerance {
    /// Absolute part.
    pub atol: f64,
    /// Part relative to the reference.
    pub rtol: f64,
}

impl Tolerance {
    /// Two bit patterns of one value.
    pub const EXACT: Tolerance = Tolerance {
        atol: 0.0,
        rtol: 0.0,
    };

    /// The tolerance of sums of up to a few hundred products of numbers of order one, whose
    /// factors and result are of type `dtype` and whose accumulator is at least f32.
    pub fn of(dtype: DType) -> Self {
        let (atol, rtol) = match dtype {
            DType::F64 => (1e-11, 1e-10),
            DType::F32 => (2e-5, 1e-4),
            DType::F16 => (4e-3, 1e-2),
            DType::BF16 => (3e-2, 5e-2),
            _ => return Self::EXACT,
        };
        Self { atol, rtol }
    }

    /// The tolerance of central differences in f64 with steps of 1e-5 or 1e-6.
    pub const CENTRAL_DIFFERENCES: Tolerance = Tolerance {
        atol: 1e-7,
        rtol: 1e-6,
    };
}

/// Why two tensors differ.
#[derive(Debug, Clone, PartialEq)]
pub enum Mismatch {
    /// The shapes differ.
    Shape {
        /// What was compared.
        name: String,
        /// Shape of the result.
        got: Vec<usize>,
        /// Shape of the reference.
        expected: Vec<usize>,
    },
    /// At least one element is too far from its reference, or not finite.
    Elements(Box<Elements>),
}

/// A report on elements that differ.
#[derive(Debug, Clone, PartialEq)]
pub struct Elements {
    /// What was compared.
    pub name: String,
    /// Number of elements that failed.
    pub failed: usize,
    /// Number of elements.
    pub total: usize,
    /// Place of the worst element.
    pub worst: Vec<usize>,
    /// The worst element.
    pub got: f64,
    /// Its reference.
    pub expected: f64,
    /// The tolerance that was asked for.
    pub tolerance: Tolerance,
    /// Norm of the difference relative to that of the reference.
    pub relative_error: f64,
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Mismatch::Shape {
                name,
                got,
                expected,
            } => write!(f, "{name}: shape {got:?}, expected {expected:?}"),
            Mismatch::Elements(e) => write!(
                f,
                "{}: {} of {} elements differ, worst at {:?}: {:e}, expected {:e} \
                 (difference {:e}, atol {:e}, rtol {:e}); relative norm error {:e}",
                e.name,
                e.failed,
                e.total,
                e.worst,
                e.got,
                e.expected,
                (e.got - e.expected).abs(),
                e.tolerance.atol,
                e.tolerance.rtol,
                e.relative_error
            ),
        }
    }
}

impl std::error::Error for Mismatch {}

/// Values with their shape, row-major.
#[derive(Debug, Clone, Copy)]
pub struct Values<'a> {
    /// Length of each axis.
    pub shape: &'a [usize],
    /// The elements.
    pub data: &'a [f64],
}

/// Checks that all elements of `got` are finite and as near to `expected` as `tolerance` says.
///
/// # Errors
/// [`Mismatch`], with the worst element; an element that is not finite is worse than any other,
/// on either side.
pub fn check_close(
    name: &str,
    got: Values<'_>,
    expected: Values<'_>,
    tolerance: Tolerance,
) -> Result<(), Mismatch> {
    let consistent = got.data.len() == expected.data.len();
    if got.shape != expected.shape || !consistent {
        return Err(Mismatch::Shape {
            name: name.to_string(),
            got: got.shape.to_vec(),
            expected: expected.shape.to_vec(),
        });
    }
    let mut failed = 0;
    let mut worst = (0, f64::NEG_INFINITY);
    for (i, (&a, &b)) in got.data.iter().zip(expected.data).enumerate() {
        let excess = excess(a, b, tolerance);
        let passes = excess <= 0.0; // false for NaN
        if !passes {
            failed += 1;
            if excess > worst.1 {
                worst = (i, excess);
            }
        }
    }
    if failed == 0 {
        return Ok(());
    }
    Err(Mismatch::Elements(Box::new(Elements {
        name: name.to_string(),
        failed,
        total: got.data.len(),
        worst: unravel(worst.0, got.shape),
        got: got.data[worst.0],
        expected: expected.data[worst.0],
        tolerance,
        relative_error: relative_error(got.data, expected.data),
    })))
}

/// How far an element is beyond its tolerance; infinite if anything is not finite.
fn excess(got: f64, expected: f64, tolerance: Tolerance) -> f64 {
    if got.is_finite() && expected.is_finite() {
        (got - expected).abs() - (tolerance.atol + tolerance.rtol * expected.abs())
    } else {
        f64::INFINITY
    }
}

/// [`check_close`] for a tensor, at the tolerance of its element type.
///
/// # Errors
/// [`Mismatch`].
pub fn check_tensor<B: Backend, const D: usize>(
    name: &str,
    got: Tensor<B, D>,
    expected: &[f64],
    shape: [usize; D],
) -> Result<(), Mismatch> {
    let tolerance = Tolerance::of(got.dtype());
    let dims = got.dims();
    check_close(
        name,
        Values {
            shape: &dims,
            data: &host(got),
        },
        Values {
            shape: &shape,
            data: expected,
        },
        tolerance,
    )
}

/// A float tensor's elements on the host.
pub fn host<B: Backend, const D: usize>(tensor: Tensor<B, D>) -> Vec<f64> {
    download(tensor)
        .expect("the device works")
        .iter::<f64>()
        .collect()
}

/// Norm of `a − b` relative to that of `b`; of the difference alone if `b` is zero.
pub fn relative_error(a: &[f64], b: &[f64]) -> f64 {
    let norm = |squares: f64| squares.sqrt();
    let difference = norm(a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum());
    let reference = norm(b.iter().map(|b| b.powi(2)).sum());
    if reference > 0.0 {
        difference / reference
    } else {
        difference
    }
}

fn unravel(mut at: usize, shape: &[usize]) -> Vec<usize> {
    let mut place = vec![0; shape.len()];
    for (axis, &len) in shape.iter().enumerate().rev() {
        place[axis] = at % len;
        at /= len;
    }
    place
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOLERANCE: Tolerance = Tolerance {
        atol: 0.1,
        rtol: 0.0,
    };

    fn compare(got: &[f64], expected: &[f64]) -> Result<(), Mismatch> {
        let shape = [got.len()];
        let expected_shape = [expected.len()];
        check_close(
            "t",
            Values {
                shape: &shape,
                data: got,
            },
            Values {
                shape: &expected_shape,
                data: expected,
            },
            TOLERANCE,
        )
    }

    #[test]
    fn near_values_pass_and_far_ones_name_the_worst() {
        assert!(compare(&[1.0, 2.05], &[1.05, 2.0]).is_ok());
        let error = compare(&[1.2, 3.0, 2.0], &[1.0, 2.0, 2.0]).unwrap_err();
        match &error {
            Mismatch::Elements(e) => {
                assert_eq!((e.failed, e.worst.as_slice()), (2, &[1][..]));
            }
            other => panic!("{other}"),
        }
        assert!(error.to_string().contains("2 of 3"), "{error}");
    }

    #[test]
    fn what_is_not_finite_never_passes() {
        for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            assert!(compare(&[bad], &[0.0]).is_err());
            assert!(compare(&[0.0], &[bad]).is_err());
            assert!(compare(&[bad], &[bad]).is_err());
        }
    }

    #[test]
    fn shapes_must_be_equal() {
        assert!(matches!(
            compare(&[1.0], &[1.0, 1.0]),
            Err(Mismatch::Shape { .. })
        ));
    }

    #[test]
    fn relative_error_is_of_norms() {
        assert_eq!(relative_error(&[3.0, 4.0], &[0.0, 0.0]), 5.0);
        assert!((relative_error(&[1.1, 0.0], &[1.0, 0.0]) - 0.1).abs() < 1e-12);
    }

    #[test]
    fn places_are_row_major() {
        assert_eq!(unravel(0, &[2, 3, 5]), [0, 0, 0]);
        assert_eq!(unravel(29, &[2, 3, 5]), [1, 2, 4]);
        assert_eq!(unravel(7, &[2, 3, 5]), [0, 1, 2]);
    }
}
