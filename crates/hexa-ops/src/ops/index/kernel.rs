//! Device code of the counting sort.

use cubecl::prelude::*;

/// The expert of a slot, clamped into range; `num_experts` past the last slot.
#[cube]
fn expert_of_slot<I: Int>(
    expert_ids: &Array<I>,
    slot: u32,
    num_slots: u32,
    num_experts: u32,
) -> u32 {
    let mut expert = num_experts;
    if slot < num_slots {
        let last = I::cast_from(num_experts - 1);
        expert = u32::cast_from(max(min(expert_ids[slot as usize], last), I::from_int(0)));
    }
    expert
}

/// Slots per expert of each chunk: `histogram[chunk, expert]`, one cube per chunk.
#[cube(launch_unchecked, address_type = "dynamic")]
pub fn chunk_histogram<I: Int>(
    expert_ids: &Array<I>,
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
            histogram[(chunk * num_experts + expert) as usize] = count;
            expert += CUBE_DIM;
        }
    }
}

/// Position of each slot and slot at each position, one cube per chunk; `counts` and `offsets`.
///
/// Every cube adds up the whole histogram for itself: that is less than another launch. Its units
/// form `lanes` groups, each of which adds the chunks of a range, an expert per unit.
#[cube(launch_unchecked, address_type = "dynamic")]
#[allow(clippy::too_many_arguments)]
pub fn place_slots<I: Int>(
    expert_ids: &Array<I>,
    histogram: &Array<u32>,
    offsets: &mut Array<I>,
    counts: &mut Array<I>,
    slots: &mut Array<I>,
    positions: &mut Array<I>,
    num_slots: u32,
    num_chunks: u32,
    num_experts: u32,
    lanes: u32,
    #[comptime] chunk_len: usize,
    #[comptime] max_experts: usize,
    #[define(I)] _dtype: StorageType,
) {
    let chunk = CUBE_POS as u32;
    let slot = chunk * CUBE_DIM + UNIT_POS;
    let expert = expert_of_slot::<I>(expert_ids, slot, num_slots, num_experts);
    let mut experts = SharedMemory::<u32>::new(chunk_len);
    experts[UNIT_POS as usize] = expert;

    // Slots of an expert in all chunks, and in those before this one.
    let mut totals = SharedMemory::<u32>::new(max_experts);
    let mut befores = SharedMemory::<u32>::new(max_experts);
    let mut lane_totals = SharedMemory::<u32>::new(chunk_len);
    let mut lane_befores = SharedMemory::<u32>::new(chunk_len);
    let per_round = CUBE_DIM / lanes;
    let lane = UNIT_POS / per_round;
    let per_lane = num_chunks.div_ceil(lanes);
    let mut round_start = 0u32;
    while round_start < num_experts {
        let e = round_start + UNIT_POS % per_round;
        let mut total = 0u32;
        let mut before = 0u32;
        if e < num_experts {
            let start = min(lane * per_lane, num_chunks);
            let end = min(start + per_lane, num_chunks);
            for c in start..end {
                let count = histogram[(c * num_experts + e) as usize];
                total += count;
                if c < chunk {
                    before += count;
                }
            }
        }
        lane_totals[UNIT_POS as usize] = total;
        lane_befores[UNIT_POS as usize] = before;
        sync_cube();
        if UNIT_POS < per_round && e < num_experts {
            let mut sum = 0u32;
            let mut sum_before = 0u32;
            for l in 0..lanes {
                sum += lane_totals[(l * per_round + UNIT_POS) as usize];
                sum_before += lane_befores[(l * per_round + UNIT_POS) as usize];
            }
            totals[e as usize] = sum;
            befores[e as usize] = sum_before;
        }
        sync_cube();
        round_start += per_round;
    }

    if slot < num_slots {
        let mut position = befores[expert as usize];
        for e in 0..expert {
            position += totals[e as usize];
        }
        for i in 0..UNIT_POS {
            if experts[i as usize] == expert {
                position += 1u32;
            }
        }
        positions[slot as usize] = I::cast_from(position);
        slots[position as usize] = I::cast_from(slot);
    }
    if chunk == 0u32 {
        let mut e = UNIT_POS;
        while e < num_experts {
            let mut first = 0u32;
            for other in 0..e {
                first += totals[other as usize];
            }
            offsets[e as usize] = I::cast_from(first);
            counts[e as usize] = I::cast_from(totals[e as usize]);
            if e == num_experts - 1u32 {
                offsets[num_experts as usize] = I::cast_from(first + totals[e as usize]);
            }
            e += CUBE_DIM;
        }
    }
}
