//! Host's side of the counting sort.

use burn::tensor::DType;
use burn_cubecl::{CubeRuntime, kernel::into_contiguous, tensor::CubeTensor};
use cubecl::prelude::CubeDim;

use super::kernel::{chunk_histogram, place_slots};
use super::plan::{CHUNK, IndexPlan};
use crate::backend::RawExpertIndex;
use crate::ops::device::{address_type, cube_per_item, dim, empty, zeros};

/// Sorts the slots by expert; contract in [`crate::ExpertKernels::expert_index`].
///
/// # Shapes
/// - `expert_ids`: `[tokens, top_k]`, any int dtype, which the results have too
pub fn expert_index<R: CubeRuntime>(
    expert_ids: CubeTensor<R>,
    num_experts: usize,
) -> RawExpertIndex<CubeTensor<R>> {
    let (tokens, top_k) = (dim(&expert_ids, 0), dim(&expert_ids, 1));
    let plan = IndexPlan::new(tokens * top_k, num_experts);
    let dtype = expert_ids.dtype;
    let (counts, offsets) = if plan.num_slots == 0 {
        (
            zeros(&expert_ids, [num_experts], dtype),
            zeros(&expert_ids, [num_experts + 1], dtype),
        )
    } else {
        (
            empty(&expert_ids, [num_experts], dtype),
            empty(&expert_ids, [num_experts + 1], dtype),
        )
    };
    let index = RawExpertIndex {
        counts,
        offsets,
        slots: empty(&expert_ids, [plan.num_slots], dtype),
        positions: empty(&expert_ids, [plan.num_slots], dtype),
        tokens,
        top_k,
        num_experts,
    };
    if plan.num_slots > 0 {
        sort(expert_ids, plan, &index);
    }
    index
}

fn sort<R: CubeRuntime>(
    expert_ids: CubeTensor<R>,
    plan: IndexPlan,
    index: &RawExpertIndex<CubeTensor<R>>,
) {
    let client = expert_ids.client.clone();
    let dtype = expert_ids.dtype;
    let expert_ids = into_contiguous(expert_ids);
    let histogram = empty(&expert_ids, [plan.histogram_len()], DType::U32);
    let address = address_type(&[&expert_ids, &histogram, &index.slots, &index.offsets]);
    let chunks = cube_per_item(&client, plan.num_chunks);
    let units = CubeDim::new_1d(CHUNK as u32);
    let [num_slots, num_chunks, num_experts] =
        [plan.num_slots, plan.num_chunks, plan.num_experts].map(|n| n as u32);

    // SAFETY: reads of `expert_ids` are guarded by the slot's number, ids are clamped into range,
    // histogram and outputs have the sizes that the indices are computed from.
    unsafe {
        chunk_histogram::launch_unchecked(
            &client,
            chunks.clone(),
            units,
            address,
            expert_ids.clone().into_array_arg(),
            histogram.clone().into_array_arg(),
            num_slots,
            num_chunks,
            num_experts,
            CHUNK,
            dtype.into(),
        );
        place_slots::launch_unchecked(
            &client,
            chunks,
            units,
            address,
            expert_ids.into_array_arg(),
            histogram.into_array_arg(),
            index.offsets.clone().into_array_arg(),
            index.counts.clone().into_array_arg(),
            index.slots.clone().into_array_arg(),
            index.positions.clone().into_array_arg(),
            num_slots,
            num_chunks,
            num_experts,
            plan.lanes() as u32,
            CHUNK,
            plan.num_experts.next_power_of_two(),
            dtype.into(),
        );
    }
}
