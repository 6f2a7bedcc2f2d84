//! Host's side of the dense products.

use std::sync::Once;

use burn_cubecl::{CubeRuntime, tensor::CubeTensor};
use cubek::matmul::{
    definition::{MatmulElems, MatmulGlobalElems, MatmulSetupError},
    launch::{Strategy, launch_ref},
};
use cubek::std::InputBinding;

use super::kernel::strided_matmul;
use super::plan::{Candidate, candidates, is_readable};
use crate::ops::device::{accumulator, address_type, contiguous, empty, unit_per_item, zeros};
use crate::types::MatmulPrecision;

/// Matrix product; contract in [`crate::ExpertKernels::dense_matmul`].
///
/// # Shapes
/// - `lhs`: `[.., m, k]`, `rhs`: `[.., k, n]`, of one float dtype, rank (two or more) and batch
///   dimensions; sums in f32, in f64 for f64
/// - result: `[.., m, n]`, contiguous
pub fn dense_matmul<R: CubeRuntime>(
    lhs: CubeTensor<R>,
    rhs: CubeTensor<R>,
    precision: MatmulPrecision,
) -> CubeTensor<R> {
    let dtype = lhs.dtype;
    let rank = lhs.meta.shape().num_dims();
    let mut shape = lhs.meta.shape().clone();
    let inner = shape[rank - 1];
    shape[rank - 1] = rhs.meta.shape()[rank - 1];
    if shape.num_elements() == 0 || inner == 0 {
        return zeros(&lhs, shape, dtype);
    }

    let out = empty(&lhs, shape, dtype);
    for candidate in candidates(dtype, precision) {
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

/// Launches one of CubeK's kernels, or says why it cannot work on these operands.
fn tiled<R: CubeRuntime>(
    strategy: &Strategy,
    lhs: &CubeTensor<R>,
    rhs: &CubeTensor<R>,
    out: &CubeTensor<R>,
) -> Result<(), MatmulSetupError> {
    let dtype = out.dtype.into();
    let mut elems = MatmulElems::from_globals(&MatmulGlobalElems {
        lhs: dtype,
        rhs: dtype,
        out: dtype,
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
    let dtype = out.dtype;
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
            [dtype.into(), accumulator(dtype).into()],
        );
    }
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
