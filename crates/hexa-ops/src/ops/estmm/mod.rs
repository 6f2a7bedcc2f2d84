//! ESTMM, the expert-specific transposed matrix multiplication: `M_e = Σ_{R(i)=e} a_iᵀ b_i`.
//!
//! # Shapes
//! - `a`: `[tokens, m]` or `[slots, m]`; `b`: `[tokens, n]` or `[slots, n]`, in any row orders
//! - result: `[num_experts, m, n]`, exactly zero for an expert without rows
//!
//! Each cube computes one `m × n` tile of one expert and walks over the expert's positions in a
//! fixed order. With few tiles, each expert's positions are cut into a number of parts that
//! depends on shapes alone; partial sums are then added in order. No atomics, hence the same
//! bits in every run.
//!
//! Source: arXiv:2411.01288v4, section 4.1; its released code reads the first chunk of tokens
//! twice and never the last one, which the tests here would show.

pub(crate) mod kernel;
pub(crate) mod launch;
pub(crate) mod plan;
