//! The re-index vector by counting sort.

use burn::tensor::TensorMetadata;
use burn_flex::FlexTensor;

use super::element::{dims2, read_int, write_int};
use crate::backend::RawExpertIndex;

/// See [`crate::ExpertKernels::expert_index`].
pub fn expert_index(expert_ids: &FlexTensor, num_experts: usize) -> RawExpertIndex<FlexTensor> {
    debug_assert_eq!(expert_ids.rank(), 2);
    let [tokens, top_k] = dims2(expert_ids);
    let last = num_experts as i32 - 1;
    let ids: Vec<usize> = read_int(expert_ids)
        .into_iter()
        .map(|id| id.clamp(0, last) as usize)
        .collect();

    let mut counts = vec![0i32; num_experts];
    for &e in &ids {
        counts[e] += 1;
    }
    let mut offsets = Vec::with_capacity(num_experts + 1);
    let mut total = 0;
    offsets.push(0);
    for &count in &counts {
        total += count;
        offsets.push(total);
    }
    let mut next = offsets.clone();
    let mut slots = vec![0i32; ids.len()];
    let mut positions = vec![0i32; ids.len()];
    for (slot, &e) in ids.iter().enumerate() {
        let position = next[e];
        next[e] += 1;
        slots[position as usize] = slot as i32;
        positions[slot] = position;
    }

    let num_slots = ids.len();
    RawExpertIndex {
        counts: write_int(counts, [num_experts]),
        offsets: write_int(offsets, [num_experts + 1]),
        slots: write_int(slots, [num_slots]),
        positions: write_int(positions, [num_slots]),
        tokens,
        top_k,
        num_experts,
    }
}
