//! Operators composed of kernels, generic over the back-end, and the CubeCL kernels.

#[cfg(feature = "cube")]
pub mod combine;
#[cfg(feature = "cube")]
pub mod esmm;
#[cfg(feature = "cube")]
pub mod ess;
#[cfg(feature = "cube")]
pub mod estmm;
pub mod ffn;
#[cfg(feature = "cube")]
pub mod tile;
