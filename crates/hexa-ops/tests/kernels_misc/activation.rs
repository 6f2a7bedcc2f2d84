//! Activation, dropout and their gradients.

use burn::tensor::{DType, FloatDType};
use hexa_ops::backend::{FfnActivationGradArgs, RawExpertIndex};
use hexa_ops::dropout::dropout_uniform;
use hexa_ops::testing::backend::TestBackend;
use hexa_ops::testing::oracle::{Routing, activate, activation_slope};
use hexa_ops::{Activation, ExpertKernels, FfnOptions, backend_test};

use burn::tensor::ops::IntTensor;

use crate::{Numbers, assert_close, float, floats, int, raw};

const SEED: [u32; 2] = [0x9e37_79b9, 0xffff_fff7];

struct Case {
    routing: Routing,
    d_ff: usize,
    d_model: usize,
    options: FfnOptions,
}

impl Case {
    fn new(
        numbers: &mut Numbers,
        [tokens, top_k, num_experts, d_ff, d_model]: [usize; 5],
        options: FfnOptions,
    ) -> Self {
        let ids = (0..tokens * top_k)
            .map(|_| numbers.below(num_experts))
            .collect();
        Self {
            routing: Routing::new(tokens, top_k, num_experts, ids),
            d_ff,
            d_model,
            options,
        }
    }

    fn index<K: ExpertKernels>(&self) -> RawExpertIndex<IntTensor<K>> {
        let ids: Vec<i64> = self.routing.expert_ids.iter().map(|&e| e as i64).collect();
        let shape = [self.routing.tokens, self.routing.top_k];
        <K as ExpertKernels>::expert_index(
            int::<K, 2>(&ids, shape).into_primitive(),
            self.routing.num_experts,
        )
    }

    fn hidden_width(&self) -> usize {
        self.options.activation.hidden_width(self.d_ff)
    }

    /// What dropout multiplies column `column` of slot `slot` with.
    fn mask(&self, slot: usize, column: usize) -> f64 {
        let p = self.options.dropout;
        if dropout_uniform(SEED, slot as u32, column as u32) >= p {
            1.0 / (1.0 - f64::from(p))
        } else {
            0.0
        }
    }

    fn activated(&self, pre: &[f64]) -> Vec<f64> {
        let rows = pre.chunks(self.hidden_width());
        rows.zip(self.routing.slots())
            .flat_map(|(row, slot)| {
                let row = activate(self.options.activation, row);
                row.into_iter()
                    .enumerate()
                    .map(move |(j, a)| a * self.mask(slot, j))
            })
            .collect()
    }
}

fn seed<K: ExpertKernels>() -> Option<IntTensor<K>> {
    let bits = SEED.map(|word| i64::from(word as i32));
    Some(int::<K, 1>(&bits, [2]).into_primitive())
}

fn options() -> impl Iterator<Item = FfnOptions> {
    Activation::ALL.into_iter().flat_map(|activation| {
        [0.0, 0.3].map(|dropout| FfnOptions {
            activation,
            dropout,
            ..FfnOptions::default()
        })
    })
}

const SHAPES: [[usize; 5]; 4] = [
    [1, 1, 1, 1, 1],
    [7, 2, 5, 37, 13],
    [3, 3, 3, 300, 67],
    [41, 2, 8, 8, 290],
];

fn forward<K: ExpertKernels>() {
    let mut numbers = Numbers(5);
    for options in options() {
        for shape in SHAPES {
            let case = Case::new(&mut numbers, shape, options);
            let slots = case.routing.num_slots();
            let pre: Vec<f64> = numbers.values(slots * case.hidden_width());
            let pre: Vec<f64> = pre.into_iter().map(|v| 6.0 * v).collect();
            let (shape, got) = floats::<K, 2>(K::ffn_activation(
                raw(float::<K, 2>(&pre, [slots, case.hidden_width()])),
                case.index::<K>(),
                options,
                seed::<K>(),
            ));
            assert_eq!(shape, [slots, case.d_ff]);
            let what = format!("{options:?}");
            assert_close(&what, &got, &case.activated(&pre), [3e-6, 1e-6]);
        }
    }
}
backend_test!(kernels activations_and_masks_equal_the_definition, forward);

