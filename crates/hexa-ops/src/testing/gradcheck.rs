//! Gradients of a tensor function against central differences, in f64.

use burn::tensor::backend::AutodiffBackend;
use burn::tensor::{DType, Tensor, TensorData};

use super::compare::{Mismatch, Tolerance, Values, check_close, host};

/// A differentiable argument of the function under test.
#[derive(Debug, Clone)]
pub struct Variable {
    /// Its name, for reports.
    pub name: &'static str,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Where the gradient is taken, row-major.
    pub values: Vec<f64>,
}

/// Central differences of `f` at `at`, element by element.
///
/// The best step is near the cube root of the rounding error of `f` relative to its third
/// derivative: 1e-5 for functions of order one.
pub fn central_differences(at: &[f64], step: f64, mut f: impl FnMut(&[f64]) -> f64) -> Vec<f64> {
    let mut moved = at.to_vec();
    (0..at.len())
        .map(|i| {
            moved[i] = at[i] + step;
            let above = f(&moved);
            moved[i] = at[i] - step;
            let below = f(&moved);
            moved[i] = at[i];
            (above - below) / (2.0 * step)
        })
        .collect()
}

/// Compares the gradients of `f` with central differences.
///
/// `f` gets one flat f64 tensor per variable, to be reshaped as it likes, and returns a flat
/// tensor of any length; what is differentiated is its scalar product with a fixed vector, so that
/// no two output elements can cancel each other's errors.
///
/// # Errors
/// [`Mismatch`], naming the variable.
pub fn gradcheck<B: AutodiffBackend>(
    device: &B::Device,
    variables: &[Variable],
    f: impl Fn(&[Tensor<B, 1>]) -> Tensor<B, 1>,
) -> Result<(), Mismatch> {
    const STEP: f64 = 1e-5;
    let tensors = |values: &[Vec<f64>]| -> Vec<Tensor<B, 1>> {
        values.iter().map(|v| flat(v, device)).collect()
    };
    let objective = |inputs: &[Tensor<B, 1>]| {
        let output = f(inputs);
        let weights = weights(output.dims()[0]);
        (output * flat(&weights, device)).sum()
    };

    let at: Vec<Vec<f64>> = variables.iter().map(|v| v.values.clone()).collect();
    let tracked: Vec<_> = tensors(&at).into_iter().map(Tensor::require_grad).collect();
    let grads = objective(&tracked).backward();

    for (i, variable) in variables.iter().enumerate() {
        let analytic = match tracked[i].grad(&grads) {
            Some(grad) => host(grad),
            None => vec![0.0; variable.values.len()],
        };
        let numeric = central_differences(&variable.values, STEP, |values| {
            let mut moved = at.clone();
            moved[i] = values.to_vec();
            host(objective(&tensors(&moved)))[0]
        });
        check_close(
            variable.name,
            Values {
                shape: &variable.shape,
                data: &analytic,
            },
            Values {
                shape: &variable.shape,
                data: &numeric,
            },
            Tolerance::CENTRAL_DIFFERENCES,
        )?;
    }
    Ok(())
}

fn flat<B: AutodiffBackend>(values: &[f64], device: &B::Device) -> Tensor<B, 1> {
    Tensor::from_data(
        TensorData::new(values.to_vec(), [values.len()]),
        (device, DType::F64),
    )
}

/// Weights between 0.5 and 1.5 in an order without a period.
fn weights(len: usize) -> Vec<f64> {
    const GOLDEN: f64 = 0.618_033_988_749_894_9;
    (1..=len)
        .map(|i| 0.5 + (i as f64 * GOLDEN).fract())
        .collect()
}

#[cfg(all(test, feature = "cpu"))]
mod tests {
    use super::*;
    use crate::backends::Cpu;
    use burn::backend::Autodiff;

    fn variable(values: Vec<f64>) -> Variable {
        Variable {
            name: "x",
            shape: vec![values.len()],
            values,
        }
    }

    #[test]
    fn a_right_gradient_passes() {
        let x = variable(vec![0.3, -1.2, 2.0]);
        gradcheck::<Autodiff<Cpu>>(&Default::default(), &[x], |x| x[0].clone().exp()).unwrap();
    }

    #[test]
    fn a_wrong_gradient_fails() {
        let x = variable(vec![0.3, -1.2, 2.0]);
        let result = gradcheck::<Autodiff<Cpu>>(&Default::default(), &[x], |x| {
            x[0].clone().exp() + x[0].clone().detach()
        });
        assert!(matches!(result, Err(Mismatch::Elements(_))));
    }
}
