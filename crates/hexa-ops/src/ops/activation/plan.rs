//! What the kernels are specialised on.

use super::math::Curve;
use crate::types::Activation;

/// The curve of an activation; gated forms apply it to their gate.
pub fn curve(activation: Activation) -> Curve {
    match activation {
        Activation::Gelu | Activation::GeGlu => Curve::Gelu,
        Activation::GeluTanh => Curve::GeluTanh,
        Activation::Relu => Curve::Relu,
        Activation::Silu | Activation::SwiGlu => Curve::Silu,
    }
}

/// Units that work on a row of `width` columns: a power of two, so that sums halve evenly, and at
/// most 256, which WebGPU guarantees.
pub fn units_per_row(width: usize) -> usize {
    width.next_power_of_two().clamp(32, 256)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_are_a_power_of_two_within_limits() {
        assert_eq!(
            [0, 1, 33, 200, 257, 6144].map(units_per_row),
            [32, 32, 64, 256, 256, 256]
        );
    }

    #[test]
    fn gated_forms_use_the_plain_curve() {
        assert_eq!(curve(Activation::SwiGlu), curve(Activation::Silu));
        assert_eq!(curve(Activation::GeGlu), curve(Activation::Gelu));
    }
}
