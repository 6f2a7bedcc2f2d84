//! GELU of single elements.

use burn::tensor::{DType, Tensor};
use hexa_ops::testing::backend::skip;
use hexa_ops::testing::compare::host;
use hexa_ops::{TrainingBackend, backend_test, gelu};

use crate::cases::tensor;

/// Value and derivative by Simpson's rule, so that no error function is needed.
fn reference(x: f64) -> (f64, f64) {
    let density = |t: f64| (-0.5 * t * t).exp() / (2.0 * core::f64::consts::PI).sqrt();
    let steps = 2000;
    let h = x / steps as f64;
    let area: f64 = (0..=steps)
        .map(|i| {
            let weight = match i {
                0 => 1.0,
                i if i == steps => 1.0,
                i if i % 2 == 1 => 4.0,
                _ => 2.0,
            };
            weight * density(i as f64 * h)
        })
        .sum();
    let cdf = 0.5 + area * h / 3.0;
    (x * cdf, cdf + x * density(x))
}

fn matches_the_integral<B: TrainingBackend>() {
    let device = Default::default();
    // 81 points: an odd number, in a tensor of three axes, one of them transposed.
    let points: Vec<f64> = (-40..=40).map(|i| f64::from(i) * 0.15).collect();
    let upstream: Vec<f64> = (0..81).map(|i| 0.5 + f64::from(i % 7)).collect();
    for (dtype, unit) in [
        (DType::F32, 2e-6),
        (DType::BF16, 1.0 / 128.0),
        (DType::F16, 1.0 / 1024.0),
    ] {
        if !B::supports_dtype(&device, dtype) {
            skip("gelu", &format!("no {dtype:?} here"));
            continue;
        }
        let x = tensor::<B, 3>(&points, [3, 3, 9])
            .cast(dtype)
            .require_grad();
        let given = host(x.clone().cast(DType::F32));
        let y = gelu(x.clone().swap_dims(0, 2)).unwrap().swap_dims(0, 2);
        assert_eq!(y.dtype(), dtype);
        let upstream_half = tensor::<B, 3>(&upstream, [3, 3, 9]).cast(dtype);
        let factors = host(upstream_half.clone().cast(DType::F32));
        let grads = (y.clone() * upstream_half).sum().backward();
        let slopes = Tensor::<B, 3>::from_inner(x.grad(&grads).unwrap());
        let (values, slopes) = (host(y.cast(DType::F32)), host(slopes.cast(DType::F32)));
        for (i, &x) in given.iter().enumerate() {
            let (value, slope) = reference(x);
            let slope = slope * factors[i];
            let near =
                |got: f64, expected: f64| (got - expected).abs() <= unit * expected.abs().max(0.1);
            assert!(
                near(values[i], value),
                "{dtype:?} {x}: {}, {value}",
                values[i]
            );
            assert!(
                near(slopes[i], slope),
                "{dtype:?} {x}: {}, {slope}",
                slopes[i]
            );
        }
    }
}

backend_test!(gelu_and_its_derivative, matches_the_integral);
