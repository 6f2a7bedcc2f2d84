//! Tests of the operators on the back-end that `HEXA_TEST_BACKEND` names.
//!
//! Kernels are compared with the f64 oracle, which is itself compared with central differences;
//! the formulas of the backward passes are compared with central differences in f64 on the CPU.

mod cases;
mod dense;
mod errors;
mod experts;
mod ffn;
mod ffn_case;
mod ffn_graph;
mod formulas;
mod gating;
mod gelu;
mod index;
mod reached;
