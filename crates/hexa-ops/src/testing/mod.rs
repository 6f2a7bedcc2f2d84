//! What the tests of this workspace share: oracles, comparators, gradient checks and the choice
//! of the back-end at run time.
//!
//! Formulas are checked by central differences in f64 on the CPU ([`gradcheck`]); kernels are
//! checked against [`oracle`], element by element ([`compare`]): a wrong derivative and a wrong
//! kernel are then never mistaken for one another.

pub mod backend;
pub mod compare;
pub mod gradcheck;
pub mod oracle;
pub mod watch;
