//! Slow, obvious implementations in f64: loops over host slices, token by token.
//!
//! They share no code with the kernels, not even the expert index: an operator walks over the
//! slots in their natural order and looks up each one's expert. Matrices are row-major slices.
//! Arguments are trusted; a wrong length panics, as an assertion of a test should.

mod activation;
mod dense;
mod experts;
mod ffn;
mod routing;

pub use activation::{activate, activation_slope, erf};
pub use dense::{Matmul, MatmulGrads};
pub use experts::{Combine, Esmm, EsmmGrads, Ess, Estmm};
pub use ffn::{Ffn, FfnTensors};
pub use routing::{Gating, Routing, gating_backward, softmax, topk_gating};

/// Uniform in `[0, 1)` for column `column` of slot `slot`, from the specification of expert
/// dropout: the 32-bit PCG-RXS-M-XS output function `h` is applied to `slot ^ seed[0]`, to that
/// `^ column`, and to that `+ seed[1]`; the upper 24 bits of the last are the fraction.
pub fn dropout_uniform(seed: [u32; 2], slot: usize, column: usize) -> f64 {
    let row = hash(slot as u64 ^ u64::from(seed[0]));
    let cell = hash(row ^ column as u64);
    let bits = hash((cell + u64::from(seed[1])) % WORD);
    (bits / 256) as f64 / 16_777_216.0
}

const WORD: u64 = 1 << 32;

/// One step of the 32-bit linear congruential generator, then "random xorshift, multiply,
/// xorshift", written out in 64-bit integers reduced modulo 2³².
fn hash(v: u64) -> u64 {
    let state = (v * 747_796_405 + 2_891_336_453) % WORD;
    let distance = 4 + state / (1 << 28);
    let word = ((state ^ (state >> distance)) * 277_803_737) % WORD;
    word ^ (word >> 22)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dropout_draws_are_those_of_the_crate() {
        for seed in [[0, 0], [7, 11], [u32::MAX, 1], [0x8000_0000, u32::MAX]] {
            for slot in [0_usize, 1, 2, 63, 4097, 1_000_003] {
                for column in 0..67_usize {
                    let ours = dropout_uniform(seed, slot, column);
                    let theirs = crate::dropout::dropout_uniform(seed, slot as u32, column as u32);
                    assert_eq!(ours, f64::from(theirs), "{seed:?} {slot} {column}");
                }
            }
        }
    }
}
