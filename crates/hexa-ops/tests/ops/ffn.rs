//! The fused expert FFN against the oracle and against central differences of it.

use burn::tensor::DType;
use hexa_ops::testing::backend::{TestBackend, skip};
use hexa_ops::testing::compare::{Tolerance, Values, check_close};
use hexa_ops::testing::oracle::{FfnTensors, Routing};
use hexa_ops::{Activation, Favor, TrainingBackend, backend_test};
use proptest::prelude::*;
use proptest::test_runner::TestCaseError;

use crate::cases::{
    CASES, Layout, Outcome, RoutingCase, Spread, burn_takes_no_elements, check, fewer, most_tokens,
};
use crate::ffn_case::{ALL_TRACKED, FfnCase, FfnProblem, FfnRun, ffn_case, run, run_through};

fn close(name: &str, got: &[f64], expected: &[f64], tolerance: Tolerance) -> Outcome {
    let flat = |data| Values { shape: &[], data };
    check_close(name, flat(got), flat(expected), tolerance)?;
    Ok(())
}

/// Compares the gradients of what is tracked with `expected`, and that there are no others.
pub fn compare_grads(run: &FfnRun, expected: &FfnTensors, tolerance: Tolerance) -> Outcome {
    for ((name, expected), got) in expected.named().iter().zip(&run.grads) {
        if let (Some(got), Some(expected)) = (got, expected) {
            close(name, got, expected, tolerance)?;
        }
    }
    Ok(())
}

/// A parameter's gradient is exactly zero for experts without slots, and not for the others.
///
/// ReLU, dropout and gate weights of zero may block every path to a busy expert's weights.
fn check_idle_experts(routing: &Routing, run: &FfnRun, always_open: bool) -> Outcome {
    for grad in run.grads[2..].iter().flatten() {
        let per_expert = grad.len() / routing.num_experts;
        for (expert, count) in routing.counts().into_iter().enumerate() {
            let block = &grad[expert * per_expert..(expert + 1) * per_expert];
            if count == 0 {
                prop_assert!(block.iter().all(|&v| v == 0.0), "expert {expert} is idle");
            } else if always_open {
                prop_assert!(
                    block.iter().any(|&v| v != 0.0),
                    "expert {expert} has {count} slots"
                );
            }
        }
    }
    Ok(())
}

/// Parameters up to which central differences of the oracle are affordable.
const FEW: usize = 120;

fn one_case<B: TrainingBackend>(case: &FfnCase) -> Outcome {
    let problem = case.problem();
    let FfnProblem {
        ffn,
        inputs,
        grad_output,
    } = &problem;
    if problem.is_near_a_kink(1e-4) {
        return Err(TestCaseError::reject("ReLU's slope depends on rounding"));
    }
    let tolerance = Tolerance::of(DType::F32);
    let got = run::<B>(case, &problem, ALL_TRACKED)?;
    close("output", &got.output, &ffn.forward(inputs), tolerance)?;
    let expected = ffn.backward(inputs, grad_output);
    for ((name, expected), got) in expected.named().iter().zip(&got.grads) {
        prop_assert_eq!(expected.is_some(), got.is_some(), "{}", name);
    }
    compare_grads(&got, &expected, tolerance)?;
    let always_open = case.activation != Activation::Relu && case.dropout == 0.0;
    check_idle_experts(&ffn.routing, &got, always_open)?;

    let parameters: usize = inputs
        .named()
        .iter()
        .filter_map(|(_, v)| Some(v.as_ref()?.len()))
        .sum();
    if parameters <= FEW {
        let numeric = ffn.central_differences(inputs, grad_output, 1e-5);
        compare_grads(&got, &numeric, tolerance)?;
    }
    Ok(())
}

fn equals_the_oracle<B: TrainingBackend>() {
    check(CASES, ffn_case(most_tokens()), |case| one_case::<B>(&case));
}

/// Shapes so small that every case is also compared with central differences.
fn equals_central_differences<B: TrainingBackend>() {
    let small = ffn_case(4).prop_map(|mut case| {
        let shrink = |n: usize| 1 + n % 3;
        case.d_model = shrink(case.d_model);
        case.d_ff = shrink(case.d_ff);
        case.routing.num_experts = 1 + case.routing.num_experts % 3;
        case.routing.top_k = case.routing.top_k.min(case.routing.num_experts);
        case
    });
    check(CASES, small, |case| {
        let problem = case.problem();
        if problem.is_near_a_kink(1e-4) {
            return Err(TestCaseError::reject("ReLU's slope depends on rounding"));
        }
        let got = run::<B>(&case, &problem, ALL_TRACKED)?;
        let (ffn, inputs) = (&problem.ffn, &problem.inputs);
        let numeric = ffn.central_differences(inputs, &problem.grad_output, 1e-5);
        compare_grads(&got, &numeric, Tolerance::of(DType::F32))
    });
}

