//! What goes before the products and follows them (`finish.cu`): rows brought into expert order, and
//! sums over parts, slabs and column tiles.

use burn::tensor::DType;
use cubecl::server::KernelArguments;

use super::Tensor;
use super::launch::{multiprocessors, rows_aligned};
use super::plan::{SumSplit, sorts_rows};
use super::source::{FINISH_THREADS, SLAB_ROWS, SLAB_TILE_ROWS};
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
    // Those of an expert without parts end at once.
    let enough = (4 * multiprocessors(out) / index.num_experts).max(multiprocessors(out));
    let cubes = elements.div_ceil(4 * 256).min(enough);
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

/// Tiles of [`SLAB_TILE_ROWS`] rows that there may be, each expert's last one being whole.
fn slab_tiles(index: &RawExpertIndex<Tensor>) -> usize {
    index.num_slots() / SLAB_TILE_ROWS + index.num_experts
}

/// Room for sums over [`SLAB_ROWS`] rows each: a slab of `width` columns for each of those in the
/// tiles that there may be.
pub(super) fn slabs(like: &Tensor, index: &RawExpertIndex<Tensor>, width: usize) -> Tensor {
    let count = slab_tiles(index) * SLAB_TILE_ROWS / SLAB_ROWS;
    empty(like, [count, width], DType::F32)
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
    // SAFETY: the slabs are those that a kernel has just written for the same index, and `out` has a
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

/// Gradient of the gate weights, `[tokens, top_k]` into `out`, from its shares; and the gradient of the
/// second bias, `[num_experts, d_model]`, into `grad_bias`, as that reads the same rows.
pub(super) fn gate_gradient(
    parts: &Tensor,
    grad_output: &Tensor,
    bias: Option<&Tensor>,
    gates: &Tensor,
    index: &RawExpertIndex<Tensor>,
    out: &Tensor,
    grad_bias: Option<&Tensor>,
) {
    let d_model = grad_output.meta.shape()[1];
    let num_slots = index.num_slots();
    let slabs = grad_bias.map(|_| slabs(grad_output, index, d_model));
    let mut arguments = KernelArguments::new();
    // What is not read or written has no buffer; any stands for it.
    let bias_or_any = bias.unwrap_or(grad_output);
    arguments.buffers = [
        parts,
        grad_output,
        bias_or_any,
        gates,
        &index.slots,
        &index.offsets,
        slabs.as_ref().unwrap_or(parts),
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
        usize::from(slabs.is_some()),
        grad_output.meta.strides()[0],
        bias_or_any.meta.strides()[0],
    ];
    const { assert!(32 * SLAB_TILE_ROWS / SLAB_ROWS == FINISH_THREADS as usize) };
    // SAFETY: a warp for each slab that there may be, and so a cube for each tile of them; the index's
    // tensors have the sizes in `scalars`.
    unsafe {
        kernel.launch(
            &out.client,
            (slab_tiles(index) as u32, 1),
            arguments,
            scalars.map(|n| n as u64).to_vec(),
        );
    }
    if let (Some(slabs), Some(grad_bias)) = (slabs, grad_bias) {
        add_slabs(&slabs, index, grad_bias);
    }
}
