//! Dense products in stated arithmetic.

use burn::tensor::{DType, Tensor};
use hexa_ops::testing::backend::skip;
use hexa_ops::testing::compare::{Tolerance, Values, check_close, check_tensor, host};
use hexa_ops::testing::oracle::Matmul;
use hexa_ops::{
    MatmulPrecision, TrainingBackend, backend_test, linear, matmul, supports_precision,
};
use proptest::prelude::*;

use crate::cases::{
    CASES, Layout, Numbers, Outcome, burn_takes_no_elements, check, laid_out, layout, same_bits,
    tensor,
};

const STRICT: MatmulPrecision = MatmulPrecision::Strict;

#[derive(Debug, Clone)]
struct Case {
    batch: (usize, usize),
    m: usize,
    k: usize,
    n: usize,
    layouts: (Layout, Layout),
    strided_grad: bool,
    seed: u64,
}

fn case() -> impl Strategy<Value = Case> {
    // Inner dimensions with an odd number of stages of 32, where some matmuls go wrong.
    let inner = prop::sample::select(vec![1_usize, 7, 32, 96, 160, 288]);
    let outer = || prop::sample::select(vec![1_usize, 2, 3, 17, 31, 33, 64, 67]);
    let batch = prop_oneof![
        3 => Just((1_usize, 1_usize)),
        1 => (1..=3_usize, 1..=2_usize),
    ];
    (
        batch,
        (outer(), inner, outer()),
        (layout(), layout()),
        any::<bool>(),
        any::<u64>(),
    )
        .prop_map(|(batch, (m, k, n), layouts, strided_grad, seed)| Case {
            batch,
            m,
            k,
            n,
            layouts,
            strided_grad,
            seed,
        })
}

/// A gradient of ones times `grad`, contiguous or not.
fn backward<B: TrainingBackend, const D: usize>(
    y: Tensor<B, D>,
    grad: Tensor<B, D>,
    strided: bool,
) -> B::Gradients {
    if strided {
        (y.swap_dims(D - 2, D - 1) * grad.swap_dims(D - 2, D - 1)).backward()
    } else {
        (y * grad).backward()
    }
}

fn matmul_in_rank<B: TrainingBackend, const D: usize>(case: &Case, batch: &[usize]) -> Outcome {
    let &Case { m, k, n, .. } = case;
    let shape = |rows: usize, columns: usize| -> [usize; D] {
        core::array::from_fn(|axis| match D - axis {
            1 => columns,
            2 => rows,
            _ => batch[axis],
        })
    };
    let batches = batch.iter().product();
    let mut numbers = Numbers::new(case.seed);
    let lhs = numbers.values(batches * m * k);
    let rhs = numbers.values(batches * k * n);
    let grad = numbers.values(batches * m * n);
    let oracle = Matmul {
        lhs: &lhs,
        rhs: &rhs,
        batches,
        m,
        k,
        n,
    };

    let lhs_leaf = laid_out::<B, D>(&lhs, shape(m, k), case.layouts.0).require_grad();
    let rhs_leaf = laid_out::<B, D>(&rhs, shape(k, n), case.layouts.1).require_grad();
    let y = matmul(lhs_leaf.clone(), rhs_leaf.clone(), STRICT)?;
    check_tensor("y", y.clone(), &oracle.forward(), shape(m, n))?;
    let grads = backward(y, tensor(&grad, shape(m, n)), case.strided_grad);
    let expected = oracle.backward(&grad);
    let got = lhs_leaf.grad(&grads).expect("tracked");
    check_tensor("d lhs", got, &expected.lhs, shape(m, k))?;
    let got = rhs_leaf.grad(&grads).expect("tracked");
    check_tensor("d rhs", got, &expected.rhs, shape(k, n))?;
    Ok(())
}

fn equals_the_oracle<B: TrainingBackend>() {
    check(CASES, case(), |case| match case.batch {
        (1, 1) => matmul_in_rank::<B, 2>(&case, &[]),
        (a, 1) => matmul_in_rank::<B, 3>(&case, &[a]),
        (a, b) => matmul_in_rank::<B, 4>(&case, &[a, b]),
    });
}

