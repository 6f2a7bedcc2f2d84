//! Host's side: what the kernels accept, allocation, arguments.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Mutex, OnceLock, PoisonError};

use burn::tensor::DType;
use burn_cubecl::kernel::into_contiguous;
use cubecl::cuda::CudaDevice;
use cubecl::server::{KernelArguments, TensorMapBinding, TensorMapMeta};
use cubecl::zspace::{Shape, Strides, metadata::Metadata};
use cubecl_runtime::tma::{
    OobFill, TensorMapFormat, TensorMapInterleave, TensorMapPrefetch, TensorMapSwizzle, TiledArgs,
};
use cudarc::driver::result;
use cudarc::driver::sys::CUdevice_attribute;

use super::finish::add_parts;
use super::plan::{row_schedule, segment_tiles, sum_plan};
use super::source::{
    CLUSTER, Epilogue, MAX_EXPERTS, Problem, STAGE_DEPTH, Schedule, Tile, Variant,
};
use super::task::Kernel;
use super::{EstmmArgs, IS_OFF, Tensor};
use crate::backend::{EsmmArgs, RawExpertIndex};
use crate::ops::device::empty;
use crate::ops::tile::launch::with_unit_columns;
use crate::types::RowOrder;

/// Elements of one 16-byte access.
const ACCESS: usize = 8;

/// Columns of the boxes that bulk copies move: 128 bytes.
const BOX_COLUMNS: usize = 64;

/// Whether operands of this type and these widths can be multiplied here.
pub(super) fn accepts(like: &Tensor, widths: &[usize], index: &RawExpertIndex<Tensor>) -> bool {
    matches!(like.dtype, DType::BF16 | DType::F16)
        && widths.iter().all(|&w| w > 0 && w.is_multiple_of(ACCESS))
        && index.slots.dtype == DType::I32
        && index.num_slots() > 0
        && i32::try_from(index.num_slots()).is_ok()
        && index.num_experts <= MAX_EXPERTS
        && !IS_OFF.load(Ordering::Relaxed)
        && is_hopper(&like.device)
}

/// Whether the device has `wgmma`: compute capability 9.0, neither less nor more.
fn is_hopper(device: &CudaDevice) -> bool {
    static KNOWN: OnceLock<Mutex<HashMap<usize, bool>>> = OnceLock::new();
    let known = KNOWN.get_or_init(Default::default);
    let mut known = known.lock().unwrap_or_else(PoisonError::into_inner);
    *known.entry(device.index).or_insert_with(|| {
        let attribute = |which| {
            let device = result::device::get(i32::try_from(device.index).ok()?).ok()?;
            // SAFETY: the device was found, and any attribute may be asked for.
            unsafe { result::device::get_attribute(device, which) }.ok()
        };
        let major = attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR);
        let minor = attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
        let is_hopper = (major, minor) == (Some(9), Some(0));
        log::info!(
            "device {}: wgmma kernels {}",
            device.index,
            if is_hopper { "on" } else { "off" }
        );
        is_hopper
    })
}

pub(super) fn multiprocessors(tensor: &Tensor) -> usize {
    let hardware = &tensor.client.properties().hardware;
    hardware.num_streaming_multiprocessors.unwrap_or(1) as usize
}

/// The tensor with rows of neighbouring elements at multiples of 16 bytes. Burn pads rows to 512
/// bytes, so that tensors are often not contiguous; these kernels take any distance between rows.
pub(super) fn rows_aligned(tensor: Tensor) -> Tensor {
    let tensor = with_unit_columns(tensor);
    let offset = tensor.handle.offset_start.unwrap_or(0);
    let rank = tensor.meta.num_dims();
    let mut steps = tensor.meta.strides()[..rank - 1].iter();
    if steps.all(|&step| step > 0 && step.is_multiple_of(ACCESS)) && offset.is_multiple_of(16) {
        tensor
    } else {
        copied(tensor)
    }
}

