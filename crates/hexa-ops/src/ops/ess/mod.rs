//! ESS, the expert-specific summation: `s_e = Σ_{R(i)=e} g_i x_i`.
//!
//! # Shapes
//! - `x`: `[tokens, n]` or `[slots, n]`, in any row order
//! - `gates`: `[tokens, top_k]`, or absent for ones
//! - result: `[num_experts, n]`, exactly zero for an expert without rows
//!
//! Each cube sums a block of columns of one expert: lanes take rows in turn, then a tree in
//! shared memory adds the lanes. With few cubes, positions are cut into parts as in
//! [`super::estmm`]. The order of all additions is fixed.
//!
//! Source: arXiv:2411.01288v4, section 4.1.

pub(crate) mod kernel;
pub(crate) mod launch;
pub(crate) mod plan;