fn named_case(tokens: usize, top_k: usize, num_experts: usize, spread: Spread) -> FfnCase {
    FfnCase {
        routing: RoutingCase {
            tokens,
            top_k,
            num_experts,
            spread,
            seed: 17,
        },
        d_model: 19,
        d_ff: 37,
        activation: Activation::Gelu,
        biases: (true, true),
        dropout: 0.0,
        dropout_seed: [1, 2],
        favor: Favor::Speed,
        layouts: [Layout::Contiguous; FfnTensors::COUNT],
        strided_grad: false,
        seed: 23,
    }
}

/// The inputs that random search might miss, with every activation, with and without dropout.
fn ordinary_inputs<B: TrainingBackend>() {
    for (tokens, top_k, num_experts, spread) in [
        (0, 2, 4, Spread::Distinct),
        (1, 1, 1, Spread::One),
        (1, 3, 3, Spread::Distinct),
        (67, 1, 5, Spread::One),
        (29, 5, 5, Spread::Distinct),
        (41, 2, 8, Spread::Even),
        (130, 1, 2, Spread::Free),
    ] {
        if tokens == 0 && !burn_takes_no_elements("ffn_of_no_tokens") {
            continue;
        }
        for activation in Activation::ALL {
            for dropout in [0.0, 0.3] {
                let case = FfnCase {
                    activation,
                    dropout,
                    ..named_case(tokens, top_k, num_experts, spread)
                };
                match one_case::<B>(&case) {
                    Ok(()) | Err(TestCaseError::Reject(_)) => {}
                    Err(failure) => panic!("{case:?}: {failure}"),
                }
            }
        }
    }
}

/// Widths beyond one tile of any kernel, none a multiple of a tile.
fn wide_layers<B: TrainingBackend>() {
    for (d_model, d_ff, activation) in [
        (96, 130, Activation::Gelu),
        (67, 65, Activation::SwiGlu),
        (129, 31, Activation::GeGlu),
    ] {
        let case = FfnCase {
            d_model,
            d_ff,
            activation,
            ..named_case(150, 2, 3, Spread::Distinct)
        };
        one_case::<B>(&case).unwrap_or_else(|failure| panic!("{case:?}: {failure}"));
    }
}

/// Half-precision tensors with f32 accumulators.
fn half_precision<B: TrainingBackend>() {
    for dtype in [DType::F16, DType::BF16] {
        if !B::supports_dtype(&B::Device::default(), dtype) {
            skip("ffn_in_half_precision", &format!("no {dtype:?} here"));
            continue;
        }
        for activation in Activation::ALL {
            let case = FfnCase {
                activation,
                ..named_case(23, 2, 5, Spread::Even)
            };
            let allowed = Tolerance::of(dtype).rtol;
            half_precision_case::<B>(&case, dtype, allowed)
                .unwrap_or_else(|failure| panic!("{dtype:?} {activation:?}: {failure}"));
        }
    }
}

/// One case in half precision: what is asked for are relative errors of norms. Single elements may
/// cancel, all rounding errors together may not.
fn half_precision_case<B: TrainingBackend>(case: &FfnCase, dtype: DType, allowed: f64) -> Outcome {
    // Multiples of 1/32 up to one are exact in both types.
    let problem = case.problem_on(1.0 / 32.0);
    let FfnProblem { ffn, inputs, .. } = &problem;
    let got = run_through::<B>(case, &problem, ALL_TRACKED, Some(dtype), |x, p| (x, p))?;
    norm_error("output", &got.output, &ffn.forward(inputs), allowed)?;
    let expected = ffn.backward(inputs, &problem.grad_output);
    for ((name, expected), got) in expected.named().iter().zip(&got.grads) {
        if let (Some(got), Some(expected)) = (got, expected) {
            norm_error(name, got, expected, allowed)?;
        }
    }
    check_idle_experts(&ffn.routing, &got, false)?;
    let again = run_through::<B>(case, &problem, ALL_TRACKED, Some(dtype), |x, p| (x, p))?;
    prop_assert!(bits(&got) == bits(&again), "two runs differ");
    Ok(())
}

/// Widths in multiples of eight, which matrix units take, at the shapes of several tiles.
fn half_precision_of_aligned_widths<B: TrainingBackend>() {
    for dtype in [DType::F16, DType::BF16] {
        if !B::supports_dtype(&B::Device::default(), dtype) {
            skip(
                "ffn_in_half_precision_of_aligned_widths",
                &format!("no {dtype:?} here"),
            );
            continue;
        }
        let d_model = prop::sample::select(vec![8_usize, 16, 24, 64, 72, 136, 200, 264]);
        let d_ff = prop::sample::select(vec![8_usize, 24, 64, 72, 136, 264, 392, 520]);
        let cases =
            (ffn_case(most_half_tokens()), d_model, d_ff).prop_map(|(mut case, d_model, d_ff)| {
                // The roundings of few numbers, one token's gate gradient for one, may all add up.
                case.routing.tokens = case.routing.tokens.max(32);
                case.d_model = d_model;
                case.d_ff = d_ff;
                if case.dropout < 0.4 {
                    case.dropout = 0.0;
                }
                case
            });
        check(fewer(HALF_CASES), cases, |case| {
            // ReLU's slope at a pre-activation that rounds to zero is a matter of luck.
            if case.activation == Activation::Relu && case.routing.tokens * case.d_ff < 5000 {
                return Err(TestCaseError::reject("too few elements for a norm"));
            }
            // Back-ends that round after each operation err more than those that sum in f32.
            let on_cuda = TestBackend::selected().is_ok_and(|b| b == TestBackend::Cuda);
            let allowed = if on_cuda { 1e-2 } else { 3e-2 };
            half_precision_case::<B>(&case, dtype, allowed)
        });
    }
}

