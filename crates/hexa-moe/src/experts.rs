//! The experts: one feed-forward network each, all computed by one fused operation.

use burn::module::{Initializer, Module, Param, ParamId};
use burn::tensor::backend::Backend;
use burn::tensor::{Distribution, Int, Tensor};
use hexa_ops::{
    Activation, ExpertIndex, ExpertOps, ExpertParams, Favor, FfnOptions, Gating, MatmulPrecision,
};

use crate::error::Result;

/// Feed-forward experts, `act(x · W1_e + b1_e) · W2_e + b2_e`.
///
/// `hidden_width` is `d_ff`, or `2 · d_ff` for gated activations, whose even columns are the gates
/// and odd columns the values ([`Activation`]).
#[derive(Module, Debug)]
pub struct Experts<B: Backend> {
    /// First layer: `[num_experts, d_model, hidden_width]`.
    pub w1: Param<Tensor<B, 3>>,
    /// First layer's bias: `[num_experts, hidden_width]`.
    pub b1: Option<Param<Tensor<B, 2>>>,
    /// Second layer: `[num_experts, d_ff, d_model]`.
    pub w2: Param<Tensor<B, 3>>,
    /// Second layer's bias: `[num_experts, d_model]`; it may be frozen.
    pub b2: Option<Param<Tensor<B, 2>>>,
    /// Number of experts.
    pub num_experts: usize,
    /// Dropout after the activation, in training.
    pub dropout: f64,
    /// The activation function.
    #[module(skip)]
    pub activation: Activation,
    /// Arithmetic of the products: parameters and tokens are rounded to half precision on their way
    /// in, if it says so.
    #[module(skip)]
    pub precision: MatmulPrecision,
    /// What kernels that could have either choose.
    #[module(skip)]
    pub favor: Favor,
}

/// Which biases experts have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FfnBias {
    None,
    FrozenFc2,
    Trained,
}

/// Everything that determines freshly made [`Experts`].
#[derive(Debug, Clone, Copy)]
pub(crate) struct ExpertsSpec {
    pub num_experts: usize,
    pub d_model: usize,
    pub d_ff: usize,
    pub activation: Activation,
    pub dropout: f64,
    pub init_std: f64,
    pub bias: FfnBias,
    pub precision: MatmulPrecision,
    pub favor: Favor,
}

impl ExpertsSpec {
    /// Normally distributed weights, zero biases.
    pub fn init<B: Backend>(&self, device: &B::Device) -> Experts<B> {
        let Self {
            num_experts,
            d_model,
            d_ff,
            ..
        } = *self;
        let hidden_width = self.activation.hidden_width(d_ff);
        let weights = Initializer::Normal {
            mean: 0.0,
            std: self.init_std,
        };
        Experts {
            w1: weights.init([num_experts, d_model, hidden_width], device),
            b1: (self.bias != FfnBias::None)
                .then(|| Initializer::Zeros.init([num_experts, hidden_width], device)),
            w2: weights.init([num_experts, d_ff, d_model], device),
            b2: match self.bias {
                FfnBias::None => None,
                FfnBias::FrozenFc2 => Some(frozen_zeros([num_experts, d_model], device)),
                FfnBias::Trained => Some(Initializer::Zeros.init([num_experts, d_model], device)),
            },
            num_experts,
            dropout: self.dropout,
            activation: self.activation,
            precision: self.precision,
            favor: self.favor,
        }
    }
}

/// A zero parameter that takes no part in training.
///
/// `Initializer::init(..).set_require_grad(false)` would not do: a parameter that is still lazy
/// then forgets the flag on its way through `valid()` and `train()`.
fn frozen_zeros<B: Backend, const D: usize>(
    shape: [usize; D],
    device: &B::Device,
) -> Param<Tensor<B, D>> {
    Param::uninitialized(
        ParamId::new(),
        move |device, _require_grad| Tensor::zeros(shape, device),
        device.clone(),
        false,
        shape.into(),
    )
}

impl<B: ExpertOps> Experts<B> {
    /// `y_t = Σ_j g_tj · expert_{id(t, j)}(x_t)`: `[tokens, d_model]`.
    ///
    /// The arithmetic is in the tokens' element type, or in the half precision that
    /// [`Experts::precision`] names: what is of another type (f32 masters of a bf16 computation) is
    /// converted to it, and gradients come back in each tensor's own. The result is of the type of
    /// the arithmetic.
    ///
    /// # Shapes
    /// - `x`: `[tokens, d_model]`, float
    /// - `gate_weights`: `[tokens, top_k]`, float
    /// - `index`: of `tokens` tokens, `top_k` choices and this layer's experts
    ///
    /// # Errors
    /// [`MoeError::Ops`](crate::MoeError::Ops) if shapes do not fit.
    pub fn forward(
        &self,
        x: Tensor<B, 2>,
        gate_weights: Tensor<B, 2>,
        index: &ExpertIndex<B>,
    ) -> Result<Tensor<B, 2>> {
        let dtype = self.precision.operand_dtype(x.dtype());
        let x = x.cast(dtype);
        let params = ExpertParams {
            w1: self.w1.val().cast(dtype),
            b1: self.b1.as_ref().map(|b1| b1.val().cast(dtype)),
            w2: self.w2.val().cast(dtype),
            b2: self.b2.as_ref().map(|b2| b2.val().cast(dtype)),
        };
        let (options, seed) = self.options(&x.device());
        let gates = gate_weights.cast(dtype);
        Ok(hexa_ops::expert_ffn(
            x, gates, params, index, options, seed,
        )?)
    }

    /// The parameters of which a rank of a distributed layer holds slices.
    pub(crate) fn sliced_params(&self) -> Vec<ParamId> {
        let b1 = self.b1.as_ref().map(|b1| b1.id);
        [self.w1.id, self.w2.id].into_iter().chain(b1).collect()
    }

    /// Activation and dropout of one pass, with a fresh seed if there is dropout.
    pub(crate) fn options(&self, device: &B::Device) -> (FfnOptions, Option<Tensor<B, 1, Int>>) {
        let seed = self.dropout_seed(device);
        let options = FfnOptions {
            activation: self.activation,
            dropout: if seed.is_some() {
                self.dropout as f32
            } else {
                0.0
            },
            favor: self.favor,
        };
        (options, seed)
    }

    /// The single expert's output for every token, ungated: `[tokens, d_model]` → the same.
    pub(crate) fn forward_shared(&self, x: Tensor<B, 2>) -> Result<Tensor<B, 2>> {
        let [tokens, _] = x.dims();
        let device = x.device();
        let ones = Tensor::<B, 2>::ones([tokens, 1], (&device, x.dtype()));
        let everyone = Gating {
            probs: ones.clone(),
            weights: ones.clone(),
            expert_ids: Tensor::zeros([tokens, 1], &device),
        };
        self.forward(x, ones, &ExpertIndex::from_gating(&everyone))
    }

    /// A fresh seed in training, drawn and kept on the device; `None` without dropout.
    fn dropout_seed(&self, device: &B::Device) -> Option<Tensor<B, 1, Int>> {
        // 24 bits are what every back-end's uniform numbers have.
        let words = Distribution::Uniform(0.0, f64::from(1 << 24));
        (self.dropout > 0.0 && B::ad_enabled(device)).then(|| Tensor::random([2], words, device))
    }
}
