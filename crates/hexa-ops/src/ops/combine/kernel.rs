//! Device code of the combination.

use cubecl::prelude::*;

/// `out[t, c] = Σ_j g[t, j] · y[row(t, j), c]`; widths and strides in vectors.
///
/// `positions` maps slots to rows of `y`; without it, row = slot.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(crate) fn combine<T: Numeric, A: Numeric, I: Int, N: Size>(
    y: &Array<Vector<T, N>>,
    gates: &ComptimeOption<Array<T>>,
    positions: &ComptimeOption<Array<I>>,
    out: &mut Array<Vector<T, N>>,
    tokens: usize,
    width: usize,
    y_stride: usize,
    #[comptime] top_k: usize,
    #[define(T, A, I)] _dtypes: [StorageType; 3],
) {
    let token = ABSOLUTE_POS / width;
    let column = ABSOLUTE_POS % width;
    if token >= tokens {
        terminate!();
    }
    let mut sum = Vector::<A, N>::new(A::from_int(0));
    for choice in 0..top_k {
        let slot = token * top_k + choice;
        let mut row = slot;
        #[comptime]
        if let ComptimeOption::Some(positions) = positions {
            row = usize::cast_from(positions[slot]);
        }
        let mut value = Vector::<A, N>::cast_from(y[row * y_stride + column]);
        #[comptime]
        if let ComptimeOption::Some(gates) = gates {
            value *= Vector::<A, N>::new(A::cast_from(gates[slot]));
        }
        sum += value;
    }
    out[ABSOLUTE_POS] = Vector::cast_from(sum);
}
