//! The formulas of the backward passes against central differences, in f64 on the CPU: wherever
//! the kernels are wrong, these tell whether the formulas are.

#[cfg(feature = "cpu")]
mod cpu {
    use burn::backend::Autodiff;
    use burn::tensor::Tensor;
    use hexa_ops::backends::Cpu;
    use hexa_ops::testing::gradcheck::{Variable, gradcheck};
    use hexa_ops::{
        EsmmOptions, ExpertIndex, ExpertParams, MatmulPrecision, RowOrder, esmm, ess, estmm,
        expert_ffn, linear, matmul, topk_gating,
    };
    use proptest::prelude::*;
    use proptest::test_runner::TestCaseError;

    use crate::cases::{
        CASES, Numbers, Outcome, RoutingCase, check, expert_ids, routing_case, seed_tensor,
    };
    use crate::ffn_case::{FfnProblem, ffn_case};

    type B = Autodiff<Cpu>;

    fn variable(name: &'static str, shape: &[usize], numbers: &mut Numbers) -> Variable {
        Variable {
            name,
            shape: shape.to_vec(),
            values: numbers.values(shape.iter().product()),
        }
    }

    /// Gradcheck of a function of at least one element.
    fn verify(
        variables: &[Variable],
        f: impl Fn(&[Tensor<B, 1>]) -> hexa_ops::Result<Tensor<B, 1>>,
    ) -> Outcome {
        let device = Default::default();
        gradcheck::<B>(&device, variables, |inputs| {
            f(inputs).unwrap_or_else(|error| panic!("{error}"))
        })?;
        Ok(())
    }

    fn flat<const D: usize>(tensor: Tensor<B, D>) -> Tensor<B, 1> {
        let len = tensor.shape().num_elements();
        tensor.reshape([len])
    }

    fn index(case: &RoutingCase) -> hexa_ops::Result<ExpertIndex<B>> {
        ExpertIndex::new(expert_ids(&case.routing()), case.num_experts)
    }

    /// Few tokens, so that each variable can be moved; a function of nothing has no gradient.
    fn few_tokens() -> impl Strategy<Value = RoutingCase> {
        routing_case(6).prop_map(|case| RoutingCase {
            tokens: case.tokens.max(1),
            num_experts: case.num_experts.min(4),
            top_k: case.top_k.min(case.num_experts.min(4)),
            ..case
        })
    }

    #[test]
    fn gating() {
        let shape = (1..=4_usize, 1..=6_usize, any::<bool>(), any::<u64>());
        let case = shape.prop_flat_map(|(t, e, n, s)| (Just((t, e, n, s)), 1..=e));
        check(
            CASES,
            case,
            |((tokens, num_experts, normalize, seed), top_k)| {
                let mut numbers = Numbers::new(seed);
                // Apart by more than a step of the differences, or the choice itself would change.
                let mut logits = Vec::new();
                for _ in 0..tokens {
                    let mut ranks: Vec<usize> = (0..num_experts).collect();
                    for _ in 0..num_experts {
                        let rank = ranks.swap_remove(numbers.below(ranks.len()));
                        logits.push(0.4 * rank as f64 + 0.1 * numbers.value());
                    }
                }
                let logits = Variable {
                    name: "logits",
                    shape: vec![tokens, num_experts],
                    values: logits,
                };
                verify(&[logits], |inputs| {
                    let logits = inputs[0].clone().reshape([tokens, num_experts]);
                    let gating = topk_gating(logits, top_k, normalize)?;
                    // A curved function of the weights, so that their gradient is not constant.
                    let weights = flat(gating.weights);
                    Ok(Tensor::cat(
                        vec![weights.clone() * weights, flat(gating.probs)],
                        0,
                    ))
                })
            },
        );
    }

    #[test]
    fn esmm_in_all_orders() {
        let orders = [RowOrder::Token, RowOrder::Slot, RowOrder::Expert];
        let case = (
            few_tokens(),
            (1..=3_usize, 1..=3_usize),
            prop::sample::select(orders.to_vec()),
            (any::<bool>(), any::<bool>(), any::<bool>()),
        );
        check(
            CASES,
            case,
            |(case, (a, b), x_order, (transposed, with_bias, by_slot))| {
                let index = index(&case)?;
                let mut numbers = Numbers::new(case.seed);
                let x_shape = [case.routing().num_rows(x_order), a];
                let w_shape = if transposed {
                    [case.num_experts, b, a]
                } else {
                    [case.num_experts, a, b]
                };
                let mut variables = vec![
                    variable("x", &x_shape, &mut numbers),
                    variable("w", &w_shape, &mut numbers),
                ];
                if with_bias {
                    variables.push(variable("bias", &[case.num_experts, b], &mut numbers));
                }
                let options = EsmmOptions {
                    x_order,
                    transposed,
                    out_order: if by_slot {
                        RowOrder::Slot
                    } else {
                        RowOrder::Expert
                    },
                };
                verify(&variables, |inputs| {
                    let x = inputs[0].clone().reshape(x_shape);
                    let w = inputs[1].clone().reshape(w_shape);
                    let bias = inputs
                        .get(2)
                        .map(|t| t.clone().reshape([case.num_experts, b]));
                    Ok(flat(esmm(x, w, bias, &index, options)?))
                })
            },
        );
    }

