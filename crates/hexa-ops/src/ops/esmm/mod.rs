//! ESMM, the expert-specific matrix multiplication: `y_i = x_i · W[R(i)] + b[R(i)]`.
//!
//! # Shapes
//! - `x`: `[tokens, in]` or `[slots, in]`, in any row order
//! - `w`: `[num_experts, in, out]`, or `[num_experts, out, in]` if transposed
//! - `bias`: `[num_experts, out]`
//! - result: `[slots, out]`, in slot or expert order
//!
//! Each cube computes one tile of `super::tile::plan::TILE_ROWS` positions of one expert. It
//! finds expert and positions from the offsets, reads the rows of `x` where they are and writes
//! the rows of `y` where they belong; nothing is permuted or padded in memory.
//!
//! Source: arXiv:2411.01288v4, section 4.1.

pub(crate) mod kernel;
pub(crate) mod launch;
pub(crate) mod plan;
