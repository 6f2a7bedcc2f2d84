//! Swin Transformer with Mixture-of-Experts layers: model, data and training.

pub mod info;
pub mod model;
pub mod parity;
pub mod weights;
