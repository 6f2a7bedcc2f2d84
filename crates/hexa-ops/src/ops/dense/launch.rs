//! Host's side of the dense products.

use std::sync::Once;

use burn::tensor::DType;
use burn_cubecl::{CubeRuntime, tensor::CubeTensor};
use cubecl::client::ComputeClient;
use cubecl::prelude::CubePrimitive;
use cubecl::zspace::{Shape, Strides, metadata::Metadata};
use cubek::matmul::{
    definition::{MatmulElems, MatmulGlobalElems, MatmulSetupError},
    launch::{Strategy, launch_ref},
};
use cubek::std::InputBinding;

use super::kernel::strided_matmul;
use super::plan::{Candidate, candidates, is_readable, parts_of_sum};
use crate::ops::device::{accumulator, address_type, contiguous, empty, unit_per_item, zeros};
use crate::ops::tile::launch::sum_parts;
use crate::types::MatmulPrecision;

/// Matrix product; contract in [`crate::ExpertKernels::dense_matmul`].
///
/// # Shapes
/// - `lhs`: `[.., m, k]`, `rhs`: `[.., k, n]`, of one float dtype, rank (two or more) and batch
///   dimensions; sums in f32, in f64 for f64
/// - result: `[.., m, n]`, contiguous, of type `dtype`
pub fn dense_matmul<R: CubeRuntime>(
    lhs: CubeTensor<R>,
    rhs: CubeTensor<R>,
    precision: MatmulPrecision,
    dtype: DType,
) -> CubeTensor<R> {
    let rank = lhs.meta.shape().num_dims();
    let mut shape = lhs.meta.shape().clone();
    let inner = shape[rank - 1];
    shape[rank - 1] = rhs.meta.shape()[rank - 1];
    if shape.num_elements() == 0 || inner == 0 {
        return zeros(&lhs, shape, dtype);
    }

    let columns = shape[rank - 1];
    let rows = shape[rank - 2];
    let batches = shape.num_elements() / (rows * columns);
    let parts = parts_of_sum(batches, rows, columns, inner);
    // With batches as well as parts there would be two axes in front.
    if parts > 1 && batches == 1 {
        let sums = dense_matmul(
            in_parts(lhs, rank - 1, parts),
            in_parts(rhs, rank - 2, parts),
            precision,
            accumulator(dtype),
        );
        return sum_parts(sums, parts, shape, dtype);
    }

    let out = empty(&lhs, shape, dtype);
    for candidate in candidates(lhs.dtype, precision) {
        let strategy = match candidate {
            Candidate::MatrixUnits => Strategy::SimpleCyclicCmma(Default::default()),
            Candidate::RegisterTiles => Strategy::SimpleUnit(Default::default()),
            Candidate::Strided => {
                strided(lhs, rhs, &out);
                break;
            }
        };
        match tiled(&strategy, &lhs, &rhs, &out) {
            Ok(()) => break,
            Err(refusal) => report(*candidate, &refusal),
        }
    }
    out
}

/// The matrix as `[parts, rows, columns]`, `axis` of it being cut. No copy.
fn in_parts<R: CubeRuntime>(mut tensor: CubeTensor<R>, axis: usize, parts: usize) -> CubeTensor<R> {
    let rank = tensor.meta.num_dims();
    let mut shape = [
        parts,
        tensor.meta.shape()[rank - 2],
        tensor.meta.shape()[rank - 1],
    ];
    let strides = tensor.meta.strides();
    let len = tensor.meta.shape()[axis] / parts;
    let strides = [len * strides[axis], strides[rank - 2], strides[rank - 1]];
    shape[1 + axis + 2 - rank] = len;
    *tensor.meta = Metadata::new(Shape::new(shape), Strides::new(&strides));
    tensor
}

/// Launches one of CubeK's kernels, or says why it cannot work on these operands.
fn tiled<R: CubeRuntime>(
    strategy: &Strategy,
    lhs: &CubeTensor<R>,
    rhs: &CubeTensor<R>,
    out: &CubeTensor<R>,
) -> Result<(), MatmulSetupError> {
    let dtype = lhs.dtype.into();
    let mut elems = MatmulElems::from_globals(&MatmulGlobalElems {
        lhs: dtype,
        rhs: dtype,
        out: out.dtype.into(),
    });
    launch_ref(
        strategy,
        &out.client,
        InputBinding::new(readable(lhs).binding(), dtype),
        InputBinding::new(readable(rhs).binding(), dtype),
        out.clone().binding(),
        &mut elems,
    )
}

fn readable<R: CubeRuntime>(tensor: &CubeTensor<R>) -> CubeTensor<R> {
    if is_readable(tensor.meta.shape(), tensor.meta.strides()) {
        tensor.clone()
    } else {
        contiguous(tensor.clone())
    }
}

fn strided<R: CubeRuntime>(lhs: CubeTensor<R>, rhs: CubeTensor<R>, out: &CubeTensor<R>) {
    let num_elements = out.meta.num_elements();
    let rank = out.meta.shape().num_dims();
    let dtype = lhs.dtype;
    let (cube_count, cube_dim) = unit_per_item(&out.client, num_elements);
    let address = address_type(&[&lhs, &rhs, out]);
    // SAFETY: units past the last element leave at once; the other indices follow the operands'
    // strides within their shapes, and `out` is contiguous.
    unsafe {
        strided_matmul::launch_unchecked(
            &out.client,
            cube_count,
            cube_dim,
            address,
            lhs.into_tensor_arg(),
            rhs.into_tensor_arg(),
            out.clone().into_tensor_arg(),
            num_elements,
            rank,
            [dtype.into(), out.dtype.into(), accumulator(dtype).into()],
        );
    }
}

/// Whether the device has matrix units for TF32.
pub fn has_tf32<R: CubeRuntime>(client: &ComputeClient<R>) -> bool {
    let tf32 = cubecl::tf32::as_type_native_unchecked().storage_type();
    client.properties().supports_type(tf32)
}

/// Logs the first refusal of each kind of kernel: which kernel runs is a choice of capability,
/// and the same one for the rest of the process.
fn report(candidate: Candidate, refusal: &MatmulSetupError) {
    static MATRIX_UNITS: Once = Once::new();
    static REGISTER_TILES: Once = Once::new();
    let once = match candidate {
        Candidate::MatrixUnits => &MATRIX_UNITS,
        _ => &REGISTER_TILES,
    };
    once.call_once(|| log::info!("dense_matmul: {candidate:?} not used: {refusal}"));
}
