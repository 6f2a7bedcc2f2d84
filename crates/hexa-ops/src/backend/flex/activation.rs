//! Activations, dropout and gate weighting between the two layers of the experts.

use std::ops::{Add, Div, Mul, Neg, Sub};

use burn::tensor::TensorMetadata;
use burn_flex::FlexTensor;
use rayon::prelude::*;

use super::element::{HostIndex, Matrix, Real, dims2, read_seed, write};
use crate::backend::{FfnActivationGradArgs, FfnActivationGrads, RawExpertIndex};
use crate::dropout::dropout_uniform;
use crate::types::{Activation, FfnOptions};

/// The functions that activations are made of.
pub trait Transcendental:
    Copy
    + PartialOrd
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + Neg<Output = Self>
{
    /// Distance between 1 and the next larger number.
    const EPSILON: Self;
    /// Rounds a constant.
    fn from_f64(v: f64) -> Self;
    /// Exponential.
    fn exp(self) -> Self;
    /// Hyperbolic tangent.
    fn tanh(self) -> Self;
    /// Complementary error function, accurate in its tail.
    fn erfc(self) -> Self;
}

impl Transcendental for f32 {
    const EPSILON: Self = f32::EPSILON;
    fn from_f64(v: f64) -> Self {
        v as f32
    }
    fn exp(self) -> Self {
        f32::exp(self)
    }
    fn tanh(self) -> Self {
        f32::tanh(self)
    }
    fn erfc(self) -> Self {
        libm::erfcf(self)
    }
}

impl Transcendental for f64 {
    const EPSILON: Self = f64::EPSILON;
    fn from_f64(v: f64) -> Self {
        v
    }
    fn exp(self) -> Self {
        f64::exp(self)
    }
    fn tanh(self) -> Self {
        f64::tanh(self)
    }
    fn erfc(self) -> Self {
        libm::erfc(self)
    }
}

/// σ(x).
fn sigmoid<A: Real>(x: A) -> A {
    let one = A::from_f64(1.0);
    one / (one + (-x).exp())
}

/// Φ(x), the standard normal distribution function.
fn normal_cdf<A: Real>(x: A) -> A {
    A::from_f64(0.5) * (-x * A::from_f64(std::f64::consts::FRAC_1_SQRT_2)).erfc()
}

/// φ(x), the standard normal density.
fn normal_pdf<A: Real>(x: A) -> A {
    let scale =
        A::from_f64(std::f64::consts::FRAC_2_SQRT_PI * std::f64::consts::FRAC_1_SQRT_2 / 2.0);
    (x * x * A::from_f64(-0.5)).exp() * scale
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
    fn value(x: A) -> A {
        x * normal_cdf(x)
    }
    fn value_and_slope(x: A) -> (A, A) {
        let cdf = normal_cdf(x);
        (x * cdf, cdf + x * normal_pdf(x))
    }
}

impl<A: Real> Scalar<A> for GeluTanh {
    fn value(x: A) -> A {
        Self::value_and_slope(x).0
    }
    fn value_and_slope(x: A) -> (A, A) {
        let (c, a) = (A::from_f64(GELU_TANH.0), A::from_f64(GELU_TANH.1));
        let (one, half) = (A::from_f64(1.0), A::from_f64(0.5));
        let tanh = (c * (x + a * x * x * x)).tanh();
        let inner = c * (one + A::from_f64(3.0) * a * x * x);
        (
            half * x * (one + tanh),
            half * (one + tanh) + half * x * (one - tanh * tanh) * inner,
        )
    }
}

impl<A: Real> Scalar<A> for Relu {
    fn value(x: A) -> A {
        Self::value_and_slope(x).0
    }
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
    fn value(x: A) -> A {
        x * sigmoid(x)
    }
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

fn forward_row<A: Real, S: Scalar<A>, const GATED: bool>(h: &[A], out: &mut [A]) {
    if GATED {
        for (a, h) in out.iter_mut().zip(h.chunks_exact(2)) {
            *a = S::value(h[0]) * h[1];
        }
    } else {
        for (a, &h) in out.iter_mut().zip(h) {
            *a = S::value(h);
        }
    }
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
    let mut gate_grad = A::from_f64(0.0);
    for (j, (a, &u)) in a.iter_mut().zip(grad).enumerate() {
        let keep = *a;
        let activated = if GATED {
            let (value, slope) = S::value_and_slope(h[2 * j]);
            let scaled = gate * keep * u;
            dh[2 * j] = scaled * slope * h[2 * j + 1];
            dh[2 * j + 1] = scaled * value;
            value * h[2 * j + 1] * keep
        } else {
            let (value, slope) = S::value_and_slope(h[j]);
            dh[j] = gate * keep * u * slope;
            value * keep
        };
        gate_grad = gate_grad + u * activated;
        *a = gate * activated;
    }
    gate_grad
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
            for ((out, &x), &grad) in out.iter_mut().zip(x).zip(grad) {
                *out = grad * Gelu::value_and_slope(x).1;
            }
        });
    write(out, x.shape(), x.dtype())
}
