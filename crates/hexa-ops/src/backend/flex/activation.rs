//! Activations, dropout and gate weighting between the two layers of the experts.

use burn::tensor::TensorMetadata;
use burn_flex::FlexTensor;
use rayon::prelude::*;

use super::element::{HostIndex, Matrix, Real, dims2, read_seed, write};
use crate::backend::{FfnActivationGradArgs, FfnActivationGrads, RawExpertIndex};
use crate::dropout::dropout_uniform;
use crate::types::{Activation, FfnOptions};

/// σ(x).
#[inline(always)]
fn sigmoid<A: Real>(x: A) -> A {
    let one = A::from_f64(1.0);
    one / (one + (-x).exp())
}

/// √(2/π) and the cubic coefficient of GELU's tanh approximation.
const GELU_TANH: (f64, f64) = (0.797_884_560_802_865_4, 0.044_715);

/// A function of one variable with its derivative.
trait Scalar<A> {
    fn value(x: A) -> A;
    fn value_and_slope(x: A) -> (A, A);
}

struct Gelu;
struct GeluTanh;
struct Relu;
struct Silu;

impl<A: Real> Scalar<A> for Gelu {
    #[inline(always)]
    fn value(x: A) -> A {
        Self::value_and_slope(x).0
    }
    #[inline(always)]
    fn value_and_slope(x: A) -> (A, A) {
        let (cdf, density) = x.normal();
        (x * cdf, cdf + x * density)
    }
}

impl<A: Real> Scalar<A> for GeluTanh {
    #[inline(always)]
    fn value(x: A) -> A {
        Self::value_and_slope(x).0
    }
    #[inline(always)]
    fn value_and_slope(x: A) -> (A, A) {
        let (c, a) = (A::from_f64(GELU_TANH.0), A::from_f64(GELU_TANH.1));
        let (one, two) = (A::from_f64(1.0), A::from_f64(2.0));
        // (1 + tanh y) / 2 is σ(2y), which loses nothing where tanh is near −1.
        let s = sigmoid(two * c * (x + a * x * x * x));
        let inner = two * c * (one + A::from_f64(3.0) * a * x * x);
        (x * s, s + x * s * (one - s) * inner)
    }
}

impl<A: Real> Scalar<A> for Relu {
    #[inline(always)]
    fn value(x: A) -> A {
        Self::value_and_slope(x).0
    }
    #[inline(always)]
    fn value_and_slope(x: A) -> (A, A) {
        let zero = A::from_f64(0.0);
        if x > zero {
            (x, A::from_f64(1.0))
        } else {
            // `x * 0` keeps a NaN visible.
            (x * zero, zero)
        }
    }
}

impl<A: Real> Scalar<A> for Silu {
    #[inline(always)]
    fn value(x: A) -> A {
        x * sigmoid(x)
    }
    #[inline(always)]
    fn value_and_slope(x: A) -> (A, A) {
        let s = sigmoid(x);
        (x * s, s * (A::from_f64(1.0) + x * (A::from_f64(1.0) - s)))
    }
}

/// Calls a function generic over the activation's scalar function and over whether it is gated.
macro_rules! with_activation {
    ($activation:expr, $function:ident, $($arg:expr),*) => {
        match $activation {
            Activation::Gelu => $function::<A, Gelu, false>($($arg),*),
            Activation::GeluTanh => $function::<A, GeluTanh, false>($($arg),*),
            Activation::Relu => $function::<A, Relu, false>($($arg),*),
            Activation::Silu => $function::<A, Silu, false>($($arg),*),
            Activation::SwiGlu => $function::<A, Silu, true>($($arg),*),
            Activation::GeGlu => $function::<A, Gelu, true>($($arg),*),
        }
    };
}

/// Dropout's factor for each column of a slot: 0, or 1 / (1 − p).
#[derive(Clone, Copy)]
struct Dropout {
    seed: [u32; 2],
    probability: f32,
}

impl Dropout {
    fn new(options: FfnOptions, seed: Option<&FlexTensor>) -> Option<Self> {
        let seed = seed.filter(|_| options.dropout > 0.0)?;
        Some(Self {
            seed: read_seed(seed),
            probability: options.dropout,
        })
    }