/// GELU to the last digits: its error is that of the error function, times half the input.
fn precise<K: ExpertKernels>() {
    let case = Case::new(&mut Numbers(6), [1, 1, 1, 4001, 1], FfnOptions::default());
    let pre: Vec<f64> = (0..4001)
        .map(|i| f64::from((f64::from(i) * 0.003 - 6.0) as f32))
        .collect();
    let input = float::<K, 2>(&pre, [1, 4001]);
    let is_f32 = input.dtype() == DType::from(FloatDType::F32);
    assert!(is_f32, "the bound below is f32's");
    let erf_error = match TestBackend::selected() {
        Ok(TestBackend::Cpu) => 5e-7,
        _ => 1.2e-7,
    };
    let (_, got) = floats::<K, 2>(K::ffn_activation(
        raw(input),
        case.index::<K>(),
        case.options,
        None,
    ));
    for (&x, (got, expected)) in pre.iter().zip(got.into_iter().zip(case.activated(&pre))) {
        // Half the input times the error function's error, a rounding of factors and product.
        let bound = 0.5 * x.abs() * erf_error + 1.8e-7 * expected.abs() + 1e-9;
        assert!(
            (got - expected).abs() <= bound,
            "{x}: {got:e}, {expected:e}"
        );
    }
}
backend_test!(kernels gelu_is_good_to_the_last_digits, precise);

fn extreme<K: ExpertKernels>() {
    let pre = [1e4, -1e4, 1e12, -1e12, 1e18, -1e18, 0.0, -0.0];
    let mut numbers = Numbers(7);
    for activation in Activation::ALL {
        let options = FfnOptions {
            activation,
            ..FfnOptions::default()
        };
        let d_ff = 8 / activation.hidden_width(1);
        let case = Case::new(&mut numbers, [1, 1, 1, d_ff, 1], options);
        // The other half of a pair must not overflow on its own account.
        let pre: Vec<f64> = match activation.is_gated() {
            true => pre.chunks(2).flat_map(|pair| [pair[0], 0.5]).collect(),
            false => pre.to_vec(),
        };
        let grads = K::ffn_activation_backward(FfnActivationGradArgs {
            pre_activation: raw(float::<K, 2>(&pre, [1, 8])),
            grad_activated: raw(float::<K, 2>(&vec![1e-3; d_ff], [1, d_ff])),
            gates: raw(float::<K, 2>(&[0.5], [1, 1])),
            output_bias: None,
            index: case.index::<K>(),
            options,
            dropout_seed: None,
        });
        let (_, got) = floats::<K, 2>(grads.pre_activation);
        let expected = activation_slope(activation, &pre, &vec![5e-4; d_ff]);
        for ((&x, got), expected) in pre.iter().zip(got).zip(expected) {
            // The oracle's formulas overflow where the kernels must not.
            let expected = if expected.is_finite() {
                expected
            } else if x > 0.0 {
                5e-4
            } else {
                0.0
            };
            assert!(
                (got - expected).abs() <= 1e-6 + 1e-5 * expected.abs(),
                "{activation:?} at {x}: {got:e}, {expected:e}"
            );
        }
    }
}
backend_test!(kernels derivatives_stay_finite_for_large_inputs, extreme);

struct Expected {
    pre_activation: Vec<f64>,
    weighted: Vec<f64>,
    gates: Vec<f64>,
}

/// The formulas of the kernel's contract, position by position.
fn expected_grads(
    case: &Case,
    pre: &[f64],
    upstream: &[f64],
    gates: &[f64],
    output_bias: Option<(&[f64], &[f64])>,
) -> Expected {
    let activated = case.activated(pre);
    let mut out = Expected {
        pre_activation: Vec::new(),
        weighted: Vec::new(),
        gates: vec![0.0; gates.len()],
    };
    for (position, slot) in case.routing.slots().into_iter().enumerate() {
        let row = &pre[position * case.hidden_width()..][..case.hidden_width()];
        let columns = position * case.d_ff..(position + 1) * case.d_ff;
        let (u, a) = (&upstream[columns.clone()], &activated[columns]);
        let through: Vec<f64> = u
            .iter()
            .enumerate()
            .map(|(j, u)| gates[slot] * u * case.mask(slot, j))
            .collect();
        out.pre_activation
            .extend(activation_slope(case.options.activation, row, &through));
        out.weighted.extend(a.iter().map(|a| gates[slot] * a));
        out.gates[slot] = u.iter().zip(a).map(|(u, a)| u * a).sum();
        if let Some((grad_output, bias)) = output_bias {
            let token = slot / case.routing.top_k;
            let expert = case.routing.expert_ids[slot];
            let dy = &grad_output[token * case.d_model..][..case.d_model];
            let b2 = &bias[expert * case.d_model..][..case.d_model];
            out.gates[slot] += dy.iter().zip(b2).map(|(d, b)| d * b).sum::<f64>();
        }
    }
    out
}