/// The tensor, contiguous and aligned.
pub(super) fn packed(tensor: Tensor) -> Tensor {
    let tensor = into_contiguous(tensor);
    if tensor.handle.offset_start.unwrap_or(0).is_multiple_of(16) {
        tensor
    } else {
        copied(tensor)
    }
}

/// A copy in memory of its own.
fn copied(tensor: Tensor) -> Tensor {
    let dtype = tensor.dtype;
    let copy = burn_cubecl::kernel::cast(tensor, DType::F32);
    into_contiguous(burn_cubecl::kernel::cast(copy, dtype))
}

/// A map of `[matrices, rows, columns]`, or of one matrix, for boxes of `box_rows` rows. The tensor
/// is aligned ([`rows_aligned`]).
fn tensor_map(tensor: &Tensor, box_rows: usize) -> TensorMapBinding {
    let (shape, strides) = (tensor.meta.shape(), tensor.meta.strides());
    let (shape, strides) = match tensor.meta.num_dims() {
        2 => (
            [1, shape[0], shape[1]],
            [shape[0] * strides[0], strides[0], 1],
        ),
        _ => ([shape[0], shape[1], shape[2]], [strides[0], strides[1], 1]),
    };
    TensorMapBinding {
        binding: tensor.handle.clone().binding(),
        map: TensorMapMeta {
            format: TensorMapFormat::Tiled(TiledArgs {
                tile_size: Shape::new([1, box_rows, BOX_COLUMNS]),
            }),
            metadata: Metadata::new(Shape::new(shape), Strides::new(&strides)),
            elem_stride: Strides::new(&[1, 1, 1]),
            interleave: TensorMapInterleave::None,
            swizzle: TensorMapSwizzle::B128,
            prefetch: TensorMapPrefetch::B256,
            oob_fill: OobFill::Zero,
            storage_ty: tensor.dtype.into(),
        },
    }
}

/// Extents of a product, as the text's `Params` has them.
#[derive(Clone, Copy, Default)]
struct Extents {
    m: usize,
    n: usize,
    k: usize,
    chunk: usize,
    bias_stride: usize,
    h_stride: usize,
    out_stride: usize,
    first: usize,
    end: usize,
}

/// Puts a product into the queue. `others` are the buffers behind the index, in the text's order.
fn launch(
    variant: Variant,
    a: &Tensor,
    b: TensorMapBinding,
    index: &RawExpertIndex<Tensor>,
    others: &[&Tensor],
    extents: Extents,
) {
    let binding = |tensor: &Tensor| tensor.handle.clone().binding();
    let mut arguments = KernelArguments::new();
    arguments.tensor_maps = vec![b];
    if variant.copies_in_bulk() {
        let rows = match variant.problem {
            Problem::Rows { .. } => variant.tile.rows,
            Problem::Sums { .. } => STAGE_DEPTH,
        };
        arguments.tensor_maps.push(tensor_map(a, rows));
    }
    arguments.buffers = [a, &index.slots, &index.offsets]
        .into_iter()
        .chain(others.iter().copied())
        .map(binding)
        .collect();
    let scalars = [
        index.num_experts,
        extents.m,
        extents.n,
        extents.k,
        a.meta.strides()[0],
        extents.chunk,
        index.num_slots(),
        extents.bias_stride,
        extents.h_stride,
        extents.out_stride,
        extents.first,
        extents.end,
    ];
    let cubes = multiprocessors(a) / CLUSTER * CLUSTER;
    // SAFETY: callers pass the buffers of the variant's signature; all accesses are guarded by the
    // extents and the index, whose slots are rows that exist.
    unsafe {
        Kernel::Grouped(variant).launch(
            &a.client,
            (cubes as u32, 1),
            arguments,
            scalars.map(|n| n as u64).to_vec(),
        );
    }
}

/// The index with contiguous vectors.
pub(super) fn contiguous_index(index: RawExpertIndex<Tensor>) -> RawExpertIndex<Tensor> {
    RawExpertIndex {
        counts: index.counts,
        offsets: into_contiguous(index.offsets),
        slots: into_contiguous(index.slots),
        positions: into_contiguous(index.positions),
        ..index
    }
}

