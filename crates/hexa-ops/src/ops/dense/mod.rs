//! Dense matrix products in a stated arithmetic, without autotuning.
//!
//! Burn's autotuned product picks TF32 for f32 operands where that is faster, and some of its
//! double-buffered kernels add a stage past the end of K when K is an odd number of stages
//! (fixed in CubeK 0.3). This module therefore names its kernels: CubeK's single-stage ones, on
//! matrix units where the precision allows them, and a plain loop for what these refuse.

pub(crate) mod kernel;
pub(crate) mod launch;
pub(crate) mod plan;
