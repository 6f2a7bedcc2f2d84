//! The boundary between the layer and its kernels.
//!
//! [`ExpertKernels`] is what an implementation provides on raw tensors: forward operators and
//! their vector-Jacobian products, without differentiation. [`ExpertOps`] is what a model asks of
//! its back-end; every [`ExpertKernels`] back-end has it, and `Autodiff` over one has it too.

mod autodiff;
#[cfg(feature = "cube")]
mod cube;
mod dense;
mod executor;
#[cfg(feature = "cpu")]
mod flex;
#[cfg(feature = "fusion")]
mod fusion;
mod gelu;
mod ops;
mod reached;

pub use executor::{FfnExecutor, FfnInputs};
pub use ops::{ExpertOps, TrainingBackend};
pub use reached::WhenReached;

use burn::tensor::FloatDType;
use burn::tensor::backend::Backend;
use burn::tensor::ops::{FloatTensor, IntTensor};

use crate::memory::DeviceMemory;
use crate::types::{FfnOptions, MatmulPrecision, RowOrder};

/// Who works on which rows: the re-index vector of arXiv:2411.01288v4, section 4.1.
///
/// `I` is the back-end's integer tensor, so that `Autodiff<B>` and `B` share one type. Rows are
/// not padded: a kernel that works on tiles of BLK rows finds its tiles from `offsets`.
#[derive(Debug, Clone)]
pub struct RawExpertIndex<I> {
    /// Slots per expert: `[num_experts]`.
    pub counts: I,
    /// First position of each expert, and the number of slots at the end: `[num_experts + 1]`.
    pub offsets: I,
    /// Slot at each position, ascending within an expert: `[tokens · top_k]`.
    pub slots: I,
    /// Position of each slot, the inverse of `slots`: `[tokens · top_k]`.
    pub positions: I,
    /// Number of tokens.
    pub tokens: usize,
    /// Choices per token.
    pub top_k: usize,
    /// Number of experts.
    pub num_experts: usize,
}

impl<I> RawExpertIndex<I> {
    /// Number of (token, choice) slots.
    pub fn num_slots(&self) -> usize {
        self.tokens * self.top_k
    }
}

/// Result of top-k softmax gating.
#[derive(Debug, Clone)]
pub struct RawGating<F, I> {
    /// Softmax of the logits: `[tokens, num_experts]`.
    pub probs: F,
    /// Weight of each choice, descending: `[tokens, top_k]`.
    pub weights: F,
    /// Chosen experts, of equal logits the lower id first: `[tokens, top_k]`.
    pub expert_ids: I,
}

/// Parameters of all experts' feed-forward networks.
#[derive(Debug, Clone)]
pub struct FfnWeights<F> {
    /// First layer: `[num_experts, d_model, hidden_width]`, `hidden_width` being `d_ff`, or
    /// `2 · d_ff` for gated activations.
    pub w1: F,
    /// First layer's bias: `[num_experts, hidden_width]`.
    pub b1: Option<F>,
    /// Second layer: `[num_experts, d_ff, d_model]`.
    pub w2: F,
    /// Second layer's bias: `[num_experts, d_model]`.
    pub b2: Option<F>,
}

/// Result of the fused FFN's forward pass.
#[derive(Debug, Clone)]
pub struct FfnForward<F> {
    /// Gate-weighted sum of the chosen experts' outputs: `[tokens, d_model]`.
    pub output: F,
    /// `x · W1 + b1`, expert order: `[tokens · top_k, hidden_width]`.
    pub pre_activation: F,
}

/// Which gradients of the fused FFN are wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FfnNeeds {
    /// Gradient of the tokens.
    pub x: bool,
    /// Gradient of the gate weights.
    pub gates: bool,
    /// Gradient of the first layer's weights.
    pub w1: bool,
    /// Gradient of the first layer's bias.
    pub b1: bool,
    /// Gradient of the second layer's weights.
    pub w2: bool,
    /// Gradient of the second layer's bias.
    pub b2: bool,
}

/// Gradients of the fused FFN, those that were asked for, each shaped as its tensor.
#[derive(Debug, Clone)]
pub struct FfnGrads<F> {
    /// Gradient of the tokens.
    pub x: Option<F>,
    /// Gradient of the gate weights.
    pub gates: Option<F>,
    /// Gradient of the first layer's weights.
    pub w1: Option<F>,
    /// Gradient of the first layer's bias.
    pub b1: Option<F>,
    /// Gradient of the second layer's weights.
    pub w2: Option<F>,
    /// Gradient of the second layer's bias.
    pub b2: Option<F>,
}

