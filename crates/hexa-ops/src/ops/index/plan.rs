//! How slots are cut into chunks.

/// Slots per chunk, and units per cube: each unit places one slot. WebGPU guarantees 256 units.
pub const CHUNK: usize = 256;

/// Sizes of one counting sort.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IndexPlan {
    /// Number of (token, choice) slots.
    pub num_slots: usize,
    /// Number of experts.
    pub num_experts: usize,
    /// Number of chunks.
    pub num_chunks: usize,
}

impl IndexPlan {
    /// Plan for `num_slots` slots.
    pub fn new(num_slots: usize, num_experts: usize) -> Self {
        Self {
            num_slots,
            num_experts,
            num_chunks: num_slots.div_ceil(CHUNK),
        }
    }

    /// Groups of a cube's units that share the chunks when the histogram is added up: as many as
    /// leave each group a unit per expert.
    pub fn lanes(&self) -> usize {
        let per_lane = self.num_experts.clamp(1, CHUNK).next_power_of_two();
        CHUNK / per_lane
    }

    /// Entries of the histogram: one per expert and chunk.
    pub fn histogram_len(&self) -> usize {
        self.num_experts * self.num_chunks
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_chunk_may_be_partial() {
        let chunks = |slots| IndexPlan::new(slots, 3).num_chunks;
        assert_eq!(
            [0, 1, CHUNK, CHUNK + 1].map(chunks),
            [0, 1, 1, 2],
            "every slot has a chunk, and no chunk is empty"
        );
        assert_eq!(IndexPlan::new(CHUNK + 1, 3).histogram_len(), 6);
    }

    #[test]
    fn lanes_divide_the_units() {
        let lanes = |experts| IndexPlan::new(1, experts).lanes();
        assert_eq!([1, 3, 8, 255, 256, 300].map(lanes), [256, 64, 32, 1, 1, 1]);
    }
}
