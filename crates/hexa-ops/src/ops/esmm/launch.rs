//! Launcher of ESMM.

use burn_cubecl::CubeRuntime;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::kernel::{self, EsmmExtentsLaunch};
use super::plan::{EsmmProblem, plan};
use crate::backend::EsmmArgs;
use crate::ops::tile::launch::{accumulator, address_type, cube_count, empty, with_unit_columns};
use crate::ops::tile::plan::vector_size;

/// See [`crate::ExpertKernels::esmm`].
pub(crate) fn esmm<R: CubeRuntime>(args: EsmmArgs<CubeTensor<R>, CubeTensor<R>>) -> CubeTensor<R> {
    let index = args.index;
    let num_slots = index.num_slots();
    let x = with_unit_columns(args.x);
    let w = with_unit_columns(args.w);
    let bias = args.bias.map(with_unit_columns);
    let width_in = x.meta.shape()[1];
    let width_out = w.meta.shape()[if args.transposed { 1 } else { 2 }];
    let y = empty(&x, [num_slots, width_out], x.dtype);
    if num_slots == 0 || width_out == 0 {
        return y;
    }

    let x_stride = x.meta.strides()[0];
    let (w_expert_stride, w_row_stride) = (w.meta.strides()[0], w.meta.strides()[1]);
    let bias_stride = bias.as_ref().map_or(0, |bias| bias.meta.strides()[0]);
    let plan = plan(EsmmProblem {
        num_slots,
        top_k: index.top_k,
        num_experts: index.num_experts,
        width_out,
        x_order: args.x_order,
        out_order: args.out_order,
        transposed: args.transposed,
    });
    let vector_size = vector_size(
        x.dtype.size(),
        &[
            width_in,
            width_out,
            x_stride,
            w_expert_stride,
            w_row_stride,
            bias_stride,
        ],
    );
    let (slots, offsets) = (into_contiguous(index.slots), into_contiguous(index.offsets));
    let dtypes = [x.dtype.into(), accumulator(x.dtype), slots.dtype.into()];
    let client = x.client.clone();
    // SAFETY: cubes past the last tile return; all reads and writes are guarded by the extents,
    // and the index addresses rows that exist.
    unsafe {
        kernel::esmm::launch_unchecked::<R>(
            &client,
            cube_count(&client, plan.cubes),
            CubeDim::new_1d(plan.blueprint.tile.units() as u32),
            address_type(&[&x, &w, &y]),
            vector_size,
            x.into_array_arg(),
            w.into_array_arg(),
            bias.map(CubeTensor::into_array_arg).into(),
            slots.into_array_arg(),
            offsets.into_array_arg(),
            y.clone().into_array_arg(),
            EsmmExtentsLaunch::new(
                index.num_experts as u32,
                width_in,
                width_out,
                plan.column_tiles,
                x_stride,
                w_expert_stride,
                w_row_stride,
                bias_stride,
            ),
            plan.blueprint,
            dtypes,
        );
    }
    y
}
