//! Swin Transformer with Mixture-of-Experts layers: configuration, data, model and training.

pub mod config;
