//! Expert-specific operators for Mixture-of-Experts layers on Burn.
//!
//! A layer with `E` experts routes each token `t` to `top_k` of them. Tokens stay where they are
//! in memory; an index tells each kernel which rows belong to which expert:
//!
//! | operator | what it computes | gradient it serves |
//! |---|---|---|
//! | [`esmm`] | `y_i = x_i · W[R(i)] + b[R(i)]` | of `x`, with `Wᵀ` |
//! | [`ess`] | `s_e = Σ_{R(i)=e} x_i` | of a bias |
//! | [`estmm`] | `M_e = Σ_{R(i)=e} a_iᵀ b_i` | of a weight |
//! | [`expert_ffn`] | `Σ_j g_tj (act(x_t W1 + b1) W2 + b2)` | its own, written out |
//!
//! Nothing is padded and no token is dropped. Source of the operators: HEXA-MoE,
//! arXiv:2411.01288v4; `R(i)` is the expert of row `i`.
//!
//! # Example
//! ```
//! use burn::tensor::{Distribution, Tensor};
//! use hexa_ops::{EsmmOptions, ExpertIndex, backends::Cpu, esmm, topk_gating};
//!
//! # fn main() -> hexa_ops::Result<()> {
//! let device = Default::default();
//! let logits = Tensor::<Cpu, 2>::random([5, 3], Distribution::Default, &device);
//! let x = Tensor::<Cpu, 2>::random([5, 7], Distribution::Default, &device);
//! let w = Tensor::<Cpu, 3>::random([3, 7, 4], Distribution::Default, &device);
//!
//! let gating = topk_gating(logits, 2, true)?;
//! let index = ExpertIndex::from_gating(&gating);
//! let y = esmm(x, w, None, &index, EsmmOptions::default())?;
//! assert_eq!(y.dims(), [10, 4]); // one row per (token, choice)
//! # Ok(())
//! # }
//! ```

pub mod api;
pub mod backend;
pub mod backends;
pub mod dropout;
mod error;
pub mod host;
pub mod memory;
pub mod ops;
#[cfg(feature = "testing")]
pub mod testing;
mod types;

pub use api::{
    EsmmOptions, ExpertIndex, ExpertParams, Gating, esmm, ess, estmm, expert_ffn, gelu, linear,
    matmul, matmul_to_f32, supports_precision, tile_rows, topk_gating, when_reached,
};
pub use backend::{ExpertKernels, ExpertOps, TrainingBackend};
pub use error::{OpsError, Result};
#[cfg(feature = "cuda")]
pub use ops::hopper::use_portable_kernels;
pub use types::{Activation, Favor, FfnOptions, MatmulPrecision, RowOrder};