    fn scale_row<A: Real>(self, slot: usize, row: &mut [A]) {
        let keep = A::from_f64(1.0 / (1.0 - f64::from(self.probability)));
        for (column, v) in row.iter_mut().enumerate() {
            let u = dropout_uniform(self.seed, slot as u32, column as u32);
            *v = if u >= self.probability {
                *v * keep
            } else {
                A::from_f64(0.0)
            };
        }
    }
}

/// Runs a loop compiled for the widest vectors that this processor has and the crate knows.
fn vectorized<R>(work: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(work)
}

fn forward_row<A: Real, S: Scalar<A>, const GATED: bool>(h: &[A], out: &mut [A]) {
    vectorized(
        #[inline(always)]
        || {
            if GATED {
                for (a, h) in out.iter_mut().zip(h.chunks_exact(2)) {
                    *a = S::value(h[0]) * h[1];
                }
            } else {
                for (a, &h) in out.iter_mut().zip(h) {
                    *a = S::value(h);
                }
            }
        },
    );
}

/// See [`crate::ExpertKernels::ffn_activation`].
pub fn forward<A: Real>(
    pre_activation: &FlexTensor,
    index: &RawExpertIndex<FlexTensor>,
    options: FfnOptions,
    dropout_seed: Option<&FlexTensor>,
) -> FlexTensor {
    let dtype = pre_activation.dtype();
    let [rows, hidden] = dims2(pre_activation);
    let d_ff = hidden / options.activation.hidden_width(1);
    let index = HostIndex::read(index);
    let dropout = Dropout::new(options, dropout_seed);
    let h = Matrix::<A>::read(pre_activation);

    let mut out = vec![A::from_f64(0.0); rows * d_ff];
    out.par_chunks_mut(d_ff)
        .zip(h.as_slice().par_chunks(hidden))
        .zip(&index.slots)
        .with_min_len(16)
        .for_each(|((a, h), &slot)| {
            with_activation!(options.activation, forward_row, h, a);
            if let Some(dropout) = dropout {
                dropout.scale_row(slot, a);
            }
        });
    write(out, [rows, d_ff], dtype)
}

/// On entry `a` is one everywhere, scaled by dropout, and `grad` the gradient of the activated
/// values. On return `a` is the weighted activated value and `dh` the pre-activation's gradient;
/// the sum is the gate's gradient.
fn backward_row<A: Real, S: Scalar<A>, const GATED: bool>(
    gate: A,
    h: &[A],
    grad: &[A],
    a: &mut [A],
    dh: &mut [A],
) -> A {
    vectorized(
        #[inline(always)]
        || {
            if GATED {
                let columns = a.iter_mut().zip(grad).zip(h.chunks_exact(2));
                for (((a, &u), h), dh) in columns.zip(dh.chunks_exact_mut(2)) {
                    let (value, slope) = S::value_and_slope(h[0]);
                    let scaled = gate * *a * u;
                    dh[0] = scaled * slope * h[1];
                    dh[1] = scaled * value;
                    *a = value * h[1] * *a;
                }
            } else {
                for (((a, &u), &h), dh) in a.iter_mut().zip(grad).zip(h).zip(dh) {
                    let (value, slope) = S::value_and_slope(h);
                    *dh = gate * *a * u * slope;
                    *a = value * *a;
                }
            }
            let gate_grad = dot(a, grad);
            for a in a {
                *a = gate * *a;
            }
            gate_grad
        },
    )
}

/// Σ x·y, as sums of every eighth product, so that they are computed side by side.
#[inline(always)]
fn dot<A: Real>(x: &[A], y: &[A]) -> A {
    const LANES: usize = 8;
    let mut sums = [A::from_f64(0.0); LANES];
    let (x, x_rest) = x.as_chunks::<LANES>();
    let (y, y_rest) = y.as_chunks::<LANES>();
    for (x, y) in x.iter().zip(y) {
        for ((sum, &x), &y) in sums.iter_mut().zip(x).zip(y) {
            *sum = *sum + x * y;
        }
    }
    for ((sum, &x), &y) in sums.iter_mut().zip(x_rest).zip(y_rest) {
        *sum = *sum + x * y;
    }
    sums.into_iter()
        .fold(A::from_f64(0.0), |all, sum| all + sum)
}