    #[test]
    fn estmm_and_ess_in_all_orders() {
        let orders = [RowOrder::Token, RowOrder::Slot, RowOrder::Expert];
        let order = || prop::sample::select(orders.to_vec());
        let case = (few_tokens(), (1..=3_usize, 1..=3_usize), (order(), order()));
        check(CASES, case, |(case, (a, b), (a_order, b_order))| {
            let index = index(&case)?;
            let mut numbers = Numbers::new(case.seed);
            let a_shape = [case.routing().num_rows(a_order), a];
            let b_shape = [case.routing().num_rows(b_order), b];
            let variables = [
                variable("a", &a_shape, &mut numbers),
                variable("b", &b_shape, &mut numbers),
            ];
            verify(&variables, |inputs| {
                let a = inputs[0].clone().reshape(a_shape);
                let b = inputs[1].clone().reshape(b_shape);
                let products = estmm(a.clone(), a_order, b, b_order, &index)?;
                let sums = ess(a, a_order, &index)?;
                Ok(Tensor::cat(vec![flat(products), flat(sums)], 0))
            })
        });
    }

    #[test]
    fn ffn_with_every_activation() {
        let small = ffn_case(4).prop_map(|mut case| {
            case.routing.tokens = case.routing.tokens.max(1);
            case.routing.num_experts = 1 + case.routing.num_experts % 3;
            case.routing.top_k = case.routing.top_k.min(case.routing.num_experts);
            case.d_model = 1 + case.d_model % 3;
            case.d_ff = 1 + case.d_ff % 3;
            case
        });
        check(CASES, small, |case| {
            let problem = case.problem();
            if problem.is_near_a_kink(1e-3) {
                return Err(TestCaseError::reject("ReLU has no derivative there"));
            }
            let FfnProblem { ffn, inputs, .. } = &problem;
            let index = index(&case.routing)?;
            let (t, k, e) = (
                ffn.routing.tokens,
                ffn.routing.top_k,
                case.routing.num_experts,
            );
            let (d, f, h) = (ffn.d_model, ffn.d_ff, ffn.hidden_width());
            let variables: Vec<Variable> = inputs
                .named()
                .into_iter()
                .filter_map(|(name, values)| {
                    let values = values?.to_vec();
                    let shape = vec![values.len()];
                    Some(Variable {
                        name,
                        shape,
                        values,
                    })
                })
                .collect();
            let seed = (case.dropout > 0.0).then(|| seed_tensor(case.dropout_seed));
            verify(&variables, |inputs| {
                let mut inputs = inputs.iter().cloned();
                let mut next = || inputs.next().expect("one tensor per variable");
                let x = next().reshape([t, d]);
                let gates = next().reshape([t, k]);
                let w1 = next().reshape([e, d, h]);
                let b1 = case.biases.0.then(|| next().reshape([e, h]));
                let w2 = next().reshape([e, f, d]);
                let b2 = case.biases.1.then(|| next().reshape([e, d]));
                let params = ExpertParams { w1, b1, w2, b2 };
                let y = expert_ffn(x, gates, params, &index, case.options(), seed.clone())?;
                Ok(flat(y))
            })
        });
    }

    #[test]
    fn oracle_of_the_ffn() {
        let small = ffn_case(3).prop_map(|mut case| {
            case.d_model = 1 + case.d_model % 3;
            case.d_ff = 1 + case.d_ff % 3;
            case
        });
        check(CASES, small, |case| {
            let FfnProblem {
                ffn,
                inputs,
                grad_output,
            } = &case.problem();
            if case.problem().is_near_a_kink(1e-3) {
                return Err(TestCaseError::reject("ReLU has no derivative there"));
            }
            let analytic = ffn.backward(inputs, grad_output);
            let numeric = ffn.central_differences(inputs, grad_output, 1e-5);
            for ((name, a), (_, n)) in analytic.named().into_iter().zip(numeric.named()) {
                for (a, n) in a.unwrap_or_default().iter().zip(n.unwrap_or_default()) {
                    prop_assert!((a - n).abs() <= 1e-7 + 1e-6 * n.abs(), "{name}: {a} {n}");
                }
            }
            Ok(())
        });
    }

    #[test]
    fn dense_products() {
        let case = (
            1..=2_usize,
            1..=4_usize,
            1..=4_usize,
            1..=4_usize,
            any::<u64>(),
        );
        check(CASES, case, |(batch, m, k, n, seed)| {
            let mut numbers = Numbers::new(seed);
            let variables = [
                variable("lhs", &[batch, m, k], &mut numbers),
                variable("rhs", &[batch, k, n], &mut numbers),
                variable("bias", &[n], &mut numbers),
            ];
            verify(&variables, |inputs| {
                let lhs = inputs[0].clone().reshape([batch, m, k]);
                let rhs = inputs[1].clone().reshape([batch, k, n]);
                let strict = MatmulPrecision::Strict;
                let product = matmul(lhs.clone(), rhs.clone(), strict)?;
                let rows = lhs.reshape([batch * m, k]);
                let first = rhs.narrow(0, 0, 1).reshape([k, n]);
                let line = linear(rows, first, Some(inputs[2].clone()), strict)?;
                Ok(Tensor::cat(vec![flat(product), flat(line)], 0))
            })
        });
    }
}

#[cfg(not(feature = "cpu"))]
#[test]
fn formulas_need_the_cpu() {
    hexa_ops::testing::backend::skip("formulas", "built without the feature cpu");
}
