//! Activations and their slopes.

use std::f64::consts::{FRAC_2_SQRT_PI, PI, SQRT_2};

use crate::types::Activation;

/// The error function, to a few units in the last place.
///
/// `erf(x) = 2/√π · e^{−x²} · Σ 2ⁿ x^{2n+1} / (2n+1)!!`: all terms have one sign, so nothing
/// cancels. Beyond 6 the function is 1 in f64.
pub fn erf(x: f64) -> f64 {
    if x.abs() > 6.0 {
        return x.signum();
    }
    let mut term = x;
    let mut sum = x;
    let mut n = 0.0;
    while term.abs() > sum.abs() * 1e-17 {
        n += 1.0;
        term *= 2.0 * x * x / (2.0 * n + 1.0);
        sum += term;
    }
    FRAC_2_SQRT_PI * (-x * x).exp() * sum
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

fn normal_cdf(x: f64) -> f64 {
    0.5 * (1.0 + erf(x / SQRT_2))
}

fn normal_pdf(x: f64) -> f64 {
    (-0.5 * x * x).exp() / (2.0 * PI).sqrt()
}

/// Argument of GELU's tanh approximation and its derivative.
fn tanh_argument(x: f64) -> (f64, f64) {
    let scale = (2.0 / PI).sqrt();
    (
        scale * (x + 0.044715 * x.powi(3)),
        scale * (1.0 + 3.0 * 0.044715 * x * x),
    )
}

/// Value and derivative of the function of one variable behind an activation.
fn unary(activation: Activation, x: f64) -> (f64, f64) {
    match activation {
        Activation::Gelu | Activation::GeGlu => {
            (x * normal_cdf(x), normal_cdf(x) + x * normal_pdf(x))
        }
        Activation::GeluTanh => {
            let (u, du) = tanh_argument(x);
            let tanh = u.tanh();
            (
                0.5 * x * (1.0 + tanh),
                0.5 * (1.0 + tanh) + 0.5 * x * (1.0 - tanh * tanh) * du,
            )
        }
        Activation::Relu => {
            if x > 0.0 {
                (x, 1.0)
            } else {
                (0.0, 0.0)
            }
        }
        Activation::Silu | Activation::SwiGlu => {
            let s = sigmoid(x);
            (x * s, s + x * s * (1.0 - s))
        }
    }
}

/// Whether a row of the pre-activation holds pairs of a gate and a value.
fn has_pairs(activation: Activation) -> bool {
    match activation {
        Activation::Gelu | Activation::GeluTanh | Activation::Relu | Activation::Silu => false,
        Activation::SwiGlu | Activation::GeGlu => true,
    }
}

/// One row of pre-activations `[hidden_width]` to `[d_ff]`.
pub fn activate(activation: Activation, row: &[f64]) -> Vec<f64> {
    if has_pairs(activation) {
        row.chunks(2)
            .map(|pair| unary(activation, pair[0]).0 * pair[1])
            .collect()
    } else {
        row.iter().map(|&h| unary(activation, h).0).collect()
    }
}

/// Gradient of a row of pre-activations `[hidden_width]` from that of its result `[d_ff]`.
pub fn activation_slope(activation: Activation, row: &[f64], grad: &[f64]) -> Vec<f64> {
    if has_pairs(activation) {
        row.chunks(2)
            .zip(grad)
            .flat_map(|(pair, g)| {
                let (value, slope) = unary(activation, pair[0]);
                [g * slope * pair[1], g * value]
            })
            .collect()
    } else {
        row.iter()
            .zip(grad)
            .map(|(&h, g)| g * unary(activation, h).1)
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn erf_equals_published_values() {
        // Abramowitz and Stegun, table 7.1, and DLMF 7.2 evaluated to 16 digits.
        let table = [
            (0.0, 0.0),
            (0.1, 0.112_462_916_018_284_9),
            (0.5, 0.520_499_877_813_046_5),
            (1.0, 0.842_700_792_949_714_9),
            (2.0, 0.995_322_265_018_952_7),
            (3.0, 0.999_977_909_503_001_4),
            (7.0, 1.0),
        ];
        for (x, expected) in table {
            assert!((erf(x) - expected).abs() < 4e-16, "{x}: {}", erf(x));
            assert!((erf(-x) + expected).abs() < 4e-16, "{x}");
        }
    }

    #[test]
    fn slopes_are_central_differences() {
        let step = 1e-6;
        for activation in Activation::ALL {
            let row: Vec<f64> = (-20..20).map(|i| 0.3 * f64::from(i) + 0.01).collect();
            let width = activate(activation, &row).len();
            let grad: Vec<f64> = (0..width).map(|i| 1.0 + 0.1 * i as f64).collect();
            let dot = |row: &[f64]| -> f64 {
                let out = activate(activation, row);
                out.iter().zip(&grad).map(|(o, g)| o * g).sum()
            };
            let slope = activation_slope(activation, &row, &grad);
            for i in 0..row.len() {
                let mut moved = row.clone();
                moved[i] += step;
                let above = dot(&moved);
                moved[i] -= 2.0 * step;
                let numeric = (above - dot(&moved)) / (2.0 * step);
                assert!(
                    (numeric - slope[i]).abs() < 1e-6 * (1.0 + numeric.abs()),
                    "{activation:?} at {}: {numeric} and {}",
                    row[i],
                    slope[i]
                );
            }
        }
    }
}