fn linear_case<B: TrainingBackend>(case: &Case) -> Outcome {
    let &Case { m, k, n, .. } = case;
    let with_bias = case.batch.0 == 1;
    let mut numbers = Numbers::new(case.seed);
    let (x, w) = (numbers.values(m * k), numbers.values(k * n));
    let (bias, grad) = (numbers.values(n), numbers.values(m * n));
    let oracle = Matmul {
        lhs: &x,
        rhs: &w,
        batches: 1,
        m,
        k,
        n,
    };
    let mut expected = oracle.forward();
    let mut bias_grad = vec![0.0; n];
    for (i, y) in expected.iter_mut().enumerate() {
        *y += if with_bias { bias[i % n] } else { 0.0 };
        bias_grad[i % n] += grad[i];
    }

    let x_leaf = laid_out::<B, 2>(&x, [m, k], case.layouts.0).require_grad();
    let w_leaf = laid_out::<B, 2>(&w, [k, n], case.layouts.1).require_grad();
    let bias_leaf = tensor::<B, 1>(&bias, [n]).require_grad();
    let bias = with_bias.then(|| bias_leaf.clone());
    let y = linear(x_leaf.clone(), w_leaf.clone(), bias, STRICT)?;
    check_tensor("y", y.clone(), &expected, [m, n])?;
    let grads = backward(y, tensor(&grad, [m, n]), case.strided_grad);
    let products = oracle.backward(&grad);
    let got = x_leaf.grad(&grads).expect("tracked");
    check_tensor("dx", got, &products.lhs, [m, k])?;
    let got = w_leaf.grad(&grads).expect("tracked");
    check_tensor("dw", got, &products.rhs, [k, n])?;
    match bias_leaf.grad(&grads) {
        Some(got) => check_tensor("db", got, &bias_grad, [n])?,
        None => prop_assert!(!with_bias, "the bias has no gradient"),
    }
    Ok(())
}

fn linear_equals_the_oracle<B: TrainingBackend>() {
    check(CASES, case(), |case| linear_case::<B>(&case));
}

/// TF32 keeps 10 bits of an operand; strict f32 must not lose the other 13.
fn strict_is_not_tf32<B: TrainingBackend>() {
    let (m, k, n) = (64, 96, 64);
    let lhs: Vec<f64> = vec![1.0 + 1.0 / 4096.0; m * k];
    let rhs: Vec<f64> = vec![1.0; k * n];
    let y = matmul(
        tensor::<B, 2>(&lhs, [m, k]),
        tensor::<B, 2>(&rhs, [k, n]),
        STRICT,
    )
    .unwrap();
    let expected = vec![k as f64 * (1.0 + 1.0 / 4096.0); m * n];
    let tolerance = Tolerance {
        atol: 0.0,
        rtol: 1e-5,
    };
    let shape: &[usize] = &[m, n];
    let values = |data| Values { shape, data };
    check_close("y", values(&host(y)), values(&expected), tolerance).unwrap();
}

/// TF32, where the device has it, and f32 where not.
fn tf32_is_near<B: TrainingBackend>() {
    let (m, k, n) = (67, 160, 33);
    let mut numbers = Numbers::new(3);
    let (lhs, rhs) = (numbers.values(m * k), numbers.values(k * n));
    let oracle = Matmul {
        lhs: &lhs,
        rhs: &rhs,
        batches: 1,
        m,
        k,
        n,
    };
    let y = matmul(
        tensor::<B, 2>(&lhs, [m, k]),
        tensor::<B, 2>(&rhs, [k, n]),
        MatmulPrecision::Tf32,
    )
    .unwrap();
    let error = hexa_ops::testing::compare::relative_error(&host(y), &oracle.forward());
    assert!(error < 1e-3, "{error:e}");
}

/// A product over nothing is zero, and one of no rows is empty.
fn empty_dimensions<B: TrainingBackend>() {
    if !burn_takes_no_elements("matmul_of_empty_dimensions") {
        return;
    }
    for (m, k, n) in [(0, 7, 3), (5, 7, 0), (5, 0, 3)] {
        let lhs = tensor::<B, 2>(&vec![1.0; m * k], [m, k]).require_grad();
        let rhs = tensor::<B, 2>(&vec![1.0; k * n], [k, n]).require_grad();
        let y = matmul(lhs.clone(), rhs.clone(), STRICT)
            .unwrap_or_else(|error| panic!("{m} {k} {n}: {error}"));
        check_tensor("y", y.clone(), &vec![0.0; m * n], [m, n]).unwrap();
        let grads = y.backward();
        let d_rhs = rhs.grad(&grads).expect("tracked");
        check_tensor("d rhs", d_rhs, &vec![m as f64; k * n], [k, n]).unwrap();
        let d_lhs = lhs.grad(&grads).expect("tracked");
        check_tensor("d lhs", d_lhs, &vec![n as f64; m * k], [m, k]).unwrap();
    }
}

