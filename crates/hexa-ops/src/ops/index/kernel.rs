//! Device code of the counting sort.

use cubecl::prelude::*;

/// The expert of a slot, clamped into range; `num_experts` past the last slot.
#[cube]
fn expert_of_slot<I: Int>(
    expert_ids: &Tensor<I>,
    slot: u32,
    num_slots: u32,
    num_experts: u32,
) -> u32 {
    let mut expert = num_experts;
    if slot < num_slots {
        let top_k = expert_ids.shape(1) as u32;
        let token = (slot / top_k) as usize;
        let choice = (slot % top_k) as usize;
        let id = expert_ids[token * expert_ids.stride(0) + choice * expert_ids.stride(1)];
        let last = I::cast_from(num_experts - 1);
        expert = u32::cast_from(max(min(id, last), I::from_int(0)));
    }
    expert
}

/// Slots per expert of each chunk: `histogram[expert, chunk]`, one cube per chunk.
#[cube(launch_unchecked, address_type = "dynamic")]
pub fn chunk_histogram<I: Int>(
    expert_ids: &Tensor<I>,
    histogram: &mut Array<u32>,
    num_slots: u32,
    num_chunks: u32,
    num_experts: u32,
    #[comptime] chunk_len: usize,
    #[define(I)] _dtype: StorageType,
) {
    let chunk = CUBE_POS as u32;
    let slot = chunk * CUBE_DIM + UNIT_POS;
    let mut experts = SharedMemory::<u32>::new(chunk_len);
    experts[UNIT_POS as usize] = expert_of_slot::<I>(expert_ids, slot, num_slots, num_experts);
    sync_cube();

    // The barrier above stays outside of this branch: all units of a cube must reach it.
    if chunk < num_chunks {
        let mut expert = UNIT_POS;
        while expert < num_experts {
            let mut count = 0u32;
            for i in 0..CUBE_DIM {
                if experts[i as usize] == expert {
                    count += 1u32;
                }
            }
            histogram[(expert * num_chunks + chunk) as usize] = count;
            expert += CUBE_DIM;
        }
    }
}

/// Exclusive scan of the histogram in place, and `offsets`; one cube.
#[cube(launch_unchecked, address_type = "dynamic")]
pub fn scan_histogram<I: Int>(
    histogram: &mut Array<u32>,
    offsets: &mut Array<I>,
    num_chunks: u32,
    num_experts: u32,
    #[comptime] num_units: usize,
    #[define(I)] _dtype: StorageType,
) {
    let total = num_chunks * num_experts;
    let per_unit = total.div_ceil(CUBE_DIM);
    let start = min(UNIT_POS * per_unit, total);
    let end = min(start + per_unit, total);

    let mut own = 0u32;
    for i in start..end {
        own += histogram[i as usize];
    }

    let mut sums = SharedMemory::<u32>::new(num_units);
    sums[UNIT_POS as usize] = own;
    let mut step = 1u32;
    while step < CUBE_DIM {
        sync_cube();
        let mut left = 0u32;
        if UNIT_POS >= step {
            left = sums[(UNIT_POS - step) as usize];
        }
        sync_cube();
        sums[UNIT_POS as usize] += left;
        step *= 2u32;
    }

    let mut position = sums[UNIT_POS as usize] - own;
    for i in start..end {
        let count = histogram[i as usize];
        histogram[i as usize] = position;
        if i % num_chunks == 0u32 {
            offsets[(i / num_chunks) as usize] = I::cast_from(position);
        }
        position += count;
    }
    if UNIT_POS == CUBE_DIM - 1u32 {
        offsets[num_experts as usize] = I::cast_from(position);
    }
}

/// Position of each slot and slot at each position, one cube per chunk; and `counts`.
#[cube(launch_unchecked, address_type = "dynamic")]
#[allow(clippy::too_many_arguments)]
pub fn place_slots<I: Int>(
    expert_ids: &Tensor<I>,
    first_positions: &Array<u32>,
    offsets: &Array<I>,
    counts: &mut Array<I>,
    slots: &mut Array<I>,
    positions: &mut Array<I>,
    num_slots: u32,
    num_chunks: u32,
    num_experts: u32,
    #[comptime] chunk_len: usize,
    #[define(I)] _dtype: StorageType,
) {
    let chunk = CUBE_POS as u32;
    let slot = chunk * CUBE_DIM + UNIT_POS;
    let expert = expert_of_slot::<I>(expert_ids, slot, num_slots, num_experts);
    let mut experts = SharedMemory::<u32>::new(chunk_len);
    experts[UNIT_POS as usize] = expert;
    sync_cube();

    if slot < num_slots {
        let mut position = first_positions[(expert * num_chunks + chunk) as usize];
        for i in 0..UNIT_POS {
            if experts[i as usize] == expert {
                position += 1u32;
            }
        }
        positions[slot as usize] = I::cast_from(position);
        slots[position as usize] = I::cast_from(slot);
    }
    if chunk == 0u32 {
        let mut e = UNIT_POS as usize;
        while e < num_experts as usize {
            counts[e] = offsets[e + 1] - offsets[e];
            e += CUBE_DIM as usize;
        }
    }
}
