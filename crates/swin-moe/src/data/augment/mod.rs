//! What training does to an image beyond cropping and flipping it.
//!
//! Operations and their arithmetic are those of Pillow, choices and ranges those of timm 1.0, which
//! the published recipe names; `tools/augment_oracle.py` writes what both compute, and the tests
//! compare with it.

mod affine;
mod erase;
mod jitter;
mod mix;
mod ops;
mod rand_augment;
#[cfg(test)]
mod tests;

pub(super) use erase::RandomErasing;
pub(super) use jitter::ColorJitter;
pub use mix::{Mix, Mixer};
pub(super) use rand_augment::RandAugment;
