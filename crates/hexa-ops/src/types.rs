//! Plain descriptions that operators share: row orders, activations, options.

use burn::tensor::DType;
use serde::{Deserialize, Serialize};

use crate::error::{OpsError, Result};

/// Which row of a matrix belongs to which (token, choice) slot.
///
/// A *slot* is one (token, choice) pair, numbered `token · top_k + choice`. A *position* is a
/// slot's place when the slots are sorted stably by expert.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RowOrder {
    /// One row per token, read by each of its slots: `[tokens, n]`.
    Token,
    /// One row per slot: `[tokens · top_k, n]`.
    Slot,
    /// One row per position, so that each expert's rows are contiguous: `[tokens · top_k, n]`.
    Expert,
}

impl RowOrder {
    /// Number of rows of a matrix in this order.
    pub fn num_rows(self, tokens: usize, top_k: usize) -> usize {
        match self {
            RowOrder::Token => tokens,
            RowOrder::Slot | RowOrder::Expert => tokens * top_k,
        }
    }
}

/// The experts' activation function.
///
/// The gated forms read a hidden width of `2 · d_ff` in which column `2j` is the gate and column
/// `2j + 1` the value of output column `j`: a slice of `d_ff` is then a contiguous slice of the
/// weights, and one matrix product yields both halves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// `x · Φ(x)`, with the error function.
    #[default]
    Gelu,
    /// GELU's tanh approximation.
    GeluTanh,
    /// `max(x, 0)`.
    Relu,
    /// `x · σ(x)`.
    Silu,
    /// `silu(gate) · value`.
    SwiGlu,
    /// `gelu(gate) · value`, with the error function.
    GeGlu,
}

impl Activation {
    /// All activations, in declaration order.
    pub const ALL: [Activation; 6] = [
        Activation::Gelu,
        Activation::GeluTanh,
        Activation::Relu,
        Activation::Silu,
        Activation::SwiGlu,
        Activation::GeGlu,
    ];

    /// Whether the activation multiplies a gate with a value.
    pub fn is_gated(self) -> bool {
        matches!(self, Activation::SwiGlu | Activation::GeGlu)
    }

    /// Columns of the first layer's weights for a hidden width of `d_ff`.
    pub fn hidden_width(self, d_ff: usize) -> usize {
        if self.is_gated() { 2 * d_ff } else { d_ff }
    }
}

/// How the fused expert FFN turns its pre-activation into the second layer's input.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct FfnOptions {
    /// The activation function.
    pub activation: Activation,
    /// Probability that an activated value is zeroed; the others are scaled by `1 / (1 − p)`.
    pub dropout: f32,
    /// What kernels that could have either choose.
    pub favor: Favor,
}

/// What matters more where a layer can have either. Results are the same up to rounding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Favor {
    /// The shortest time.
    #[default]
    Speed,
    /// The smallest peak of memory. On Hopper GPUs in half precision, with several choices per token,
    /// a layer keeps half of its activations at one time; elsewhere it changes nothing.
    Memory,
}

impl FfnOptions {
    /// Checks the ranges.
    ///
    /// # Errors
    /// [`OpsError::Value`] if `dropout` is not in `0.0..1.0`.
    pub fn validate(&self) -> Result<()> {
        if (0.0..1.0).contains(&self.dropout) {
            Ok(())
        } else {
            Err(OpsError::Value {
                name: "dropout",
                got: self.dropout.to_string(),
                allowed: "0.0 <= dropout < 1.0",
                remedy: "give the probability of zeroing a value",
            })
        }
    }
}

/// Arithmetic of a dense matrix product. Sums are in f32 in all of them (f64 for f64 operands).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MatmulPrecision {
    /// Operands as they are; f32 ones in IEEE f32.
    #[default]
    Strict,
    /// Operands as they are; f32 ones may be rounded to TF32 where the device has matrix units for
    /// it.
    Tf32,
    /// Operands rounded to bf16.
    Bf16,
    /// Operands rounded to f16.
    F16,
}

impl MatmulPrecision {
    /// The type that an operand of type `given` enters the product with.
    pub fn operand_dtype(self, given: DType) -> DType {
        match self {
            MatmulPrecision::Strict | MatmulPrecision::Tf32 => given,
            MatmulPrecision::Bf16 => DType::BF16,
            MatmulPrecision::F16 => DType::F16,
        }
    }

    /// The arithmetic of products that stay in f32 beside those of this precision: a router's.
    pub fn of_f32_products(self) -> Self {
        match self {
            MatmulPrecision::Tf32 => MatmulPrecision::Tf32,
            MatmulPrecision::Strict | MatmulPrecision::Bf16 | MatmulPrecision::F16 => {
                MatmulPrecision::Strict
            }
        }
    }
}
