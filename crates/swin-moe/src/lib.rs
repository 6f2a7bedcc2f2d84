//! Swin Transformer with Mixture-of-Experts layers: model, data and training.

pub mod backend;
pub mod train;
