//! Launcher of ESS.

use burn_cubecl::CubeRuntime;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::kernel::{self, EssExtentsLaunch};
use super::plan::{EssProblem, plan};
use crate::backend::RawExpertIndex;
use crate::ops::tile::launch::{
    accumulator, accumulator_dtype, address_type, cube_count, empty, sum_parts, with_unit_columns,
    zeros,
};
use crate::ops::tile::plan::{ELEMWISE_UNITS, vector_size};
use crate::types::RowOrder;

/// See [`crate::ExpertKernels::ess`].
pub(crate) fn ess<R: CubeRuntime>(
    x: CubeTensor<R>,
    x_order: RowOrder,
    gates: Option<CubeTensor<R>>,
    index: RawExpertIndex<CubeTensor<R>>,
) -> CubeTensor<R> {
    let num_slots = index.num_slots();
    let n = x.meta.shape()[1];
    let shape = [index.num_experts, n];
    if num_slots == 0 || n == 0 {
        return zeros(&x, shape);
    }

    let x = with_unit_columns(x);
    let gates = gates.map(into_contiguous);
    let x_stride = x.meta.strides()[0];
    let vector_size = vector_size(x.dtype.size(), &[n, x_stride]);
    let plan = plan(EssProblem {
        num_slots,
        top_k: index.top_k,
        num_experts: index.num_experts,
        width: n / vector_size,
        x_order,
    });
    let dtype = x.dtype;
    let out_dtype = if plan.parts == 1 {
        dtype
    } else {
        accumulator_dtype(dtype)
    };
    let out = empty(&x, [plan.parts, index.num_experts, n], out_dtype);
    let (slots, offsets) = (into_contiguous(index.slots), into_contiguous(index.offsets));
    let dtypes = [
        dtype.into(),
        accumulator(dtype),
        out_dtype.into(),
        slots.dtype.into(),
    ];
    let client = x.client.clone();
    // SAFETY: cubes past the last part return; all reads and writes are guarded by the extents,
    // and the index addresses rows that exist.
    unsafe {
        kernel::ess::launch_unchecked::<R>(
            &client,
            cube_count(&client, plan.cubes),
            CubeDim::new_1d(ELEMWISE_UNITS as u32),
            address_type(&[&x, &out]),
            vector_size,
            x.into_array_arg(),
            gates.map(CubeTensor::into_array_arg).into(),
            slots.into_array_arg(),
            offsets.into_array_arg(),
            out.clone().into_array_arg(),
            EssExtentsLaunch::new(
                index.num_experts,
                n / vector_size,
                plan.column_blocks,
                x_stride / vector_size,
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
