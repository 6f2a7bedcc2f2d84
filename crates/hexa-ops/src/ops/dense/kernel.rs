//! The product that accepts every shape and every stride.

use cubecl::prelude::*;

/// `out[b, i, j] = Σ_k lhs[b, i, k] · rhs[b, k, j]`, one unit per element.
#[cube(launch_unchecked, address_type = "dynamic")]
pub fn strided_matmul<F: Float, T: Float, A: Float>(
    lhs: &Tensor<F>,
    rhs: &Tensor<F>,
    out: &mut Tensor<T>,
    num_elements: usize,
    #[comptime] rank: usize,
    #[define(F, T, A)] _dtypes: [StorageType; 3],
) {
    if ABSOLUTE_POS >= num_elements {
        terminate!();
    }
    let row_axis = comptime!(rank - 2);
    let column_axis = comptime!(rank - 1);

    let mut rest = ABSOLUTE_POS;
    let column = rest % out.shape(column_axis);
    rest /= out.shape(column_axis);
    let row = rest % out.shape(row_axis);
    rest /= out.shape(row_axis);
    let mut lhs_at = row * lhs.stride(row_axis);
    let mut rhs_at = column * rhs.stride(column_axis);
    #[unroll]
    for i in 0..row_axis {
        let axis = comptime!(row_axis - 1 - i);
        let at = rest % out.shape(axis);
        rest /= out.shape(axis);
        lhs_at += at * lhs.stride(axis);
        rhs_at += at * rhs.stride(axis);
    }

    let mut sum = A::new(0.0);
    for _ in 0..lhs.shape(column_axis) {
        sum += A::cast_from(lhs[lhs_at]) * A::cast_from(rhs[rhs_at]);
        lhs_at += lhs.stride(column_axis);
        rhs_at += rhs.stride(row_axis);
    }
    out[ABSOLUTE_POS] = T::cast_from(sum);
}
