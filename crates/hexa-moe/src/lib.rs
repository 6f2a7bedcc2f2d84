//! A Mixture-of-Experts layer for [Burn](burn): no capacity, no padding, no dropped token.
//!
//! ```text
//! y_t = Σ_{e in top_k(t)} g_te · (act(x_t · W1_e + b1_e) · W2_e + b2_e)
//! ```
//!
//! [`MoeConfig`] describes a layer, [`MoeConfig::init`] builds the [`Moe`] module, and
//! [`Moe::forward`] returns a [`MoeOutput`]: the output, the auxiliary loss to add to yours, and
//! the load of the experts. Nothing is global. The module is an ordinary Burn module: it nests in
//! yours, its parameters are trained by Burn's optimizers and saved by Burn's recorders.
//!
//! ```
//! use burn::tensor::{Distribution, Tensor};
//! use hexa_moe::{BalanceConfig, Moe, MoeConfig, RouterConfig, backends::Cpu};
//!
//! # fn main() -> Result<(), hexa_moe::MoeError> {
//! let device = Default::default();
//! let config = MoeConfig::new(16, 32, 4)
//!     .with_top_k(2)
//!     .with_router(RouterConfig::cosine())
//!     .with_balance(BalanceConfig::gshard(0.01).with_z_loss(1e-3));
//! let moe: Moe<Cpu> = config.init(&device)?;
//!
//! // Any shape that ends in d_model: here a batch of 3 images of 5 × 7 tokens.
//! let x = Tensor::<Cpu, 4>::random([3, 5, 7, 16], Distribution::Default, &device);
//! let out = moe.try_forward(x)?;
//! assert_eq!(out.output.dims(), [3, 5, 7, 16]);
//!
//! let load = out.load.read()?;
//! assert_eq!(load.tokens_per_expert.iter().sum::<u64>(), 3 * 5 * 7 * 2);
//! # Ok(())
//! # }
//! ```
//!
//! # The parts
//!
//! | | |
//! |---|---|
//! | [`router`] | logits in f32 (linear or cosine), noise in training, the `top_k` choices |
//! | [`balance`] | GShard, load + importance and z-loss |
//! | [`experts`] | all experts' feed-forward networks as one fused, differentiable operation |
//! | [`moe`] | the layer, top to bottom: the specification |
//! | [`parallel`] | the layer over several ranks: communicators, modes, slices, the shared cache |
//! | [`upcycle`] | experts that start as copies of a trained dense feed-forward |
//! | [`load`] | tokens per expert, the router's means, tile waste, read when you ask |
//!
//! # Back-ends
//!
//! Inference asks [`ExpertOps`] of a back-end; training asks [`TrainingBackend`], which is
//! `Autodiff` over one that has it, under either checkpointing strategy. [`backends`] names the
//! concrete ones that the features `cpu`, `wgpu` and `cuda` compile in. Router noise and expert
//! dropout follow Burn's rule for dropout: they are active on back-ends with autodiff, and
//! `moe.valid()` leaves them behind.
//!
//! # Numbers
//!
//! The router computes in f32 whatever the tokens' element type; the experts compute in the
//! tokens' type. Gate weights multiply the experts' outputs and carry gradients to the router. An
//! expert without tokens gets gradients of exactly zero. One seed (`B::seed`) gives the same
//! weights, noise, dropout and results.

pub mod balance;
mod config;
mod error;
pub mod experts;
pub mod load;
pub mod moe;
pub mod parallel;
pub mod router;
pub mod upcycle;

pub use config::{BalanceConfig, MoeConfig, RouterConfig};
pub use error::{MoeError, Result};
pub use experts::Experts;
pub use load::{GlobalLoad, LoadReport, LoadStats, RouterMeans};
pub use moe::{Moe, MoeOutput};
pub use router::{CosineScorer, Router, Routing, Scorer};
pub use upcycle::{DenseFfn, ExpertNoise};

pub use hexa_ops::{
    Activation, ExpertOps, Favor, MatmulPrecision, OpsError, TrainingBackend, backends,
};
