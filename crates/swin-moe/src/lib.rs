//! Swin Transformer with Mixture-of-Experts layers: configuration, data, model and training.

pub mod backend;
pub mod config;
pub mod data;
pub mod model;
mod settings;
pub mod train;
pub mod weights;
