//! Operators composed of kernels, generic over the back-end, and the CubeCL kernels.
//!
//! Each kernel family has its contract in `mod.rs`, its device code in `kernel.rs`, pure planning
//! in `plan.rs` and the host's side of the launch in `launch.rs`.

#[cfg(feature = "cube")]
pub mod activation;
#[cfg(feature = "cube")]
pub mod combine;
#[cfg(feature = "cube")]
pub mod dense;
#[cfg(feature = "cube")]
pub(crate) mod device;
#[cfg(feature = "cube")]
pub mod esmm;
#[cfg(feature = "cube")]
pub mod ess;
#[cfg(feature = "cube")]
pub mod estmm;
pub mod ffn;
#[cfg(feature = "cube")]
pub mod gating;
#[cfg(feature = "cube")]
pub mod gelu;
#[cfg(feature = "cuda")]
pub(crate) mod hopper;
#[cfg(feature = "cube")]
pub mod index;
#[cfg(feature = "cube")]
pub mod tile;
