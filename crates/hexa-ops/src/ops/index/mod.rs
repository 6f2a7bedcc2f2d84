//! The re-index vector on the device: a stable counting sort of the slots by expert.
//!
//! Slots are cut into chunks of `plan::CHUNK`. One launch counts each chunk's slots per expert;
//! an exclusive scan of these counts, laid out `[num_experts, chunks]`, is at once the first
//! position of each expert and of each chunk within its expert; the last launch adds each slot's
//! rank within its chunk. No atomics, so that no order depends on timing.
//!
//! Source: the re-index vector of arXiv:2411.01288v4, section 4.1, without its padding.

pub(crate) mod kernel;
pub(crate) mod launch;
pub(crate) mod plan;
