//! Seeds as pure functions of the run's seed and the step.
//!
//! The back-end is seeded anew before every step, so that drop path, router noise and dropout of a
//! step do not depend on how the run got there: a resumed run draws what an uninterrupted one
//! would have drawn.

/// Seed of the model's initial weights.
pub fn init_seed(seed: u64) -> u64 {
    mix(seed, u64::MAX)
}

/// Seed of everything that the device draws in one step.
pub fn step_seed(seed: u64, step: u64) -> u64 {
    mix(seed, step)
}

/// Seed of everything that one pass over a part of a step's batch draws.
pub fn pass_seed(step_seed: u64, part: usize) -> u64 {
    mix(!step_seed, part as u64)
}

/// Seed of everything that one segment of the model draws in a pass.
pub fn segment_seed(pass_seed: u64, segment: usize) -> u64 {
    mix(pass_seed, segment as u64)
}

/// SplitMix64's finalizer (Steele, Lea and Flood, 2014) over both numbers.
fn mix(a: u64, b: u64) -> u64 {
    finalize(finalize(a.wrapping_add(0x9e37_79b9_7f4a_7c15)) ^ b)
}

fn finalize(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn seeds_and_steps_do_not_collide() {
        let mut seen = HashSet::new();
        for seed in 0..64 {
            assert!(seen.insert(init_seed(seed)));
            for step in 0..512 {
                assert!(seen.insert(step_seed(seed, step)), "{seed} {step}");
            }
        }
    }
}