/// Inputs of [`ExpertKernels::esmm`].
#[derive(Debug, Clone)]
pub struct EsmmArgs<F, I> {
    /// Left operand, in `x_order`: `[rows, in]`.
    pub x: F,
    /// Order of the rows of `x`.
    pub x_order: RowOrder,
    /// Weights `[num_experts, in, out]`, or `[num_experts, out, in]` if `transposed`.
    pub w: F,
    /// Whether the product is with the transpose of each expert's stored matrix.
    pub transposed: bool,
    /// Bias `[num_experts, out]`.
    pub bias: Option<F>,
    /// Order of the rows of the result, [`RowOrder::Slot`] or [`RowOrder::Expert`].
    pub out_order: RowOrder,
    /// The routing.
    pub index: RawExpertIndex<I>,
}

/// Inputs of [`ExpertKernels::ffn_activation_backward`].
#[derive(Debug, Clone)]
pub struct FfnActivationGradArgs<F, I> {
    /// Pre-activation, expert order: `[slots, hidden_width]`.
    pub pre_activation: F,
    /// `dy · W2ᵀ` before gate weighting, expert order: `[slots, d_ff]`.
    pub grad_activated: F,
    /// Gate weights: `[tokens, top_k]`.
    pub gates: F,
    /// Output gradient `[tokens, d_model]` and second bias `[num_experts, d_model]`, for the
    /// bias' share of the gate gradient.
    pub output_bias: Option<(F, F)>,
    /// The routing.
    pub index: RawExpertIndex<I>,
    /// Activation and dropout.
    pub options: FfnOptions,
    /// The forward pass' dropout seed.
    pub dropout_seed: Option<I>,
}

/// Result of [`ExpertKernels::ffn_activation_backward`].
#[derive(Debug, Clone)]
pub struct FfnActivationGrads<F> {
    /// Gradient of the pre-activation, gate-weighted, expert order: `[slots, hidden_width]`.
    pub pre_activation: F,
    /// Gate weight times activated value, expert order: `[slots, d_ff]`; the left operand of the
    /// second layer's weight gradient.
    pub weighted_activated: F,
    /// Gradient of the gate weights: `[tokens, top_k]`.
    pub gates: F,
}

/// The expert-specific kernels of one back-end, on raw tensors.
///
/// Callers have validated shapes, dtypes and ids ([`crate::api`]); implementations may assume
/// them. Contracts that hold for all methods:
///
/// - float tensors of one call share one dtype; sums are accumulated in f32 (f64 for f64 tensors)
///   and rounded once;
/// - tensors may have any strides; results are contiguous;
/// - any of `tokens`, an expert's row count and the widths may be zero (widths of weights are
///   not);
/// - the same input gives the same bits;
/// - nothing waits for the device.
pub trait ExpertKernels: Backend {
    /// Rows in one tile of the expert matmul (BLK); 1 where rows are not tiled.
    ///
    /// The arithmetic that tiles spend on missing rows is the only redundancy: tile waste.
    fn tile_rows(device: &Self::Device) -> usize;

    /// Softmax over experts and the `top_k` largest of it.
    ///
    /// `logits`: `[tokens, num_experts]`. With `normalize`, the weights of a token are divided by
    /// their sum (at least the dtype's epsilon).
    fn topk_gating(
        logits: FloatTensor<Self>,
        top_k: usize,
        normalize: bool,
    ) -> RawGating<FloatTensor<Self>, IntTensor<Self>>;

    /// Gradient of the probabilities from that of the weights, zero where not chosen:
    /// `[tokens, num_experts]`.
    fn topk_weights_backward(
        probs: FloatTensor<Self>,
        expert_ids: IntTensor<Self>,
        grad_weights: FloatTensor<Self>,
        normalize: bool,
    ) -> FloatTensor<Self>;

    /// Gradient of the logits from that of the probabilities: `p · (g − Σ g p)`.
    fn softmax_backward(probs: FloatTensor<Self>, grad: FloatTensor<Self>) -> FloatTensor<Self>;

    /// Sorts the slots by expert, stably: no order depends on timing.
    ///
    /// `expert_ids`: `[tokens, top_k]`. An id out of range is clamped into it, so that no kernel
    /// can leave its memory; [`crate::ExpertIndex::new`] refuses such ids.
    fn expert_index(
        expert_ids: IntTensor<Self>,
        num_experts: usize,
    ) -> RawExpertIndex<IntTensor<Self>>;

    /// `y_i = x_i · W[R(i)] + b[R(i)]`: `[slots, out]` (arXiv:2411.01288v4, ESMM).
    fn esmm(args: EsmmArgs<FloatTensor<Self>, IntTensor<Self>>) -> FloatTensor<Self>;

    /// `M_e = Σ_{R(i)=e} a_iᵀ b_i`: `[num_experts, a's width, b's width]`, exactly zero for an
    /// expert without rows (ESTMM).
    fn estmm(
        a: FloatTensor<Self>,
        a_order: RowOrder,
        b: FloatTensor<Self>,
        b_order: RowOrder,
        index: RawExpertIndex<IntTensor<Self>>,
    ) -> FloatTensor<Self>;

