//! The fused FFN as a node of Burn's graph: checkpointing strategies and frozen parameters.

use burn::backend::Autodiff;
use burn::backend::autodiff::checkpoint::strategy::BalancedCheckpointing;
use burn::tensor::{DType, Tensor};
use hexa_ops::testing::compare::{Tolerance, host};
use hexa_ops::testing::oracle::FfnTensors;
use hexa_ops::{
    EsmmOptions, ExpertIndex, ExpertKernels, ExpertParams, RowOrder, TrainingBackend, backend_test,
    esmm, estmm,
};
use proptest::prelude::*;
use proptest::test_runner::TestCaseError;

use crate::cases::{Numbers, check, expert_ids, fewer, most_tokens, routing_case, tensor};
use crate::ffn::{bits, compare_grads};
use crate::ffn_case::{
    ALL_TRACKED, FfnCase, FfnProblem, FfnRun, Tracked, ffn_case, run, run_through,
};

/// Multiplies what the operator reads by a half and shifts it by a quarter, in operations that
/// `BalancedCheckpointing` recomputes in the backward pass instead of keeping their results.
fn through_cheap_operations<B: TrainingBackend>(
    case: &FfnCase,
    problem: &FfnProblem,
) -> hexa_ops::Result<FfnRun> {
    run_through::<B>(case, problem, ALL_TRACKED, None, |x, params| {
        let cheap = |t: Tensor<B, 3>| t.mul_scalar(0.5).add_scalar(0.25);
        (
            x.mul_scalar(0.5).add_scalar(0.25),
            ExpertParams {
                w1: cheap(params.w1),
                w2: cheap(params.w2),
                ..params
            },
        )
    })
}

fn both_strategies<K: ExpertKernels>() {
    check(fewer(40), ffn_case(24), |case| {
        let problem = case.problem();
        let kept = through_cheap_operations::<Autodiff<K>>(&case, &problem)?;
        let recomputed =
            through_cheap_operations::<Autodiff<K, BalancedCheckpointing>>(&case, &problem)?;
        prop_assert!(bits(&kept) == bits(&recomputed), "the strategies differ");

        // And both are right: the oracle at the shifted point, with the chain rule's half.
        let FfnProblem {
            ffn,
            inputs,
            grad_output,
        } = &problem;
        let shift = |values: &[f64]| values.iter().map(|v| v * 0.5 + 0.25).collect();
        let shifted = FfnTensors {
            x: shift(&inputs.x),
            w1: shift(&inputs.w1),
            w2: shift(&inputs.w2),
            ..inputs.clone()
        };
        let moved = FfnProblem {
            ffn: ffn.clone(),
            inputs: shifted,
            grad_output: grad_output.clone(),
        };
        if moved.is_near_a_kink(1e-4) {
            return Err(TestCaseError::reject("ReLU's slope depends on rounding"));
        }
        let mut expected = ffn.backward(&moved.inputs, grad_output);
        for values in [&mut expected.x, &mut expected.w1, &mut expected.w2] {
            values.iter_mut().for_each(|v| *v *= 0.5);
        }
        compare_grads(&kept, &expected, Tolerance::of(DType::F32))
    });
}

/// Any subset of the inputs may be frozen: the others' gradients stay, the frozen get none.
fn any_subset_may_be_frozen<B: TrainingBackend>() {
    let subsets = (ffn_case(most_tokens().min(32)), 1..63_u8);
    check(fewer(80), subsets, |(case, subset)| {
        let mut tracked: Tracked = core::array::from_fn(|i| subset & (1 << i) != 0);
        tracked[3] &= case.biases.0;
        tracked[5] &= case.biases.1;
        let problem = case.problem();
        if problem.is_near_a_kink(1e-4) || !tracked.contains(&true) {
            return Err(TestCaseError::reject("no gradient to compare"));
        }
        let got = run::<B>(&case, &problem, tracked)?;
        for (grad, tracked) in got.grads.iter().zip(tracked) {
            prop_assert_eq!(grad.is_some(), tracked);
        }
        let expected = problem.ffn.backward(&problem.inputs, &problem.grad_output);
        compare_grads(&got, &expected, Tolerance::of(DType::F32))
    });
}

