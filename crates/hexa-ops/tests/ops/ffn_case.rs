//! Random problems for the fused FFN, and one run of it.

use burn::tensor::{DType, Tensor};
use hexa_ops::testing::compare::host;
use hexa_ops::testing::oracle::{Ffn, FfnTensors};
use hexa_ops::{
    Activation, ExpertIndex, ExpertParams, Favor, FfnOptions, Result, TrainingBackend, expert_ffn,
};
use proptest::prelude::*;

use crate::cases::{
    Layout, Numbers, RoutingCase, expert_ids, laid_out, layout, routing_case, seed_tensor, width,
};

/// Which inputs are tracked, in the order of [`FfnTensors::named`].
pub type Tracked = [bool; FfnTensors::COUNT];

pub const ALL_TRACKED: Tracked = [true; FfnTensors::COUNT];

#[derive(Debug, Clone)]
pub struct FfnCase {
    pub routing: RoutingCase,
    pub d_model: usize,
    pub d_ff: usize,
    pub activation: Activation,
    pub biases: (bool, bool),
    pub dropout: f32,
    pub dropout_seed: [u32; 2],
    pub favor: Favor,
    pub layouts: [Layout; FfnTensors::COUNT],
    /// Whether the output's gradient arrives transposed.
    pub strided_grad: bool,
    pub seed: u64,
}

/// A case with its numbers drawn.
pub struct FfnProblem {
    pub ffn: Ffn,
    pub inputs: FfnTensors,
    pub grad_output: Vec<f64>,
}

pub fn ffn_case(most: usize) -> impl Strategy<Value = FfnCase> {
    let dropout = prop_oneof![
        2 => Just(0.0_f32),
        1 => prop::sample::select(vec![0.1_f32, 0.25, 0.5, 0.9]),
    ];
    let layouts = prop_oneof![
        1 => Just([Layout::Contiguous; FfnTensors::COUNT]),
        2 => prop::array::uniform6(layout()),
    ];
    (
        routing_case(most),
        (width(), width()),
        prop::sample::select(&Activation::ALL[..]),
        any::<(bool, bool)>(),
        dropout,
        any::<[u32; 2]>(),
        layouts,
        any::<bool>(),
        any::<u64>(),
    )
        .prop_map(
            |(
                routing,
                (d_model, d_ff),
                activation,
                biases,
                dropout,
                dropout_seed,
                layouts,
                strided_grad,
                seed,
            )| FfnCase {
                routing,
                d_model,
                d_ff,
                activation,
                biases,
                dropout,
                dropout_seed,
                favor: if seed % 2 == 0 {
                    Favor::Speed
                } else {
                    Favor::Memory
                },
                layouts,
                strided_grad,
                seed,
            },
        )
}

/// The power of two nearest to one over the square root of `n`, so that scaling rounds nothing.
fn inverse_root(n: usize) -> f64 {
    (-(n as f64).log2() / 2.0).round().exp2()
}

impl FfnCase {
    /// Draws the numbers, as multiples of `grid`; weights are scaled so that sums stay of order one.
    pub fn problem_on(&self, grid: f64) -> FfnProblem {
        let routing = self.routing.routing();
        let ffn = Ffn {
            routing,
            d_model: self.d_model,
            d_ff: self.d_ff,
            activation: self.activation,
            dropout: self.dropout,
            dropout_seed: (self.dropout > 0.0).then_some(self.dropout_seed),
        };
        let experts = ffn.routing.num_experts;
        let (d, f, h) = (ffn.d_model, ffn.d_ff, ffn.hidden_width());
        let mut numbers = Numbers::new(self.seed);
        let mut draw = |len: usize, scale: f64| -> Vec<f64> {
            let values = numbers.values(len);
            values
                .iter()
                .map(|v| (v / grid).round() * grid * scale)
                .collect()
        };
        let inputs = FfnTensors {
            x: draw(ffn.routing.tokens * d, 1.0),
            gates: draw(ffn.routing.num_slots(), 1.0),
            w1: draw(experts * d * h, inverse_root(d)),
            b1: self.biases.0.then(|| draw(experts * h, 1.0)),
            w2: draw(experts * f * d, inverse_root(f)),
            b2: self.biases.1.then(|| draw(experts * d, 1.0)),
        };
        let grad_output = draw(ffn.routing.tokens * d, 1.0);
        FfnProblem {
            ffn,
            inputs,
            grad_output,
        }
    }

    /// Draws the numbers, exact in f32.
    pub fn problem(&self) -> FfnProblem {
        self.problem_on(1.0 / f64::from(1_u32 << 20))
    }

    pub fn options(&self) -> FfnOptions {
        FfnOptions {
            activation: self.activation,
            dropout: self.dropout,
            favor: self.favor,
        }
    }
}

