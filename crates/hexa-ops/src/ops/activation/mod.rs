//! The experts' activation with dropout, and its vector-Jacobian product, on the device.
//!
//! Forward, one unit per activated value; backward, one cube per position, because the gradient
//! of its gate weight is a sum over the row:
//!
//! ```text
//! a  = dropout(act(h))
//! dh = g · dropout(u) ⊙ act'(h)        u = dy · W2ᵀ
//! dg = Σ_j u_j a_j + Σ_m dy_m b2_m
//! ```
//!
//! Contracts: [`crate::ExpertKernels::ffn_activation`],
//! [`crate::ExpertKernels::ffn_activation_backward`]; the mask is that of [`crate::dropout`].

pub(crate) mod kernel;
pub(crate) mod launch;
pub(crate) mod math;
pub(crate) mod plan;