/// f32 operands rounded on their way into a linear layer: against the oracle on rounded operands,
/// with gradients in the operands' own types.
fn rounded_operands<B: TrainingBackend>() {
    let device = Default::default();
    for (precision, dtype, unit) in [
        (MatmulPrecision::Bf16, DType::BF16, 1.0 / 256.0),
        (MatmulPrecision::F16, DType::F16, 1.0 / 2048.0),
    ] {
        if !supports_precision::<B>(&device, precision) {
            skip("linear_of_rounded_operands", &format!("no {dtype:?} here"));
            continue;
        }
        // The second shape's weight gradient is a sum in parts.
        for (m, k, n) in [(37, 24, 19), (1024, 8, 17)] {
            let mut numbers = Numbers::new(5);
            let (x, w) = (numbers.values(m * k), numbers.values(k * n));
            let (bias, grad) = (numbers.values(n), numbers.values(m * n));
            let x_leaf = tensor::<B, 2>(&x, [m, k]).require_grad();
            let w_leaf = tensor::<B, 2>(&w, [k, n]).require_grad();
            let bias_leaf = tensor::<B, 1>(&bias, [n]).require_grad();
            let to_half = |values: &[f64]| -> Vec<f64> {
                host(
                    tensor::<B, 1>(values, [values.len()])
                        .cast(dtype)
                        .cast(DType::F32),
                )
            };
            let (x, w, bias, half_grad) =
                (to_half(&x), to_half(&w), to_half(&bias), to_half(&grad));
            let oracle = Matmul {
                lhs: &x,
                rhs: &w,
                batches: 1,
                m,
                k,
                n,
            };
            let expected: Vec<f64> = oracle
                .forward()
                .iter()
                .enumerate()
                .map(|(i, y)| y + bias[i % n])
                .collect();
            let close = |name: &str, got: Tensor<B, 2>, expected: &[f64], rtol: f64| {
                let shape: &[usize] = &got.dims();
                let tolerance = Tolerance { atol: rtol, rtol };
                let values = |data| Values { shape, data };
                check_close(name, values(&host(got)), values(expected), tolerance).unwrap();
            };

            let y = linear(
                x_leaf.clone(),
                w_leaf.clone(),
                Some(bias_leaf.clone()),
                precision,
            )
            .unwrap();
            assert_eq!(y.dtype(), dtype);
            let y = y.cast(DType::F32);
            // The product is rounded, and the sum with the bias again.
            close("y", y.clone(), &expected, 2.0 * unit);
            let grads = (y * tensor(&grad, [m, n])).sum().backward();

            // The gradient arrives rounded; its products are f32 sums that nothing rounds.
            let products = oracle.backward(&half_grad);
            let (dx, dw) = (x_leaf.grad(&grads).unwrap(), w_leaf.grad(&grads).unwrap());
            assert_eq!((dx.dtype(), dw.dtype()), (DType::F32, DType::F32));
            let inner = |t| Tensor::<B, 2>::from_inner(t);
            close("dx", inner(dx), &products.lhs, 1e-5);
            close("dw", inner(dw), &products.rhs, 1e-4);
            let mut bias_grad = vec![0.0; n];
            for (i, g) in half_grad.iter().enumerate() {
                bias_grad[i % n] += g;
            }
            let db = bias_leaf.grad(&grads).unwrap();
            assert_eq!(db.dtype(), DType::F32);
            close("db", inner(db.reshape([1, n])), &bias_grad, 2.0 * unit);
        }
    }
}

/// The f32 sums of rounded operands, and gradients through them.
fn sums_are_handed_out<B: TrainingBackend>() {
    let device = Default::default();
    let precision = MatmulPrecision::Bf16;
    if !supports_precision::<B>(&device, precision) {
        skip("matmul_of_bf16_to_f32", "no BF16 here");
        return;
    }
    // 1 + 2⁻⁷ is a bf16 number; its square has twice the bits, which only f32 holds.
    let x = 1.0 + 1.0 / 128.0;
    let lhs = tensor::<B, 2>(&[x; 6], [3, 2]).require_grad();
    let rhs = tensor::<B, 2>(&[x; 4], [2, 2]).require_grad();
    let y = hexa_ops::matmul_to_f32(
        lhs.clone().cast(DType::BF16),
        rhs.clone().cast(DType::BF16),
        precision,
    )
    .unwrap();
    assert_eq!(y.dtype(), DType::F32);
    assert_eq!(host(y.clone()), vec![2.0 * x * x; 6]);
    let grads = y.sum().backward();
    let got = host(Tensor::<B, 2>::from_inner(rhs.grad(&grads).unwrap()));
    // 3 + 3/128 takes nine bits.
    assert_eq!(got, vec![3.0 + 4.0 / 128.0; 4]);
}

fn two_runs_have_the_same_bits<B: TrainingBackend>() {
    let mut numbers = Numbers::new(9);
    let lhs = tensor::<B, 2>(&numbers.values(129 * 288), [129, 288]);
    let rhs = tensor::<B, 2>(&numbers.values(288 * 65), [288, 65]);
    let run = || matmul(lhs.clone(), rhs.clone(), STRICT).unwrap();
    let first = run();
    assert_eq!(first.dtype(), DType::F32);
    assert!(same_bits(first, run()));
}

backend_test!(matmul_equals_the_oracle, equals_the_oracle);
backend_test!(linear_matches, linear_equals_the_oracle);
backend_test!(strict_matmul_is_not_tf32, strict_is_not_tf32);
backend_test!(tf32_matmul_is_near, tf32_is_near);
backend_test!(linear_of_rounded_operands, rounded_operands);
backend_test!(matmul_of_bf16_to_f32, sums_are_handed_out);
backend_test!(matmul_of_empty_dimensions, empty_dimensions);
backend_test!(matmul_is_deterministic, two_runs_have_the_same_bits);
