//! Upcycling: a Mixture-of-Experts layer whose experts start as copies of a trained dense
//! feed-forward (arXiv:2212.05055).
//!
//! Right after upcycling without noise, all experts compute the dense network `f`, so that the layer
//! computes `f(x_t) · Σ_j g_tj`:
//!
//! - with `normalize_gate`, or with `top_k = num_experts`, gate weights sum to one, and the output
//!   is the dense network's, whatever the router does;
//! - otherwise the output is smaller, by the probability of the chosen experts: about
//!   `top_k / num_experts` of it under a fresh router. Nothing is folded into the weights to make up
//!   for that, since the factor differs from token to token.
//!
//! With `normalize_gate` and `top_k = 1` every gate weight is the constant one: the router then
//! learns from the auxiliary losses alone.

use burn::module::Param;
use burn::tensor::backend::Backend;
use burn::tensor::{Tensor, TensorData};
use hexa_ops::ExpertOps;
use rand::SeedableRng;
use rand_chacha::ChaCha12Rng;
use rand_distr::{Distribution, StandardNormal};

use crate::config::MoeConfig;
use crate::error::{MoeError, Result};
use crate::moe::Moe;

/// A trained dense feed-forward network, `act(x · w1 + b1) · w2 + b2`.
///
/// `hidden_width` is `d_ff`, or `2 · d_ff` for gated activations, whose even columns are the gates
/// and odd columns the values ([`Activation`](crate::Activation)). Weights are `[in, out]`, as in
/// Burn's `Linear`; those of PyTorch are the transpose.
#[derive(Debug, Clone)]
pub struct DenseFfn<B: Backend> {
    /// First layer: `[d_model, hidden_width]`, float.
    pub w1: Tensor<B, 2>,
    /// First layer's bias: `[hidden_width]`; none counts as zero.
    pub b1: Option<Tensor<B, 1>>,
    /// Second layer: `[d_ff, d_model]`, float.
    pub w2: Tensor<B, 2>,
    /// Second layer's bias: `[d_model]`; none counts as zero.
    pub b2: Option<Tensor<B, 1>>,
}

/// Noise that tells experts apart: each weight `w` of each expert becomes `w · (1 + std · n)`, with
/// an `n` of its own from the standard normal distribution. Biases stay copies.
///
/// Drawn on the host, so that a seed gives the same experts on every back-end.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ExpertNoise {
    /// Standard deviation, relative to the weight; finite, 0 or more.
    pub std: f64,
    /// Seed of the draws.
    pub seed: u64,
}

impl MoeConfig {
    /// Builds the layer on the device of `dense`: experts are copies of it, with `noise` if given,
    /// the router is fresh. The second layer of a shared expert starts at zero, so that it adds
    /// nothing yet. The module's documentation says when the output is that of `dense`.
    ///
    /// The second bias is copied even if the configuration does not train it.
    ///
    /// # Errors
    /// [`MoeError::Config`] if [`MoeConfig::validate`] refuses the configuration, or it has no
    /// biases and `dense` has; [`MoeError::DenseShape`] if a tensor of `dense` does not fit the
    /// configuration; [`MoeError::ExpertNoise`] if the noise is negative or not finite.
    pub fn upcycle<B: ExpertOps>(
        &self,
        dense: DenseFfn<B>,
        noise: Option<ExpertNoise>,
    ) -> Result<Moe<B>> {
        self.validate()?;
        self.check_dense(&dense)?;
        let mut noise = noise.map(Draws::new).transpose()?;
        let mut moe = self.init(&dense.w1.device())?;
        if let Some(shared) = moe.shared.take() {
            let zeros = shared.w2.val().zeros_like();
            moe.shared = Some(crate::Experts {
                w2: set(shared.w2.clone(), zeros),
                ..shared
            });
        }
        let experts = &mut moe.experts;
        let weights = [(&mut experts.w1, dense.w1), (&mut experts.w2, dense.w2)];
        for (param, weight) in weights {
            let mut copies = weight.unsqueeze_dim::<3>(0).repeat_dim(0, self.num_experts);
            if let Some(noise) = &mut noise {
                copies = noise.perturb(copies);
            }
            *param = set(param.clone(), copies);
        }
        let biases = [(&mut experts.b1, dense.b1), (&mut experts.b2, dense.b2)];
        for (param, bias) in biases {
            if let (Some(param), Some(bias)) = (param, bias) {
                let copies = bias.unsqueeze_dim::<2>(0).repeat_dim(0, self.num_experts);
                *param = set(param.clone(), copies);
            }
        }
        Ok(moe)
    }

    fn check_dense<B: Backend>(&self, dense: &DenseFfn<B>) -> Result<()> {
        let (d_model, d_ff) = (self.d_model, self.d_ff);
        let hidden_width = self.activation.hidden_width(d_ff);
        check("w1", &dense.w1, [d_model, hidden_width])?;
        check("w2", &dense.w2, [d_ff, d_model])?;
        let biases = [("b1", &dense.b1, hidden_width), ("b2", &dense.b2, d_model)];
        for (name, bias, width) in biases {
            let Some(bias) = bias else { continue };
            check(name, bias, [width])?;
            if !self.bias {
                return Err(MoeError::Config {
                    field: "bias",
                    got: format!("false, and the dense feed-forward has {name}"),
                    allowed: "true for experts that are copies of a network with biases".to_owned(),
                    remedy: "set bias to true, or leave the dense biases out",
                });
            }
        }
        Ok(())
    }
}

fn check<B: Backend, const D: usize>(
    tensor: &'static str,
    got: &Tensor<B, D>,
    expected: [usize; D],
) -> Result<()> {
    if got.dims() == expected {
        return Ok(());
    }
    Err(MoeError::DenseShape {
        tensor,
        got: got.dims().to_vec(),
        expected: expected.to_vec(),
    })
}

/// The parameter with another value, trained or frozen as before.
fn set<B: Backend, const D: usize>(
    param: Param<Tensor<B, D>>,
    value: Tensor<B, D>,
) -> Param<Tensor<B, D>> {
    let id = param.id;
    param.transform_for_load(value.detach(), id)
}

/// The draws of one layer, first layer first.
struct Draws {
    std: f64,
    rng: ChaCha12Rng,
}

impl Draws {
    fn new(noise: ExpertNoise) -> Result<Self> {
        let ExpertNoise { std, seed } = noise;
        if !(std.is_finite() && std >= 0.0) {
            return Err(MoeError::ExpertNoise {
                got: std.to_string(),
            });
        }
        let rng = ChaCha12Rng::seed_from_u64(seed);
        Ok(Self { std, rng })
    }

    fn perturb<B: Backend>(&mut self, weights: Tensor<B, 3>) -> Tensor<B, 3> {
        let shape = weights.dims();
        let factors: Vec<f32> = (0..shape.iter().product())
            .map(|_| {
                let n: f64 = StandardNormal.sample(&mut self.rng);
                (1.0 + self.std * n) as f32
            })
            .collect();
        let (device, dtype) = (weights.device(), weights.dtype());
        let factors = TensorData::new(factors, shape).convert_dtype(dtype);
        weights * Tensor::from_data(factors, (&device, dtype))
    }
}