/// Shapes in each of the two types.
const HALF_CASES: u32 = 250;

fn most_half_tokens() -> usize {
    let small =
        TestBackend::selected().is_ok_and(|b| b == TestBackend::Cpu || b.prefers_small_shapes());
    if small { 40 } else { 600 }
}

/// Tokens, choices, experts, how tokens are spread over these, `d_model`, `d_ff`, and what is favored.
type LargeLayer = (usize, usize, usize, Spread, usize, usize, Favor);

/// Results that take the largest tiles, one expert that has everything, and a wide layer in windows.
fn half_precision_of_large_results<B: TrainingBackend>() {
    half_precision_of::<B>(
        "ffn_in_half_precision_of_large_results",
        &[
            (150, 2, 8, Spread::Distinct, 376, 1528, Favor::Speed),
            (150, 1, 8, Spread::One, 376, 1528, Favor::Speed),
            (300, 2, 3, Spread::Distinct, 512, 520, Favor::Speed),
            (300, 2, 3, Spread::Distinct, 520, 504, Favor::Speed),
            (9000, 2, 2, Spread::Distinct, 16, 1024, Favor::Memory),
        ],
    );
}

/// So many tokens that last rounds are halved, sums are cut into parts and a pass is cut into windows.
fn half_precision_of_many_tokens<B: TrainingBackend>() {
    half_precision_of::<B>(
        "ffn_in_half_precision_of_many_tokens",
        &[
            (6000, 2, 3, Spread::Distinct, 512, 136, Favor::Speed),
            (9216, 2, 2, Spread::Distinct, 376, 72, Favor::Speed),
            (2500, 1, 1, Spread::One, 264, 136, Favor::Speed),
            (9000, 2, 3, Spread::Free, 8, 512, Favor::Memory),
        ],
    );
}

/// Compares layers with the oracle. Where many tokens cost too much the same widths have few.
fn half_precision_of<B: TrainingBackend>(test: &'static str, layers: &[LargeLayer]) {
    let few = most_half_tokens() < 600;
    for &(tokens, top_k, num_experts, spread, d_model, d_ff, favor) in layers {
        let case = FfnCase {
            d_model,
            d_ff,
            favor,
            ..named_case(if few { 30 } else { tokens }, top_k, num_experts, spread)
        };
        for dtype in [DType::F16, DType::BF16] {
            if !B::supports_dtype(&B::Device::default(), dtype) {
                skip(test, &format!("no {dtype:?} here"));
                continue;
            }
            let allowed = Tolerance::of(dtype).rtol;
            half_precision_case::<B>(&case, dtype, allowed)
                .unwrap_or_else(|failure| panic!("{dtype:?} {case:?}: {failure}"));
        }
    }
}

fn norm_error(name: &str, got: &[f64], expected: &[f64], allowed: f64) -> Outcome {
    let error = hexa_ops::testing::compare::relative_error(got, expected);
    prop_assert!(error <= allowed, "{name}: relative error {error:e}");
    Ok(())
}

fn two_runs_have_the_same_bits<B: TrainingBackend>() {
    check(fewer(24), ffn_case(most_tokens()), |case| {
        let problem = case.problem();
        let first = run::<B>(&case, &problem, ALL_TRACKED)?;
        let second = run::<B>(&case, &problem, ALL_TRACKED)?;
        prop_assert!(bits(&first) == bits(&second), "two runs differ");
        Ok(())
    });
}

/// The bits of a run; equality of floats would not tell zeros apart.
pub fn bits(run: &FfnRun) -> Vec<Vec<u64>> {
    std::iter::once(&run.output)
        .chain(run.grads.iter().flatten())
        .map(|values| values.iter().map(|v| v.to_bits()).collect())
        .collect()
}

backend_test!(ffn_equals_the_oracle, equals_the_oracle);
backend_test!(ffn_equals_central_differences, equals_central_differences);
backend_test!(ffn_of_ordinary_inputs, ordinary_inputs);
backend_test!(ffn_of_wide_layers, wide_layers);
backend_test!(ffn_in_half_precision, half_precision);
backend_test!(
    ffn_in_half_precision_of_aligned_widths,
    half_precision_of_aligned_widths
);
backend_test!(
    ffn_in_half_precision_of_large_results,
    half_precision_of_large_results
);
backend_test!(
    ffn_in_half_precision_of_many_tokens,
    half_precision_of_many_tokens
);
backend_test!(ffn_is_deterministic, two_runs_have_the_same_bits);
