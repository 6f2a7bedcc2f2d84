//! Swin Transformer with Mixture-of-Experts layers.
//!
//! The architecture is that of microsoft/Swin-Transformer, `models/swin_transformer_moe.py`:
//! read [`swin`] (whole model), [`stage`], [`block`], [`attention`] in this order. Tokens are kept
//! as one matrix `[batch · height · width, channels]` in row-major order of the grid, so that
//! every linear layer is a single matrix product.

pub mod attention;
pub mod block;
pub mod config;
pub mod drop_path;
mod error;
mod extent;
pub mod geometry;
pub mod layers;
pub mod mlp;
pub mod patch;
pub mod position_bias;
pub mod stage;
pub mod swin;
pub mod window;

pub use config::{MoeSettings, SwinMoeConfig};
pub use error::{ModelError, Result};
pub use stage::Segment;
pub use swin::{SwinFeatures, SwinMoe, SwinOutput};