/// Each input alone, for both operators with several operands.
fn operands_alone<B: TrainingBackend>() {
    check(fewer(20), routing_case(24), |case| {
        let routing = case.routing();
        let (a, b) = (5, 7);
        let mut numbers = Numbers::new(case.seed);
        let mut draw =
            |shape: [usize; 2]| tensor::<B, 2>(&numbers.values(shape[0] * shape[1]), shape);
        let x = draw([routing.tokens, a]);
        let dy = draw([routing.num_slots(), b]);
        let bias = draw([routing.num_experts, b]);
        let w = draw([routing.num_experts * a, b]).reshape([routing.num_experts, a, b]);
        let index = ExpertIndex::<B>::new(expert_ids(&routing), routing.num_experts)?;

        type Grads = [Option<Vec<f64>>; 3];
        let esmm_grads = |on: [bool; 3]| -> hexa_ops::Result<Grads> {
            let x = x.clone().set_require_grad(on[0]);
            let w = w.clone().set_require_grad(on[1]);
            let bias = bias.clone().set_require_grad(on[2]);
            let options = EsmmOptions::default();
            let y = esmm(x.clone(), w.clone(), Some(bias.clone()), &index, options)?;
            let grads = (y * dy.clone()).backward();
            Ok([
                x.grad(&grads).map(host),
                w.grad(&grads).map(host),
                bias.grad(&grads).map(host),
            ])
        };
        let together = esmm_grads([true; 3])?;
        for alone in 0..3 {
            let grads = esmm_grads(core::array::from_fn(|i| i == alone))?;
            for (i, grad) in grads.iter().enumerate() {
                prop_assert_eq!(grad.is_some(), i == alone);
            }
            prop_assert_eq!(&grads[alone], &together[alone]);
        }

        let estmm_grads = |on: [bool; 2]| -> hexa_ops::Result<[Option<Vec<f64>>; 2]> {
            let x = x.clone().set_require_grad(on[0]);
            let dy = dy.clone().set_require_grad(on[1]);
            let m = estmm(
                x.clone(),
                RowOrder::Token,
                dy.clone(),
                RowOrder::Slot,
                &index,
            )?;
            let grads = (m * w.clone()).backward();
            Ok([x.grad(&grads).map(host), dy.grad(&grads).map(host)])
        };
        let together = estmm_grads([true; 2])?;
        for alone in 0..2 {
            let grads = estmm_grads(core::array::from_fn(|i| i == alone))?;
            prop_assert_eq!(grads[1 - alone].is_some(), false);
            prop_assert_eq!(&grads[alone], &together[alone]);
        }
        Ok(())
    });
}

/// One leaf in two places: both paths' gradients add up.
fn a_shared_operand<B: TrainingBackend>() {
    let case = FfnCase {
        // With d_model = top_k the tokens can be their own gate weights.
        d_model: 2,
        ..shared_case()
    };
    let problem = case.problem();
    let FfnProblem {
        ffn,
        inputs,
        grad_output,
    } = &problem;
    let inputs = FfnTensors {
        gates: inputs.x.clone(),
        ..inputs.clone()
    };
    let expected = ffn.backward(&inputs, grad_output);
    let sum: Vec<f64> = (expected.x.iter().zip(&expected.gates))
        .map(|(x, g)| x + g)
        .collect();

    let routing = &ffn.routing;
    let (tokens, experts, h) = (routing.tokens, routing.num_experts, ffn.hidden_width());
    let x = tensor::<B, 2>(&inputs.x, [tokens, 2]).require_grad();
    let index = ExpertIndex::new(expert_ids(routing), experts).unwrap();
    let params = ExpertParams {
        w1: tensor(&inputs.w1, [experts, 2, h]),
        b1: None,
        w2: tensor(&inputs.w2, [experts, case.d_ff, 2]),
        b2: None,
    };
    let options = case.options();
    let y = hexa_ops::expert_ffn(x.clone(), x.clone(), params, &index, options, None).unwrap();
    let grads = (y * tensor(grad_output, [tokens, 2])).backward();
    let got = x.grad(&grads).expect("x is tracked");
    hexa_ops::testing::compare::check_tensor("x", got, &sum, [tokens, 2]).unwrap();
}

fn shared_case() -> FfnCase {
    FfnCase {
        routing: crate::cases::RoutingCase {
            tokens: 13,
            top_k: 2,
            num_experts: 3,
            spread: crate::cases::Spread::Distinct,
            seed: 1,
        },
        d_model: 2,
        d_ff: 5,
        activation: hexa_ops::Activation::Silu,
        biases: (false, false),
        dropout: 0.0,
        dropout_seed: [0, 0],
        favor: hexa_ops::Favor::Speed,
        layouts: [crate::cases::Layout::Contiguous; FfnTensors::COUNT],
        strided_grad: false,
        seed: 2,
    }
}

/// Without autodiff the operator is the same.
fn inference_is_the_same<B: TrainingBackend>() {
    let case = shared_case();
    let problem = case.problem();
    let tracked = run::<B>(&case, &problem, ALL_TRACKED).unwrap();
    let routing = &problem.ffn.routing;
    let (tokens, experts, h) = (
        routing.tokens,
        routing.num_experts,
        problem.ffn.hidden_width(),
    );
    let inputs = &problem.inputs;
    let params = ExpertParams::<B::InnerBackend> {
        w1: tensor(&inputs.w1, [experts, 2, h]),
        b1: None,
        w2: tensor(&inputs.w2, [experts, case.d_ff, 2]),
        b2: None,
    };
    let y = hexa_ops::expert_ffn(
        tensor(&inputs.x, [tokens, 2]),
        tensor(&inputs.gates, [tokens, 2]),
        params,
        &ExpertIndex::new(expert_ids(routing), experts).unwrap(),
        case.options(),
        None,
    )
    .unwrap();
    assert_eq!(host(y), tracked.output);
}

backend_test!(kernels checkpointing_changes_nothing, both_strategies);
backend_test!(any_inputs_may_be_frozen, any_subset_may_be_frozen);
backend_test!(operands_may_be_tracked_alone, operands_alone);
backend_test!(an_operand_may_appear_twice, a_shared_operand);
backend_test!(inference_equals_training, inference_is_the_same);
