//! The router: scores every expert for every token and picks the best `top_k`.

use burn::module::{Initializer, Module, Param};
use burn::nn::{Linear, LinearConfig};
use burn::tensor::backend::{AutodiffBackend, Backend};
use burn::tensor::{Distribution, FloatDType, Tensor};
use hexa_ops::{ExpertOps, Gating, MatmulPrecision};

use crate::error::Result;

/// The learned scale of the cosine router is at most 100 (temperature 0.01), as published.
const MAX_SCALE: f64 = 100.0;
/// Norms below this count as this, so that a zero vector has a zero direction; as in PyTorch.
const NORM_EPS: f64 = 1e-12;
/// Standard deviation of the cosine router's expert vectors. Only their directions matter.
const SIM_MATRIX_STD: f64 = 0.01;

/// Chooses experts for tokens, in f32 whatever the tokens' element type.
#[derive(Module, Debug)]
pub struct Router<B: Backend> {
    /// Scores experts.
    pub scorer: Scorer<B>,
    /// Number of experts.
    pub num_experts: usize,
    /// Experts per token.
    pub top_k: usize,
    /// Noise on the logits in training, times `num_experts`.
    pub gate_noise: f64,
    /// Whether a token's gate weights are divided by their sum.
    pub normalize_gate: bool,
    /// Whether noise is added on back-ends with autodiff.
    pub noise_in_training: bool,
    /// Arithmetic of the products.
    #[module(skip)]
    pub precision: MatmulPrecision,
}

/// The learned part of the router.
#[derive(Module, Debug)]
#[allow(
    clippy::large_enum_variant,
    reason = "there is one per layer, and a Box is not a Module"
)]
pub enum Scorer<B: Backend> {
    /// `logits = x · W`.
    Linear(Linear<B>),
    /// `logits = scale · cos(x · P + b, s_e)`.
    Cosine(CosineScorer<B>),
}

/// Parameters of the cosine router, by their published names.
#[derive(Module, Debug)]
pub struct CosineScorer<B: Backend> {
    /// Projection of the tokens: `[d_model, dim]`, with bias.
    pub cosine_projector: Linear<B>,
    /// One vector per expert, as columns: `[dim, num_experts]`.
    pub sim_matrix: Param<Tensor<B, 2>>,
    /// Logarithm of the scale, which is one over the temperature: `[1]`.
    pub temperature: Param<Tensor<B, 1>>,
}

/// What the router decided about each token, in f32.
#[derive(Debug, Clone)]
pub struct Routing<B: Backend> {
    /// Scores without noise: `[tokens, num_experts]`.
    pub logits: Tensor<B, 2>,
    /// The scores that experts were chosen by: `[tokens, num_experts]`; equal to `logits` but in
    /// training.
    pub noisy_logits: Tensor<B, 2>,
    /// Softmax of `noisy_logits`, and the `top_k` largest of it.
    pub gating: Gating<B>,
}

impl<B: AutodiffBackend> Routing<B> {
    /// What was decided without a graph.
    pub(crate) fn from_inner(inner: Routing<B::InnerBackend>) -> Self {
        Self {
            logits: Tensor::from_inner(inner.logits),
            noisy_logits: Tensor::from_inner(inner.noisy_logits),
            gating: Gating {
                probs: Tensor::from_inner(inner.gating.probs),
                weights: Tensor::from_inner(inner.gating.weights),
                expert_ids: Tensor::from_inner(inner.gating.expert_ids),
            },
        }
    }
}

impl<B: Backend> Routing<B> {
    /// The same values, without a gradient.
    pub fn detach(self) -> Self {
        Self {
            logits: self.logits.detach(),
            noisy_logits: self.noisy_logits.detach(),
            gating: Gating {
                probs: self.gating.probs.detach(),
                weights: self.gating.weights.detach(),
                expert_ids: self.gating.expert_ids,
            },
        }
    }
}

impl<B: ExpertOps> Router<B> {
    /// Routes tokens.
    ///
    /// # Shapes
    /// - `x`: `[tokens, d_model]`, any float type, `tokens >= 1`
    ///
    /// # Errors
    /// [`MoeError::Ops`](crate::MoeError::Ops) if shapes do not fit.
    pub fn route(&self, x: Tensor<B, 2>) -> Result<Routing<B>> {
        let logits = self
            .scorer
            .logits(x.cast(FloatDType::F32), self.precision)?;
        let noisy_logits = self.add_noise(logits.clone());
        let gating = hexa_ops::topk_gating(noisy_logits.clone(), self.top_k, self.normalize_gate)?;
        Ok(Routing {
            logits,
            noisy_logits,
            gating,
        })
    }

