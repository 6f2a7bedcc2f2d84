//! What goes before the products and follows them (`finish.cu`): rows brought into expert order, and
//! sums over parts, slabs and column tiles.

use burn::tensor::DType;
use cubecl::server::KernelArguments;

use super::Tensor;
use super::launch::{multiprocessors, rows_aligned};
use super::plan::{SumSplit, sorts_rows};
use super::source::{FINISH_THREADS, SLAB_ROWS, Tile};
use super::task::Kernel;
use crate::backend::RawExpertIndex;
use crate::ops::device::empty;
use crate::types::RowOrder;

/// Rows in token order for products of this hidden width, brought into expert order where that pays.
pub(super) fn prepared_rows(
    rows: Tensor,
    d_ff: usize,
    index: &RawExpertIndex<Tensor>,
) -> (Tensor, RowOrder) {
    let rows = rows_aligned(rows);
    if !sorts_rows(d_ff) {
        return (rows, RowOrder::Token);
    }
    let (num_slots, width) = (index.num_slots(), rows.meta.shape()[1]);
    let sorted = empty(&rows, [num_slots, width], rows.dtype);
    let mut arguments = KernelArguments::new();
    arguments.buffers = [&rows, &index.slots, &sorted]
        .map(|tensor| tensor.handle.clone().binding())
        .to_vec();
    let kernel = Kernel::SortRows { top_k: index.top_k };
    let cubes = (32 * num_slots).div_ceil(FINISH_THREADS as usize);
    let stride = rows.meta.strides()[0];
    // SAFETY: a warp for each position of the index, whose slots are of tokens that exist; rows are
    // aligned to 16 bytes and of a multiple of 8 elements.
    unsafe {
        kernel.launch(
            &sorted.client,
            (cubes as u32, 1),
            arguments,
            [num_slots, width, stride].map(|n| n as u64).to_vec(),
        );
    }
    (sorted, RowOrder::Expert)
}

/// Adds the parts of long sums up, into their experts' matrices of `out`.
pub(super) fn add_parts(
    parts: &Tensor,
    split: SumSplit,
    out: &Tensor,
    index: &RawExpertIndex<Tensor>,
    elements: usize,
) {
    let mut arguments = KernelArguments::new();
    arguments.buffers = [parts, &index.offsets, out]
        .map(|tensor| tensor.handle.clone().binding())
        .to_vec();
    let kernel = Kernel::SumParts {
        is_f16: out.dtype == DType::F16,
    };
    let cubes = elements.div_ceil(4 * 256).min(multiprocessors(out));
    // SAFETY: the parts are those that the product has just written, for the same index.
    unsafe {
        kernel.launch(
            &out.client,
            (cubes as u32, index.num_experts as u32),
            arguments,
            [elements, split.chunk, out.meta.strides()[0]]
                .map(|n| n as u64)
                .to_vec(),
        );
    }
}

/// Room for the sums over [`SLAB_ROWS`] rows each that a product with rows that stay leaves: a slab of
/// `width` columns for each of those in the row tiles that there may be.
pub(super) fn slabs(
    like: &Tensor,
    tile: Tile,
    index: &RawExpertIndex<Tensor>,
    width: usize,
) -> Tensor {
    let tiles = index.num_slots() / tile.rows + index.num_experts;
    empty(like, [tiles * tile.rows / SLAB_ROWS, width], DType::F32)
}

/// Adds each expert's slabs up, into its row of `out`.
pub(super) fn add_slabs(slabs: &Tensor, index: &RawExpertIndex<Tensor>, out: &Tensor) {
    let mut arguments = KernelArguments::new();
    arguments.buffers = [slabs, &index.offsets, out]
        .map(|tensor| tensor.handle.clone().binding())
        .to_vec();
    let kernel = Kernel::SumSlabs {
        is_f16: out.dtype == DType::F16,
    };
    let width = slabs.meta.shape()[1];
    // SAFETY: the slabs are those that a product has just written for the same index, and `out` has a
    // row of as many columns for each expert.
    unsafe {
        kernel.launch(
            &out.client,
            (width.div_ceil(32) as u32, index.num_experts as u32),
            arguments,
            [width, out.meta.strides()[0]].map(|n| n as u64).to_vec(),
        );
    }
}

/// Gradient of the gate weights from its shares: `[tokens, top_k]`.
pub(super) fn gate_gradient(
    parts: &Tensor,
    grad_output: &Tensor,
    bias: Option<&Tensor>,
    index: &RawExpertIndex<Tensor>,
    out: &Tensor,
) {
    let d_model = grad_output.meta.shape()[1];
    let num_slots = index.num_slots();
    let mut arguments = KernelArguments::new();
    // Without a bias its buffer is not read; any stands for it.
    let bias_or_any = bias.unwrap_or(grad_output);
    arguments.buffers = [
        parts,
        grad_output,
        bias_or_any,
        &index.positions,
        &index.offsets,
        out,
    ]
    .map(|tensor| tensor.handle.clone().binding())
    .to_vec();
    let kernel = Kernel::GateGradient {
        is_f16: out.dtype == DType::F16,
        top_k: index.top_k,
    };
    let scalars = [
        num_slots,
        parts.meta.shape()[0],
        index.num_experts,
        d_model,
        usize::from(bias.is_some()),
        grad_output.meta.strides()[0],
        bias_or_any.meta.strides()[0],
    ];
    // SAFETY: one warp for each token of the index, whose tensors have the sizes in `scalars`.
    unsafe {
        kernel.launch(
            &out.client,
            (
                (32 * index.tokens).div_ceil(FINISH_THREADS as usize) as u32,
                1,
            ),
            arguments,
            scalars.map(|n| n as u64).to_vec(),
        );
    }
}