fn backward<K: ExpertKernels>() {
    let mut numbers = Numbers(8);
    for (turn, options) in options().enumerate() {
        for shape in SHAPES {
            let case = Case::new(&mut numbers, shape, options);
            let Routing {
                tokens,
                top_k,
                num_experts,
                ..
            } = case.routing;
            let (slots, d_model) = (tokens * top_k, case.d_model);
            let pre = numbers.values(slots * case.hidden_width());
            let pre: Vec<f64> = pre.into_iter().map(|v| 4.0 * v).collect();
            let upstream = numbers.values(slots * case.d_ff);
            let gates = numbers.values(slots);
            let grad_output = numbers.values(tokens * d_model);
            let bias = numbers.values(num_experts * d_model);
            let with_bias = turn % 2 == 0;
            let expected = expected_grads(
                &case,
                &pre,
                &upstream,
                &gates,
                with_bias.then_some((&grad_output, &bias)),
            );
            // A transposed view of the transposed values: other strides, same matrix.
            let upstream = float::<K, 2>(&upstream, [slots, case.d_ff]);
            let upstream = upstream.transpose().mul_scalar(1.0).transpose();
            let output_bias = with_bias.then(|| {
                (
                    raw(float::<K, 2>(&grad_output, [tokens, d_model])),
                    raw(float::<K, 2>(&bias, [num_experts, d_model])),
                )
            });
            let grads = K::ffn_activation_backward(FfnActivationGradArgs {
                pre_activation: raw(float::<K, 2>(&pre, [slots, case.hidden_width()])),
                grad_activated: raw(upstream),
                gates: raw(float::<K, 2>(&gates, [tokens, top_k])),
                output_bias,
                index: case.index::<K>(),
                options,
                dropout_seed: seed::<K>(),
            });
            let what = format!("{options:?} {shape:?}");
            let (dims, got) = floats::<K, 2>(grads.pre_activation);
            assert_eq!(dims, [slots, case.hidden_width()]);
            assert_close(&what, &got, &expected.pre_activation, [3e-6, 2e-6]);
            let (dims, got) = floats::<K, 2>(grads.weighted_activated);
            assert_eq!(dims, [slots, case.d_ff]);
            assert_close(&what, &got, &expected.weighted, [3e-6, 1e-6]);
            let (dims, got) = floats::<K, 2>(grads.gates);
            assert_eq!(dims, [tokens, top_k]);
            assert_close(&what, &got, &expected.gates, [5e-5, 1e-5]);
        }
    }
}
backend_test!(kernels activation_gradients_equal_the_definition, backward);

fn no_tokens<K: ExpertKernels>() {
    let case = Case::new(&mut Numbers(9), [0, 2, 3, 5, 4], FfnOptions::default());
    let empty = |width| raw(float::<K, 2>(&[], [0, width]));
    let activated = K::ffn_activation(empty(5), case.index::<K>(), case.options, None);
    assert_eq!(floats::<K, 2>(activated).0, [0, 5]);
    let grads = K::ffn_activation_backward(FfnActivationGradArgs {
        pre_activation: empty(5),
        grad_activated: empty(5),
        gates: empty(2),
        output_bias: None,
        index: case.index::<K>(),
        options: case.options,
        dropout_seed: None,
    });
    assert_eq!(floats::<K, 2>(grads.gates).0, [0, 2]);
}
backend_test!(kernels no_tokens_give_empty_results, no_tokens);
