//! Launcher of ESTMM.

use burn_cubecl::CubeRuntime;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::kernel::{self, EstmmExtentsLaunch};
use super::plan::{EstmmProblem, plan};
use crate::backend::RawExpertIndex;
use crate::ops::tile::launch::{
    accumulator, accumulator_dtype, address_type, cube_count, empty, sum_parts, with_unit_columns,
    zeros,
};
use crate::ops::tile::plan::vector_size;
use crate::types::RowOrder;

/// See [`crate::ExpertKernels::estmm`].
pub(crate) fn estmm<R: CubeRuntime>(
    a: CubeTensor<R>,
    a_order: RowOrder,
    b: CubeTensor<R>,
    b_order: RowOrder,
    index: RawExpertIndex<CubeTensor<R>>,
) -> CubeTensor<R> {
    let num_slots = index.num_slots();
    let (m, n) = (a.meta.shape()[1], b.meta.shape()[1]);
    let shape = [index.num_experts, m, n];
    if num_slots == 0 || m == 0 || n == 0 {
        return zeros(&a, shape);
    }

    let (a, b) = (with_unit_columns(a), with_unit_columns(b));
    let (a_stride, b_stride) = (a.meta.strides()[0], b.meta.strides()[0]);
    let plan = plan(EstmmProblem {
        num_slots,
        top_k: index.top_k,
        num_experts: index.num_experts,
        m,
        n,
        a_order,
        b_order,
    });
    let dtype = a.dtype;
    let out_dtype = if plan.parts == 1 {
        dtype
    } else {
        accumulator_dtype(dtype)
    };
    let out = empty(&a, [plan.parts, index.num_experts, m, n], out_dtype);
    let vector_size = vector_size(dtype.size(), &[m, n, a_stride, b_stride]);
    let (slots, offsets) = (into_contiguous(index.slots), into_contiguous(index.offsets));
    let dtypes = [
        dtype.into(),
        accumulator(dtype),
        out_dtype.into(),
        slots.dtype.into(),
    ];
    let client = a.client.clone();
    // SAFETY: cubes past the last part return; all reads and writes are guarded by the extents,
    // and the index addresses rows that exist.
    unsafe {
        kernel::estmm::launch_unchecked::<R>(
            &client,
            cube_count(&client, plan.cubes),
            CubeDim::new_1d(plan.blueprint.tile.units() as u32),
            address_type(&[&a, &b, &out]),
            vector_size,
            a.into_array_arg(),
            b.into_array_arg(),
            slots.into_array_arg(),
            offsets.into_array_arg(),
            out.clone().into_array_arg(),
            EstmmExtentsLaunch::new(
                index.num_experts,
                m,
                n,
                plan.m_tiles,
                plan.n_tiles,
                a_stride,
                b_stride,
                plan.parts,
            ),
            plan.blueprint,
            dtypes,
        );
    }
    if plan.parts == 1 {
        // The part dimension is the only difference.
        CubeTensor::new_contiguous(client, out.device, shape.into(), out.handle, dtype)
    } else {
        sum_parts(out, plan.parts, shape, dtype)
    }
}