/// See [`crate::ExpertKernels::ffn_activation_backward`].
pub fn backward<A: Real>(
    args: FfnActivationGradArgs<FlexTensor, FlexTensor>,
) -> FfnActivationGrads<FlexTensor> {
    let dtype = args.pre_activation.dtype();
    let [rows, hidden] = dims2(&args.pre_activation);
    let [_, d_ff] = dims2(&args.grad_activated);
    let (tokens, top_k) = (args.index.tokens, args.index.top_k);
    let index = HostIndex::read(&args.index);
    let dropout = Dropout::new(args.options, args.dropout_seed.as_ref());
    let h = Matrix::<A>::read(&args.pre_activation);
    let grad = Matrix::<A>::read(&args.grad_activated);
    let gates = Matrix::<A>::read(&args.gates);
    let output_bias = args
        .output_bias
        .as_ref()
        .map(|(dy, b2)| (Matrix::<A>::read(dy), Matrix::<A>::read(b2), dims2(b2)[1]));
    let expert_of = expert_of_position(&index);

    let mut weighted = vec![A::from_f64(1.0); rows * d_ff];
    let mut grad_pre = vec![A::from_f64(0.0); rows * hidden];
    let mut gate_grads = vec![A::from_f64(0.0); rows];
    weighted
        .par_chunks_mut(d_ff)
        .zip(grad_pre.par_chunks_mut(hidden))
        .zip(gate_grads.par_iter_mut())
        .enumerate()
        .with_min_len(16)
        .for_each(|(p, ((a, dh), gate_grad))| {
            let slot = index.slots[p];
            if let Some(dropout) = dropout {
                dropout.scale_row(slot, a);
            }
            let gate = gates.as_slice()[slot];
            let h = &h.as_slice()[p * hidden..(p + 1) * hidden];
            let u = &grad.as_slice()[p * d_ff..(p + 1) * d_ff];
            *gate_grad = with_activation!(args.options.activation, backward_row, gate, h, u, a, dh);
            if let Some((dy, b2, n)) = &output_bias {
                let (t, e) = (slot / top_k, expert_of[p]);
                let dy = &dy.as_slice()[t * n..(t + 1) * n];
                let b2 = &b2.as_slice()[e * n..(e + 1) * n];
                *gate_grad = dy.iter().zip(b2).fold(*gate_grad, |s, (&g, &b)| s + g * b);
            }
        });
    let by_slot = index.positions.iter().map(|&p| gate_grads[p]).collect();
    FfnActivationGrads {
        pre_activation: write(grad_pre, [rows, hidden], dtype),
        weighted_activated: write(weighted, [rows, d_ff], dtype),
        gates: write(by_slot, [tokens, top_k], dtype),
    }
}

fn expert_of_position(index: &HostIndex) -> Vec<usize> {
    index
        .offsets
        .windows(2)
        .enumerate()
        .flat_map(|(e, range)| std::iter::repeat_n(e, range[1] - range[0]))
        .collect()
}

/// Elements that one thread works on at a time.
const CHUNK: usize = 4096;

/// See [`crate::ExpertKernels::gelu`].
pub fn gelu<A: Real>(x: &FlexTensor) -> FlexTensor {
    let values = Matrix::<A>::read(x);
    let mut out = vec![A::from_f64(0.0); values.as_slice().len()];
    out.par_chunks_mut(CHUNK)
        .zip(values.as_slice().par_chunks(CHUNK))
        .for_each(|(out, x)| forward_row::<A, Gelu, false>(x, out));
    write(out, x.shape(), x.dtype())
}

/// See [`crate::ExpertKernels::gelu_backward`].
pub fn gelu_backward<A: Real>(x: &FlexTensor, grad: &FlexTensor) -> FlexTensor {
    let (values, grads) = (Matrix::<A>::read(x), Matrix::<A>::read(grad));
    let mut out = vec![A::from_f64(0.0); values.as_slice().len()];
    out.par_chunks_mut(CHUNK)
        .zip(values.as_slice().par_chunks(CHUNK))
        .zip(grads.as_slice().par_chunks(CHUNK))
        .for_each(|((out, x), grad)| {
            vectorized(
                #[inline(always)]
                || {
                    for ((out, &x), &grad) in out.iter_mut().zip(x).zip(grad) {
                        *out = grad * Gelu::value_and_slope(x).1;
                    }
                },
            );
        });
    write(out, x.shape(), x.dtype())
}