impl FfnProblem {
    /// Whether a ReLU is so near its kink that rounding decides its slope.
    pub fn is_near_a_kink(&self, distance: f64) -> bool {
        self.ffn.activation == Activation::Relu
            && (self.ffn.pre_activations(&self.inputs))
                .iter()
                .any(|h| h.abs() < distance)
    }

    /// Shapes of the inputs as rows and columns, with the number of matrices first.
    fn shapes(&self) -> [[usize; 3]; FfnTensors::COUNT] {
        let Ffn {
            routing,
            d_model: d,
            d_ff: f,
            ..
        } = &self.ffn;
        let (e, h) = (routing.num_experts, self.ffn.hidden_width());
        [
            [1, routing.tokens, *d],
            [1, routing.tokens, routing.top_k],
            [e, *d, h],
            [1, e, h],
            [e, *f, *d],
            [1, e, *d],
        ]
    }
}

/// Output and gradients of one run, on the host.
#[derive(Debug, Clone, PartialEq)]
pub struct FfnRun {
    pub output: Vec<f64>,
    /// In the order of [`FfnTensors::named`].
    pub grads: [Option<Vec<f64>>; FfnTensors::COUNT],
}

/// The leaves of a run: what is tracked is a leaf, the rest is not.
struct Leaves<B: TrainingBackend> {
    x: Tensor<B, 2>,
    gates: Tensor<B, 2>,
    params: ExpertParams<B>,
}

fn leaves<B: TrainingBackend>(
    case: &FfnCase,
    problem: &FfnProblem,
    tracked: Tracked,
    dtype: Option<DType>,
) -> Leaves<B> {
    let shapes = problem.shapes();
    let named = problem.inputs.named();
    let matrix = |i: usize| -> Option<Tensor<B, 2>> {
        let values = named[i].1?;
        let tensor = laid_out(values, [shapes[i][1], shapes[i][2]], case.layouts[i]);
        let tensor = dtype.map_or(tensor.clone(), |dtype| tensor.cast(dtype));
        Some(tensor.set_require_grad(tracked[i]))
    };
    let stack = |i: usize| -> Tensor<B, 3> {
        let values = named[i].1.unwrap_or_default();
        let tensor = laid_out(values, shapes[i], case.layouts[i]);
        let tensor = dtype.map_or(tensor.clone(), |dtype| tensor.cast(dtype));
        tensor.set_require_grad(tracked[i])
    };
    Leaves {
        x: matrix(0).expect("x is always there"),
        gates: matrix(1).expect("gates are always there"),
        params: ExpertParams {
            w1: stack(2),
            b1: matrix(3),
            w2: stack(4),
            b2: matrix(5),
        },
    }
}

/// Runs the FFN forward and backward; `prepare` stands between the leaves and the operator.
pub fn run_through<B: TrainingBackend>(
    case: &FfnCase,
    problem: &FfnProblem,
    tracked: Tracked,
    dtype: Option<DType>,
    prepare: impl Fn(Tensor<B, 2>, ExpertParams<B>) -> (Tensor<B, 2>, ExpertParams<B>),
) -> Result<FfnRun> {
    let routing = &problem.ffn.routing;
    let Leaves { x, gates, params } = leaves::<B>(case, problem, tracked, dtype);
    let index = ExpertIndex::new(expert_ids(routing), routing.num_experts)?;
    let seed = (case.dropout > 0.0).then(|| seed_tensor(case.dropout_seed));
    let (inner_x, inner_params) = prepare(x.clone(), params.clone());
    let y = expert_ffn(
        inner_x,
        gates.clone(),
        inner_params,
        &index,
        case.options(),
        seed,
    )?;
    let output = host(y.clone());

    let cotangent = laid_out::<B, 2>(
        &problem.grad_output,
        [routing.tokens, case.d_model],
        Layout::Contiguous,
    )
    .cast(y.dtype());
    // The gradient is taken of what is not a scalar, so that nothing is summed over no tokens.
    let grads = if case.strided_grad {
        (y.swap_dims(0, 1) * cotangent.swap_dims(0, 1)).backward()
    } else {
        (y * cotangent).backward()
    };
    let of2 = |t: &Tensor<B, 2>| t.grad(&grads).map(host);
    let of3 = |t: &Tensor<B, 3>| t.grad(&grads).map(host);
    Ok(FfnRun {
        output,
        grads: [
            of2(&x),
            of2(&gates),
            of3(&params.w1),
            params.b1.as_ref().and_then(of2),
            of3(&params.w2),
            params.b2.as_ref().and_then(of2),
        ],
    })
}

/// Runs the FFN forward and backward.
pub fn run<B: TrainingBackend>(
    case: &FfnCase,
    problem: &FfnProblem,
    tracked: Tracked,
) -> Result<FfnRun> {
    run_through::<B>(case, problem, tracked, None, |x, params| (x, params))
}
