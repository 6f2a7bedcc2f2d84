//! GELU with the error function, element by element: `x · Φ(x)`, and its gradient.
//!
//! # Shapes
//! Any; values and results of one float type, arithmetic in f32 (f64 for f64).
//!
//! Burn has it as five operations forwards and more backwards, each of which reads and writes the
//! widest tensor of an MLP; here it is one each.

pub(crate) mod kernel;
pub(crate) mod launch;
