//! ESS and the combination of a token's slots: sums of rows.

use burn_flex::FlexTensor;
use rayon::prelude::*;

use super::element::{HostIndex, Matrix, Real, dims2, write};
use crate::backend::RawExpertIndex;
use crate::types::RowOrder;

/// Rows summed before they are added to an expert's total, so that rounding errors grow with the
/// square root of a sum's length rather than with the length.
const BLOCK_ROWS: usize = 128;

/// `acc += scale · row`.
fn add_scaled<A: Real>(acc: &mut [A], row: &[A], scale: A) {
    for (a, &v) in acc.iter_mut().zip(row) {
        *a = *a + scale * v;
    }
}

/// See [`crate::ExpertKernels::ess`].
pub fn ess<A: Real>(
    x: &FlexTensor,
    x_order: RowOrder,
    gates: Option<&FlexTensor>,
    index: &RawExpertIndex<FlexTensor>,
) -> FlexTensor {
    let dtype = x.dtype();
    let index = HostIndex::read(index);
    let [_, n] = dims2(x);
    let x = Matrix::<A>::read(x);
    let x = x.as_slice();
    let gates = gates.map(Matrix::<A>::read);
    let zero = A::from_f64(0.0);
    let one = A::from_f64(1.0);

    let mut out = vec![zero; index.num_experts() * n];
    out.par_chunks_mut(n)
        .zip(index.offsets.par_windows(2))
        .for_each(|(total, range)| {
            let mut block = vec![zero; n];
            for first in (range[0]..range[1]).step_by(BLOCK_ROWS) {
                block.fill(zero);
                for p in first..range[1].min(first + BLOCK_ROWS) {
                    let r = index.row(x_order, p);
                    let g = gates.as_ref().map_or(one, |g| g.as_slice()[index.slots[p]]);
                    add_scaled(&mut block, &x[r * n..(r + 1) * n], g);
                }
                add_scaled(total, &block, one);
            }
        });
    write(out, [index.num_experts(), n], dtype)
}

/// See [`crate::ExpertKernels::combine`].
pub fn combine<A: Real>(
    y: &FlexTensor,
    y_order: RowOrder,
    gates: Option<&FlexTensor>,
    index: &RawExpertIndex<FlexTensor>,
) -> FlexTensor {
    let dtype = y.dtype();
    let tokens = index.tokens;
    let top_k = index.top_k;
    let index = HostIndex::read(index);
    let [_, n] = dims2(y);
    let y = Matrix::<A>::read(y);
    let y = y.as_slice();
    let gates = gates.map(Matrix::<A>::read);
    let one = A::from_f64(1.0);

    let mut out = vec![A::from_f64(0.0); tokens * n];
    out.par_chunks_mut(n)
        .with_min_len(64)
        .enumerate()
        .for_each(|(t, row)| {
            for slot in t * top_k..(t + 1) * top_k {
                let r = match y_order {
                    RowOrder::Expert => index.positions[slot],
                    RowOrder::Slot | RowOrder::Token => slot,
                };
                let g = gates.as_ref().map_or(one, |g| g.as_slice()[slot]);
                add_scaled(row, &y[r * n..(r + 1) * n], g);
            }
        });
    write(out, [tokens, n], dtype)
}
