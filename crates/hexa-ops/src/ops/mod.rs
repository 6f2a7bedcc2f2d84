//! Operators composed of kernels, generic over the back-end.

pub mod ffn;