/// Rows times their expert's matrix, with what follows.
#[derive(Clone)]
pub(super) struct Rows<'a> {
    /// Left operand, aligned.
    pub(super) a: &'a Tensor,
    pub(super) a_order: RowOrder,
    /// Matrices, aligned.
    pub(super) w: &'a Tensor,
    pub(super) transposed: bool,
    /// Aligned.
    pub(super) bias: Option<&'a Tensor>,
    /// Packed.
    pub(super) gates: Option<&'a Tensor>,
    pub(super) index: &'a RawExpertIndex<Tensor>,
    /// Positions that are worked on. If `a` is in expert order it has their rows alone, and so has the
    /// buffer of activations.
    pub(super) window: Range<usize>,
    pub(super) out_order: RowOrder,
}

impl Rows<'_> {
    /// Columns of the result.
    pub(super) fn width(&self) -> usize {
        self.w.meta.shape()[if self.transposed { 1 } else { 2 }]
    }

    /// The tile and the schedule that are used with `epilogue`.
    pub(super) fn schedule(&self, epilogue: Epilogue) -> (Tile, Schedule) {
        row_schedule(
            self.window.len(),
            self.index.num_experts,
            (self.width(), self.a.meta.shape()[1]),
            epilogue,
            multiprocessors(self.a),
        )
    }

    /// Launches with `epilogue`, whose own buffers are `outputs`, in the text's order.
    pub(super) fn launch(&self, epilogue: Epilogue, outputs: &[&Tensor]) {
        let (tile, schedule) = self.schedule(epilogue);
        let variant = Variant {
            tile,
            schedule,
            a: self.a_order,
            problem: Problem::Rows {
                out: self.out_order,
                transposed: self.transposed,
                epilogue,
            },
            top_k: self.index.top_k,
            has_bias: self.bias.is_some(),
            has_gates: self.gates.is_some(),
            is_f16: self.a.dtype == DType::F16,
            num_experts: self.index.num_experts,
        };
        let box_rows = if self.transposed {
            tile.columns / CLUSTER
        } else {
            STAGE_DEPTH / 2
        };
        let others: Vec<&Tensor> = self
            .bias
            .into_iter()
            .chain(self.gates)
            .chain(outputs.iter().copied())
            .collect();
        let extents = Extents {
            n: self.width(),
            k: self.a.meta.shape()[1],
            bias_stride: self.bias.map_or(0, |bias| bias.meta.strides()[0]),
            h_stride: match epilogue {
                Epilogue::ActivateVjp { .. } => outputs[0].meta.strides()[0],
                _ => 0,
            },
            chunk: match schedule {
                Schedule::Ring => 0,
                Schedule::Stationary { .. } => segment_tiles(
                    self.window.len(),
                    self.index.num_experts,
                    self.width(),
                    multiprocessors(self.a),
                ),
            },
            first: self.window.start,
            end: self.window.end,
            ..Extents::default()
        };
        let map = tensor_map(self.w, box_rows);
        launch(variant, self.a, map, self.index, &others, extents);
    }

    /// Launches a plain product.
    pub(super) fn product(&self, rows: usize) -> Tensor {
        let out = empty(self.a, [rows, self.width()], self.a.dtype);
        self.launch(Epilogue::Store, &[&out]);
        out
    }
}

fn dims(tensor: &Tensor) -> [usize; 3] {
    let shape = tensor.meta.shape();
    [shape[0], shape[1], shape[2]]
}

/// See [`super::esmm`].
pub(super) fn esmm(args: EsmmArgs<Tensor, Tensor>) -> Result<Tensor, EsmmArgs<Tensor, Tensor>> {
    let [_, rows, columns] = dims(&args.w);
    if !accepts(&args.x, &[rows, columns], &args.index) {
        return Err(args);
    }
    let (a, w) = (rows_aligned(args.x), rows_aligned(args.w));
    let bias = args.bias.map(rows_aligned);
    let index = contiguous_index(args.index);
    let rows = Rows {
        a: &a,
        a_order: args.x_order,
        w: &w,
        transposed: args.transposed,
        bias: bias.as_ref(),
        gates: None,
        index: &index,
        window: 0..index.num_slots(),
        out_order: args.out_order,
    };
    Ok(rows.product(index.num_slots()))
}

