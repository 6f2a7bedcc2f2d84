//! Launcher of the combination.

use burn_cubecl::CubeRuntime;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::kernel;
use super::plan::cubes;
use crate::backend::RawExpertIndex;
use crate::ops::tile::launch::{accumulator, address_type, cube_count, empty, with_unit_columns};
use crate::ops::tile::plan::{ELEMWISE_UNITS, vector_size};
use crate::types::RowOrder;

/// See [`crate::ExpertKernels::combine`].
pub(crate) fn combine<R: CubeRuntime>(
    y: CubeTensor<R>,
    y_order: RowOrder,
    gates: Option<CubeTensor<R>>,
    index: RawExpertIndex<CubeTensor<R>>,
) -> CubeTensor<R> {
    let n = y.meta.shape()[1];
    let out = empty(&y, [index.tokens, n], y.dtype);
    if index.tokens == 0 || n == 0 {
        return out;
    }

    let y = with_unit_columns(y);
    let gates = gates.map(into_contiguous);
    let y_stride = y.meta.strides()[0];
    let vector_size = vector_size(y.dtype.size(), &[n, y_stride]);
    let width = n / vector_size;
    let int_dtype = index.positions.dtype;
    let positions = (y_order == RowOrder::Expert).then(|| into_contiguous(index.positions));
    let dtypes = [y.dtype.into(), accumulator(y.dtype), int_dtype.into()];
    let client = y.client.clone();
    // SAFETY: units past the last token return, and the index addresses rows that exist.
    unsafe {
        kernel::combine::launch_unchecked::<R>(
            &client,
            cube_count(&client, cubes(index.tokens, width)),
            CubeDim::new_1d(ELEMWISE_UNITS as u32),
            address_type(&[&y, &out]),
            vector_size,
            y.into_array_arg(),
            gates.map(CubeTensor::into_array_arg).into(),
            positions.map(CubeTensor::into_array_arg).into(),
            out.clone().into_array_arg(),
            index.tokens,
            width,
            y_stride / vector_size,
            index.top_k,
            dtypes,
        );
    }
    out
}
