//! The operators on Burn tensors, with every argument checked before anything is launched.

mod check;
mod dense;
mod ffn;
mod index;
mod operators;
mod reached;

pub use dense::{gelu, linear, matmul, matmul_to_f32};
pub use ffn::{ExpertParams, expert_ffn};
pub use index::{ExpertIndex, Gating, topk_gating};
pub use operators::{EsmmOptions, esmm, ess, estmm};
pub use reached::when_reached;

use crate::backend::ExpertOps;
use crate::types::MatmulPrecision;

/// Whether this back-end's device computes products in this arithmetic.
pub fn supports_precision<B: ExpertOps>(device: &B::Device, precision: MatmulPrecision) -> bool {
    B::supports_precision(device, precision)
}

/// Rows in one tile of the expert matmul (BLK) on this back-end; 1 where rows are not tiled.
pub fn tile_rows<B: ExpertOps>(device: &B::Device) -> usize {
    B::tile_rows(device)
}
