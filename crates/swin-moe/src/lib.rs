//! Swin Transformer with Mixture-of-Experts layers: configuration, data, model and training.

pub mod backend;
pub mod cli;
pub mod config;
pub mod data;
pub mod fleet;
pub mod info;
pub mod inspect;
pub mod memory;
pub mod model;
pub mod parity;
pub mod settings;
#[cfg(test)]
mod testing;
pub mod train;
pub mod weights;
