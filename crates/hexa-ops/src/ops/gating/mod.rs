//! Top-k softmax gating on the device, and the vector-Jacobian products of its two steps.
//!
//! ```text
//! p_e = exp(l_e − max l) / Σ exp(l − max l)
//! w_j = p at the j-th largest logit, of equal logits the lower id first
//! w_j ← w_j / max(Σ w, ε)                                   with `normalize`
//! ```
//!
//! One unit handles one token (or one probability, in the weights' backward pass): rows are as
//! short as there are experts.

pub(crate) mod kernel;
pub(crate) mod launch;
