//! What the tiled kernels share: how rows are found, staged in shared memory and multiplied.
//!
//! All products go through one inner loop: two operands lie in shared memory with the summed
//! dimension first, `[k][m]` and `[k][n]`, and every unit accumulates an 8 × 8 block of the
//! `m × n` tile in registers, in f32 (f64 for f64 tensors). What differs between the operators is
//! only where a line of an operand comes from: `kernel::RowSource` maps a position to a row of
//! a matrix in token, slot or expert order, so that tokens stay where they are.
//!
//! No kernel depends on the plane size, and none uses atomics: results are the same bit for bit
//! in every run.

pub(crate) mod kernel;
pub(crate) mod launch;
pub(crate) mod plan;
