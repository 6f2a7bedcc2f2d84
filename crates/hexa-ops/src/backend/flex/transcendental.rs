//! What activations are made of, for loops over rows: in f32 without branches and calls, so that
//! the compiler computes a vector's elements at a time.
//!
//! Nothing here is fused or reordered: the bits do not depend on the width of the vectors.

use std::ops::{Add, Div, Mul, Neg, Sub};

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
    /// Φ(x) and φ(x), the standard normal distribution function, accurate in its lower tail, and
    /// its density.
    fn normal(self) -> (Self, Self);
}

impl Transcendental for f32 {
    const EPSILON: Self = f32::EPSILON;

    #[inline(always)]
    fn from_f64(v: f64) -> Self {
        v as f32
    }

    #[inline(always)]
    fn exp(self) -> Self {
        exp(self)
    }

    #[inline(always)]
    fn normal(self) -> (Self, Self) {
        normal(self)
    }
}

impl Transcendental for f64 {
    const EPSILON: Self = f64::EPSILON;

    #[inline(always)]
    fn from_f64(v: f64) -> Self {
        v
    }

    #[inline(always)]
    fn exp(self) -> Self {
        f64::exp(self)
    }

    #[inline(always)]
    fn normal(self) -> (Self, Self) {
        let cdf = 0.5 * libm::erfc(-self * std::f64::consts::FRAC_1_SQRT_2);
        (cdf, (-0.5 * self * self).exp() * DENSITY_AT_0)
    }
}

/// 1 / √(2π).
const DENSITY_AT_0: f64 = 0.398_942_280_401_432_7;

/// Where [`exp`] becomes 0, and where it becomes infinite: the range in which 2ⁿ is a normal
/// number.
const EXP_RANGE: (f32, f32) = (-87.336, 88.376);

/// eˣ, to 2 units in the last place. Results below the smallest normal number are 0, and the last
/// 0.35 before an overflow are infinite already.
#[inline(always)]
fn exp(x: f32) -> f32 {
    /// `ln 2`, as a number of few bits and the rest.
    const LN_2: (f32, f32) = (0.693_359_4, -2.121_944_4e-4);
    /// Added to a number below 2²², it leaves the nearest integer in the low bits.
    const TO_INTEGER: f32 = 12_582_912.0;
    // A comparison with a NaN is false: it stays what it is.
    let bounded = if x < EXP_RANGE.0 { EXP_RANGE.0 } else { x };
    let bounded = if bounded > EXP_RANGE.1 {
        EXP_RANGE.1
    } else {
        bounded
    };
    let shifted = bounded * std::f32::consts::LOG2_E + TO_INTEGER;
    let n = shifted - TO_INTEGER;
    let r = bounded - n * LN_2.0 - n * LN_2.1;
    // Least largest error on ±ln(2)/2: 2e-9.
    let p = 0.001_394_111_9;
    let p = p * r + 0.008_375_135;
    let p = p * r + 0.041_666_354;
    let p = p * r + 0.166_664_15;
    let p = p * r + 0.5;
    let p = p * r + 1.0;
    let p = p * r + 1.0;
    let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(1.0f32.to_bits()));
    let y = p * power;
    let y = if x < EXP_RANGE.0 { 0.0 } else { y };
    if x > EXP_RANGE.1 { f32::INFINITY } else { y }
}

/// Φ(x) and φ(x), to a relative error of 5e-7, down to where they are no normal numbers.
///
/// `Q(a) = φ(a) · a function that hardly changes`, which is a polynomial in `1 / (1 + 0.35 a)`,
/// fitted for this purpose to the least largest relative error on [0, 14]: 3.2e-8.
#[inline(always)]
fn normal(x: f32) -> (f32, f32) {
    let a = x.abs();
    // What rounding takes from the square, by Dekker's product, corrects the exponential.
    let square = a * a;
    let high = f32::from_bits(a.to_bits() & 0xFFFF_F000);
    let low = a - high;
    let lost = (high * high - square) + 2.0 * (high * low) + low * low;
    let e = exp(-0.5 * square);
    // Far out there is nothing to be corrected, and the parts may be infinite.
    let e = if a < 16.0 { e - 0.5 * lost * e } else { e };

    let t = 1.0 / (1.0 + 0.35 * a);
    let p = -0.029_145_766;
    let p = p * t + 0.143_970_93;
    let p = p * t - 0.255_712_74;
    let p = p * t + 0.159_172_54;
    let p = p * t - 0.023_108_799;
    let p = p * t + 0.105_507_6;
    let p = p * t + 0.119_832_96;
    let p = p * t + 0.139_861_86;
    let p = p * t + 0.139_621_4;
    let upper = e * (t * p);
    let cdf = if x < 0.0 { upper } else { 1.0 - upper };
    (cdf, e * DENSITY_AT_0 as f32)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every float whose bits are a multiple of a prime, both signs.
    fn floats(up_to: f32) -> impl Iterator<Item = f32> {
        (0..=up_to.to_bits())
            .step_by(7919)
            .flat_map(|bits| [f32::from_bits(bits), -f32::from_bits(bits)])
    }

    fn relative(got: f32, want: f64) -> f64 {
        (f64::from(got) - want).abs() / want.abs()
    }

    #[test]
    fn exponentials_are_right_to_two_units() {
        let inside = floats(88.0).filter(|x| *x > EXP_RANGE.0);
        let worst = inside
            .map(|x| relative(exp(x), f64::from(x).exp()))
            .fold(0.0, f64::max);
        assert!(worst < 2.0 * f64::from(f32::EPSILON), "{worst}");
        assert_eq!(exp(0.0), 1.0);
    }

    #[test]
    fn exponentials_end_at_zero_and_infinity() {
        for x in [-87.34, -103.9, -1e30, f32::NEG_INFINITY] {
            assert_eq!(exp(x), 0.0, "{x}");
        }
        for x in [88.73, 1e30, f32::INFINITY] {
            assert_eq!(exp(x), f32::INFINITY, "{x}");
        }
        assert!(exp(f32::NAN).is_nan());
        assert!(exp(-f32::NAN).is_nan());
    }

    #[test]
    fn the_normal_distribution_is_right_in_its_tail_too() {
        let mut worst = [0.0, 0.0];
        for x in floats(13.0) {
            let (want, density) = f64::from(x).normal();
            let (got, slope) = normal(x);
            worst[0] = relative(got, want).max(worst[0]);
            worst[1] = relative(slope, density).max(worst[1]);
        }
        assert!(worst[0] < 5e-7 && worst[1] < 5e-7, "{worst:?}");
        assert_eq!(normal(0.0).0, 0.5);
    }

    #[test]
    fn the_normal_distribution_has_ends() {
        for x in [20.0, 1e4, 1e20, f32::MAX, f32::INFINITY] {
            assert_eq!(normal(x), (1.0, 0.0), "{x}");
            assert_eq!(normal(-x), (0.0, 0.0), "{x}");
        }
        let (cdf, density) = normal(f32::NAN);
        assert!(cdf.is_nan() && density.is_nan());
    }
}
