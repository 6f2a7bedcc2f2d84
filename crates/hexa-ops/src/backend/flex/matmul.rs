//! ESMM and ESTMM: one `gemm` per tile of an expert's contiguous rows.

use burn_flex::FlexTensor;
use gemm::Parallelism;
use rayon::prelude::*;

use super::element::{HostIndex, Matrix, Real, dims2, dims3, write};
use crate::backend::{EsmmArgs, RawExpertIndex};
use crate::types::RowOrder;

/// Rows of one piece of work: large enough to amortise packing the expert's weights, small
/// enough that a few experts fill the machine's cores.
const TILE_ROWS: usize = 192;

/// A matrix in memory: element `(r, c)` is at `r · row_stride + c · column_stride`.
struct Strided<'a, A> {
    data: &'a [A],
    row_stride: usize,
    column_stride: usize,
}

impl<A> Strided<'_, A> {
    /// Whether a `rows × columns` matrix stays inside the slice.
    fn holds(&self, rows: usize, columns: usize) -> bool {
        rows == 0
            || columns == 0
            || (rows - 1) * self.row_stride + (columns - 1) * self.column_stride < self.data.len()
    }
}

/// `dst = lhs · rhs`, or `dst += lhs · rhs`, with `dst` row-major `[m, n]`, on one thread.
fn multiply<A: Real>(
    [m, n, k]: [usize; 3],
    dst: &mut [A],
    lhs: Strided<'_, A>,
    rhs: Strided<'_, A>,
    accumulate: bool,
) {
    assert_eq!(dst.len(), m * n);
    assert!(lhs.holds(m, k) && rhs.holds(k, n));
    let one = A::from_f64(1.0);
    // SAFETY: the assertions above keep every access inside the three slices; `dst` is borrowed
    // mutably, so nothing aliases it; `A` is f32 or f64, which `gemm` supports.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            dst.as_mut_ptr(),
            1,
            n as isize,
            accumulate,
            lhs.data.as_ptr(),
            lhs.column_stride as isize,
            lhs.row_stride as isize,
            rhs.data.as_ptr(),
            rhs.column_stride as isize,
            rhs.row_stride as isize,
            one,
            one,
            false,
            false,
            false,
            Parallelism::None,
        );
    }
}

/// See [`crate::ExpertKernels::esmm`].
pub fn esmm<A: Real>(args: EsmmArgs<FlexTensor, FlexTensor>) -> FlexTensor {
    let dtype = args.x.dtype();
    let index = HostIndex::read(&args.index);
    let [_, k] = dims2(&args.x);
    let [_, rows, columns] = dims3(&args.w);
    let n = if args.transposed { rows } else { columns };
    let num_slots = args.index.num_slots();

    let x = Matrix::<A>::read(&args.x);
    let x = index.gather(x.as_slice(), args.x_order, k);
    let w = Matrix::<A>::read(&args.w);
    let bias = args.bias.as_ref().map(Matrix::<A>::read);

    let mut out = vec![A::from_f64(0.0); num_slots * n];
    expert_tiles(&index, &mut out, n)
        .into_par_iter()
        .for_each(|(e, start, tile)| {
            let m = tile.len() / n;
            if let Some(bias) = &bias {
                let row = &bias.as_slice()[e * n..(e + 1) * n];
                tile.chunks_exact_mut(n)
                    .for_each(|y| y.copy_from_slice(row));
            }
            let (row_stride, column_stride) = if args.transposed { (1, k) } else { (n, 1) };
            multiply(
                [m, n, k],
                tile,
                Strided {
                    data: &x[start * k..(start + m) * k],
                    row_stride: k,
                    column_stride: 1,
                },
                Strided {
                    data: &w.as_slice()[e * n * k..(e + 1) * n * k],
                    row_stride,
                    column_stride,
                },
                bias.is_some(),
            );
        });
    if args.out_order == RowOrder::Slot {
        let expert_order = std::mem::replace(&mut out, vec![A::from_f64(0.0); num_slots * n]);
        out.par_chunks_mut(n)
            .with_min_len(64)
            .zip(&index.positions)
            .for_each(|(row, &p)| row.copy_from_slice(&expert_order[p * n..(p + 1) * n]));
    }
    write(out, [num_slots, n], dtype)
}

/// Cuts a matrix in expert order into tiles that lie within one expert: (expert, first position,
/// rows).
fn expert_tiles<'a, A>(
    index: &HostIndex,
    mut rows: &'a mut [A],
    width: usize,
) -> Vec<(usize, usize, &'a mut [A])> {
    let mut tiles = Vec::new();
    for (e, range) in index.offsets.windows(2).enumerate() {
        let mut start = range[0];
        while start < range[1] {
            let m = TILE_ROWS.min(range[1] - start);
            let (tile, rest) = rows.split_at_mut(m * width);
            tiles.push((e, start, tile));
            rows = rest;
            start += m;
        }
    }
    tiles
}

/// See [`crate::ExpertKernels::estmm`].
pub fn estmm<A: Real>(
    a: &FlexTensor,
    a_order: RowOrder,
    b: &FlexTensor,
    b_order: RowOrder,
    index: &RawExpertIndex<FlexTensor>,
) -> FlexTensor {
    let dtype = a.dtype();
    let index = HostIndex::read(index);
    let [_, m] = dims2(a);
    let [_, n] = dims2(b);
    let num_experts = index.num_experts();

    let a = Matrix::<A>::read(a);
    let a = index.gather(a.as_slice(), a_order, m);
    let b = Matrix::<A>::read(b);
    let b = index.gather(b.as_slice(), b_order, n);

    let mut out = vec![A::from_f64(0.0); num_experts * m * n];
    out.par_chunks_mut(m * n)
        .zip(index.offsets.par_windows(2))
        .flat_map(|(expert, range)| {
            expert
                .par_chunks_mut(TILE_ROWS * n)
                .enumerate()
                .map(move |(i, tile)| (tile, i * TILE_ROWS, range[0], range[1]))
        })
        .for_each(|(tile, first, start, end)| {
            if start == end {
                return;
            }
            multiply(
                [tile.len() / n, n, end - start],
                tile,
                Strided {
                    data: &a[start * m + first..end * m],
                    row_stride: 1,
                    column_stride: m,
                },
                Strided {
                    data: &b[start * n..end * n],
                    row_stride: n,
                    column_stride: 1,
                },
                false,
            );
        });
    write(out, [num_experts, m, n], dtype)
}