    /// `s_e = Σ_{R(i)=e} g_i x_i`: `[num_experts, n]`, exactly zero for an expert without rows
    /// (ESS). `g` are `gates`, `[tokens, top_k]`, or one.
    fn ess(
        x: FloatTensor<Self>,
        x_order: RowOrder,
        gates: Option<FloatTensor<Self>>,
        index: RawExpertIndex<IntTensor<Self>>,
    ) -> FloatTensor<Self>;

    /// `out_t = Σ_j g_tj · y_tj` over a token's slots, in the order of its choices:
    /// `[tokens, n]`. `y` is `[slots, n]` in `y_order`, not [`RowOrder::Token`]; `g` are `gates`,
    /// `[tokens, top_k]`, or one.
    fn combine(
        y: FloatTensor<Self>,
        y_order: RowOrder,
        gates: Option<FloatTensor<Self>>,
        index: RawExpertIndex<IntTensor<Self>>,
    ) -> FloatTensor<Self>;

    /// Activation and dropout: `[slots, hidden_width]` → `[slots, d_ff]`, both in expert order.
    ///
    /// Dropout keeps column `j` of slot `s` iff `dropout_uniform(seed, s, j) >= p`
    /// ([`crate::dropout`]), so that the backward pass derives the same mask and every back-end
    /// draws the same one.
    fn ffn_activation(
        pre_activation: FloatTensor<Self>,
        index: RawExpertIndex<IntTensor<Self>>,
        options: FfnOptions,
        dropout_seed: Option<IntTensor<Self>>,
    ) -> FloatTensor<Self>;

    /// Gradients through activation, dropout and gate weighting; see the types' fields.
    fn ffn_activation_backward(
        args: FfnActivationGradArgs<FloatTensor<Self>, IntTensor<Self>>,
    ) -> FfnActivationGrads<FloatTensor<Self>>;

    /// `Σ_j g_tj · (act(x_t W1 + b1) W2 + b2)`; see [`crate::ops::ffn`] for the composition that
    /// back-ends start from.
    ///
    /// `x`: `[tokens, d_model]`; `gates`: `[tokens, top_k]`; `dropout_seed`: `[2]`.
    fn expert_ffn(
        x: FloatTensor<Self>,
        gates: FloatTensor<Self>,
        weights: FfnWeights<FloatTensor<Self>>,
        index: RawExpertIndex<IntTensor<Self>>,
        options: FfnOptions,
        dropout_seed: Option<IntTensor<Self>>,
    ) -> FfnForward<FloatTensor<Self>> {
        crate::ops::ffn::forward::<Self>(x, gates, weights, index, options, dropout_seed)
    }

    /// Vector-Jacobian product of [`ExpertKernels::expert_ffn`], from its inputs and the
    /// pre-activation alone.
    fn expert_ffn_backward(
        args: FfnBackwardArgs<FloatTensor<Self>, IntTensor<Self>>,
    ) -> FfnGrads<FloatTensor<Self>> {
        crate::ops::ffn::backward::<Self>(args)
    }

    /// Matrix product of two tensors of equal rank, equal batch dimensions and one dtype, as a
    /// tensor of type `out`: the operands' dtype, or f32 for half-precision operands.
    ///
    /// `precision` says what may happen to f32 operands; those of other types are taken as they
    /// are.
    fn dense_matmul(
        lhs: FloatTensor<Self>,
        rhs: FloatTensor<Self>,
        precision: MatmulPrecision,
        out: FloatDType,
    ) -> FloatTensor<Self>;

    /// `x · Φ(x)` of every element, Φ with the error function; computed in f32 (f64 for f64).
    fn gelu(x: FloatTensor<Self>) -> FloatTensor<Self>;

    /// `grad · gelu'(x)`, in the type of `x`, which is that of `grad`.
    fn gelu_backward(x: FloatTensor<Self>, grad: FloatTensor<Self>) -> FloatTensor<Self>;

    /// Whether the device computes products in this arithmetic.
    ///
    /// TF32 counts as supported where it is what the device does, not where f32 would stand in
    /// for it.
    fn supports_precision(device: &Self::Device, precision: MatmulPrecision) -> bool;

    /// Memory of the device as the calling thread's stream sees it; none where nobody counts it.
    fn device_memory(_device: &Self::Device) -> Option<DeviceMemory> {
        None
    }
}

/// Inputs of [`ExpertKernels::expert_ffn_backward`].
#[derive(Debug, Clone)]
pub struct FfnBackwardArgs<F, I> {
    /// Gradient of the output: `[tokens, d_model]`.
    pub grad_output: F,
    /// The forward pass' tokens.
    pub x: F,
    /// The forward pass' gate weights.
    pub gates: F,
    /// The experts' parameters.
    pub weights: FfnWeights<F>,
    /// What the forward pass saved.
    pub pre_activation: F,
    /// The routing.
    pub index: RawExpertIndex<I>,
    /// Activation and dropout.
    pub options: FfnOptions,
    /// The forward pass' dropout seed.
    pub dropout_seed: Option<I>,
    /// Which gradients to compute.
    pub needs: FfnNeeds,
}
