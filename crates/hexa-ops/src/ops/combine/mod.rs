//! Combination of a token's choices: `out_t = Σ_j g_tj · y_tj`, in the order of the choices.
//!
//! # Shapes
//! - `y`: `[slots, n]`, in slot or expert order
//! - `gates`: `[tokens, top_k]`, or absent for ones
//! - result: `[tokens, n]`
//!
//! One unit per token and vector of columns.

pub(crate) mod kernel;
pub(crate) mod launch;
pub(crate) mod plan;