/// See [`super::estmm`].
pub(super) fn estmm(args: EstmmArgs<Tensor>) -> Result<Tensor, EstmmArgs<Tensor>> {
    let widths = [args.a.meta.shape()[1], args.b.meta.shape()[1]];
    if !accepts(&args.a, &widths, &args.index) {
        return Err(args);
    }
    let index = contiguous_index(args.index);
    match (args.a_order, args.b_order) {
        (_, RowOrder::Expert) => {
            let (a, b) = (rows_aligned(args.a), rows_aligned(args.b));
            Ok(sums(&a, args.a_order, &b, &index, false))
        }
        (RowOrder::Expert, _) => {
            let (a, b) = (rows_aligned(args.a), rows_aligned(args.b));
            Ok(sums(&b, args.b_order, &a, &index, true))
        }
        // Bulk copies cannot gather: one operand must lie in expert order.
        _ => Err(EstmmArgs { index, ..args }),
    }
}

/// `Σ gatheredᵀ sorted` for each expert, or its transpose. `sorted` is in expert order.
pub(super) fn sums(
    gathered: &Tensor,
    order: RowOrder,
    sorted: &Tensor,
    index: &RawExpertIndex<Tensor>,
    out_transposed: bool,
) -> Tensor {
    let (m, n) = (gathered.meta.shape()[1], sorted.meta.shape()[1]);
    let (rows, columns) = if out_transposed { (n, m) } else { (m, n) };
    let out = empty(gathered, [index.num_experts, rows, columns], gathered.dtype);
    sums_into(gathered, order, sorted, index, out_transposed, &out);
    out
}

/// [`sums`] into `out`, whose matrices have contiguous rows one after the other.
pub(super) fn sums_into(
    gathered: &Tensor,
    order: RowOrder,
    sorted: &Tensor,
    index: &RawExpertIndex<Tensor>,
    out_transposed: bool,
    out: &Tensor,
) {
    let (m, n) = (gathered.meta.shape()[1], sorted.meta.shape()[1]);
    let experts = index.num_experts;
    let num_slots = index.num_slots();
    let processors = multiprocessors(gathered);
    let (tile, split) = sum_plan(num_slots, experts, (m, n), processors);
    let variant = Variant {
        tile,
        schedule: Schedule::Ring,
        a: order,
        problem: Problem::Sums {
            out_transposed,
            split: split.is_some(),
        },
        top_k: index.top_k,
        has_bias: false,
        has_gates: false,
        is_f16: gathered.dtype == DType::F16,
        num_experts: experts,
    };
    let parts = split.map(|split| empty(gathered, [split.max_parts, m * n], DType::F32));
    let others: Vec<&Tensor> = parts.iter().chain([out]).collect();
    let extents = Extents {
        m,
        n,
        chunk: split.map_or(0, |split| split.chunk),
        out_stride: out.meta.strides()[0],
        end: num_slots,
        ..Extents::default()
    };
    let map = tensor_map(sorted, STAGE_DEPTH / 2);
    launch(variant, gathered, map, index, &others, extents);
    if let (Some(split), Some(parts)) = (split, parts) {
        add_parts(&parts, split, out, index, m * n);
    }
}

/// `len` elements of dimension `dim` from `start` on, in the same memory.
pub(super) fn slice(tensor: &Tensor, dim: usize, start: usize, len: usize) -> Tensor {
    let mut slice = tensor.clone();
    let bytes = start * tensor.meta.strides()[dim] * tensor.dtype.size();
    slice.handle = slice.handle.offset_start(bytes as u64);
    let mut shape = tensor.meta.shape().clone();
    shape[dim] = len;
    let strides = tensor.meta.strides().clone();
    *slice.meta = Metadata::new(shape, strides);
    slice
}
