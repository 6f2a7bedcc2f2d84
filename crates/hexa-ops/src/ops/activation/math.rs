//! Device functions of the activation kernels: curves, their derivatives, random numbers.

use cubecl::prelude::*;

/// What a gate, or a plain activation, applies to its input.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Curve {
    /// `x · Φ(x)`.
    Gelu,
    /// `x · σ(2 √(2/π) (x + 0.044715 x³))`, which is GELU's tanh approximation.
    GeluTanh,
    /// `max(x, 0)`.
    Relu,
    /// `x · σ(x)`.
    Silu,
}

/// `curve(x)`.
#[cube]
pub fn curve_value<A: Float>(x: A, #[comptime] curve: Curve) -> A {
    match comptime!(curve) {
        Curve::Gelu => x * normal_cdf::<A>(x),
        Curve::GeluTanh => x * sigmoid::<A>(tanh_argument::<A>(x)),
        Curve::Relu => max(x, A::new(0.0)),
        Curve::Silu => x * sigmoid::<A>(x),
    }
}

/// `curve'(x)`; that of ReLU at zero is zero.
#[cube]
pub fn curve_derivative<A: Float>(x: A, #[comptime] curve: Curve) -> A {
    match comptime!(curve) {
        Curve::Gelu => {
            let c = bounded::<A>(x, 20.0);
            let density = constant::<A>(0.398_942_280_401_432_7) * (A::new(-0.5) * c * c).exp();
            normal_cdf::<A>(x) + c * density
        }
        Curve::GeluTanh => {
            let c = bounded::<A>(x, 10.0);
            let s = sigmoid::<A>(tanh_argument::<A>(x));
            let slope = constant::<A>(1.595_769_121_605_730_7)
                * (A::new(1.0) + constant::<A>(0.134_145) * c * c);
            s + c * s * (A::new(1.0) - s) * slope
        }
        Curve::Relu => select(x > A::new(0.0), A::new(1.0), A::new(0.0)),
        Curve::Silu => {
            let c = bounded::<A>(x, 80.0);
            let s = sigmoid::<A>(c);
            s * (A::new(1.0) + c * (A::new(1.0) - s))
        }
    }
}

/// `2 √(2/π) (x + 0.044715 x³)`; beyond ±10 the sigmoid of it is saturated.
#[cube]
fn tanh_argument<A: Float>(x: A) -> A {
    let c = bounded::<A>(x, 10.0);
    constant::<A>(1.595_769_121_605_730_7) * c * (A::new(1.0) + constant::<A>(0.044_715) * c * c)
}

/// `1 / (1 + exp(−x))`, without overflow of the exponential.
#[cube]
fn sigmoid<A: Float>(x: A) -> A {
    let one = A::new(1.0);
    one / (one + (-bounded::<A>(x, 88.0)).exp())
}

/// Φ, the standard normal distribution function.
#[cube]
fn normal_cdf<A: Float>(x: A) -> A {
    A::new(0.5) + A::new(0.5) * error_function::<A>(x * constant::<A>(0.707_106_781_186_547_5))
}

/// The error function to 7e-8 in f32, where CubeCL's own is only good to 1.5e-7 on some runtimes;
/// the runtime's own in f64.
///
/// Polynomials fitted for this function: `erf(x)/x − 1` in `x²` on `[0, 1]`, and `ln erfc(x)` on
/// `[1, 4]`, beyond which f32 rounds to one.
#[cube]
fn error_function<A: Float>(x: A) -> A {
    let size_bytes = A::type_size();
    if comptime!(size_bytes == 8) {
        x.erf()
    } else {
        let a = min(x.abs(), A::new(4.0));
        let s = a * a;
        let p = A::new(7.647_076_5e-5);
        let p = p * s + A::new(-7.942_345e-4);
        let p = p * s + A::new(5.179_748_6e-3);
        let p = p * s + A::new(-2.684_859_2e-2);
        let p = p * s + A::new(1.128_343e-1);
        let p = p * s + A::new(-3.761_260_6e-1);
        let p = p * s + A::new(1.283_791_6e-1);
        let near = a + a * p;

        let q = A::new(1.855_598_7e-4);
        let q = q * a + A::new(-2.939_505_4e-3);
        let q = q * a + A::new(2.180_503_4e-2);
        let q = q * a + A::new(-1.030_369_8e-1);
        let q = q * a + A::new(-6.382_259e-1);
        let q = q * a + A::new(-1.127_04);
        let q = q * a + A::new(-3.537_293_4e-4);
        let far = A::new(1.0) - q.exp();

        let positive = select(a < A::new(1.0), near, far);
        select(x < A::new(0.0), -positive, positive)
    }
}

/// `x`, at most `bound` away from zero: keeps squares and exponentials finite.
#[cube]
fn bounded<A: Float>(x: A, #[comptime] bound: f32) -> A {
    max(min(x, A::new(bound)), A::new(-bound))
}

/// A constant to twice f32's precision: literals of a kernel are f32, `A` may be f64.
#[cube]
fn constant<A: Float>(#[comptime] value: f64) -> A {
    A::new(comptime!(value as f32)) + A::new(comptime!((value - f64::from(value as f32)) as f32))
}

/// [`crate::dropout::pcg`].
#[cube]
fn pcg(v: u32) -> u32 {
    let state = v * 747_796_405u32 + 2_891_336_453u32;
    let word = ((state >> ((state >> 28u32) + 4u32)) ^ state) * 277_803_737u32;
    (word >> 22u32) ^ word
}

/// [`crate::dropout::dropout_uniform`].
#[cube]
pub fn dropout_uniform(seed_slot: u32, seed_column: u32, slot: u32, column: u32) -> f32 {
    let bits = pcg(pcg(pcg(slot ^ seed_slot) ^ column) + seed_column);
    f32::cast_from(bits >> 8u32) * 5.960_464_5e-8
}