    /// Adds the noise of training, which is what a back-end with autodiff means, as for dropout.
    fn add_noise(&self, logits: Tensor<B, 2>) -> Tensor<B, 2> {
        let training = self.noise_in_training && B::ad_enabled(&logits.device());
        if self.gate_noise == 0.0 || !training {
            return logits;
        }
        let noise = logits.random_like(Distribution::Normal(0.0, 1.0));
        logits + noise * (self.gate_noise / self.num_experts as f64)
    }
}

impl<B: Backend> Scorer<B> {
    /// A linear scorer with normally distributed weights.
    pub fn linear(d_model: usize, num_experts: usize, std: f64, device: &B::Device) -> Self {
        Self::Linear(
            LinearConfig::new(d_model, num_experts)
                .with_bias(false)
                .with_initializer(normal(std))
                .init(device),
        )
    }

    /// A cosine scorer of widths `[d_model, dim, num_experts]`.
    pub fn cosine(
        [d_model, dim, num_experts]: [usize; 3],
        std: f64,
        init_temperature: f64,
        device: &B::Device,
    ) -> Self {
        let mut cosine_projector: Linear<B> = LinearConfig::new(d_model, dim)
            .with_bias(false)
            .with_initializer(normal(std))
            .init(device);
        cosine_projector.bias = Some(Initializer::Zeros.init([dim], device));
        let scale = Initializer::Constant {
            value: (1.0 / init_temperature).ln(),
        };
        Self::Cosine(CosineScorer {
            cosine_projector,
            sim_matrix: normal(SIM_MATRIX_STD).init([dim, num_experts], device),
            temperature: scale.init([1], device),
        })
    }
}

fn normal(std: f64) -> Initializer {
    Initializer::Normal { mean: 0.0, std }
}

impl<B: ExpertOps> Scorer<B> {
    /// Scores without noise: `[tokens, d_model]` → `[tokens, num_experts]`, both f32.
    ///
    /// # Errors
    /// [`MoeError::Ops`](crate::MoeError::Ops) if shapes do not fit.
    pub fn logits(&self, x: Tensor<B, 2>, precision: MatmulPrecision) -> Result<Tensor<B, 2>> {
        match self {
            Self::Linear(linear) => project(linear, x, precision),
            Self::Cosine(cosine) => cosine.logits(x, precision),
        }
    }
}

impl<B: ExpertOps> CosineScorer<B> {
    fn logits(&self, x: Tensor<B, 2>, precision: MatmulPrecision) -> Result<Tensor<B, 2>> {
        let tokens = unit_vectors(project(&self.cosine_projector, x, precision)?, 1);
        let experts = unit_vectors(f32_of(&self.sim_matrix), 0);
        let cosines = hexa_ops::linear(tokens, experts, None, precision)?;
        let scale = f32_of(&self.temperature)
            .clamp_max(MAX_SCALE.ln())
            .exp()
            .unsqueeze::<2>();
        Ok(cosines * scale)
    }
}

fn project<B: ExpertOps>(
    linear: &Linear<B>,
    x: Tensor<B, 2>,
    precision: MatmulPrecision,
) -> Result<Tensor<B, 2>> {
    let bias = linear.bias.as_ref().map(f32_of);
    Ok(hexa_ops::linear(
        x,
        f32_of(&linear.weight),
        bias,
        precision,
    )?)
}

/// A parameter in f32: routing decides discretely, so that half precision would move tokens.
fn f32_of<B: Backend, const D: usize>(param: &Param<Tensor<B, D>>) -> Tensor<B, D> {
    param.val().cast(FloatDType::F32)
}

/// Scales the vectors along `dim` to length one.
///
/// The square is clamped, not the norm: the gradient at a zero vector is then 0 and not 0 · ∞.
fn unit_vectors<B: Backend>(x: Tensor<B, 2>, dim: usize) -> Tensor<B, 2> {
    let square = (x.clone() * x.clone()).sum_dim(dim);
    x / square.clamp_min(NORM_EPS * NORM_EPS).sqrt()
}
