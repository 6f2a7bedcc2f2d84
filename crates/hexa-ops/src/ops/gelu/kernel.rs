//! Device code of GELU.

use cubecl::prelude::*;

use crate::ops::activation::math::{Curve, curve_derivative, curve_value};

/// `out = gelu(x)`, one unit per element.
#[cube(launch_unchecked, address_type = "dynamic")]
pub fn forward<F: Float, A: Float>(
    x: &Array<F>,
    out: &mut Array<F>,
    num_elements: usize,
    #[define(F, A)] _dtypes: [StorageType; 2],
) {
    if ABSOLUTE_POS >= num_elements {
        terminate!();
    }
    let value = curve_value::<A>(A::cast_from(x[ABSOLUTE_POS]), Curve::Gelu);
    out[ABSOLUTE_POS] = F::cast_from(value);
}

/// `out = grad · gelu'(x)`, one unit per element.
#[cube(launch_unchecked, address_type = "dynamic")]
pub fn backward<F: Float, A: Float>(
    x: &Array<F>,
    grad: &Array<F>,
    out: &mut Array<F>,
    num_elements: usize,
    #[define(F, A)] _dtypes: [StorageType; 2],
) {
    if ABSOLUTE_POS >= num_elements {
        terminate!();
    }
    let slope = curve_derivative::<A>(A::cast_from(x[ABSOLUTE_POS]), Curve::Gelu);
    out[ABSOLUTE_POS] = F::cast_from(A::cast_from(grad[ABSOLUTE_POS]) * slope);
}
