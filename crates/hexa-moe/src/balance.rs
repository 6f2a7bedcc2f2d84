//! Auxiliary losses that keep the load of the experts even. All are differentiable, in f32, and
//! of shape `[1]`; a mean over zero tokens is never taken.

use burn::tensor::activation::softmax;
use burn::tensor::backend::Backend;
use burn::tensor::{DType, Int, IntDType, Tensor};

use crate::config::BalanceConfig;
use crate::router::Routing;

/// Keeps the squared mean in [`squared_variation`] away from zero, as published.
const VARIATION_EPS: f64 = 1e-10;

impl BalanceConfig {
    /// Weighted sum of the auxiliary losses: `[1]`.
    ///
    /// `gate_noise` is the router's; `routing` is of at least one token.
    pub fn loss<B: Backend>(&self, routing: &Routing<B>, gate_noise: f64) -> Tensor<B, 1> {
        let mut terms = Vec::with_capacity(3);
        if self.gshard > 0.0 {
            let loss = gshard_loss(
                routing.gating.probs.clone(),
                routing.gating.expert_ids.clone(),
            );
            terms.push(loss * self.gshard);
        }
        if self.load_importance > 0.0 {
            let loss = load_importance_loss(
                routing.logits.clone(),
                routing.noisy_logits.clone(),
                routing.gating.expert_ids.clone(),
                gate_noise,
            );
            terms.push(loss * self.load_importance);
        }
        if self.z_loss > 0.0 {
            terms.push(z_loss(routing.logits.clone()) * self.z_loss);
        }
        terms
            .into_iter()
            .reduce(|sum, term| sum + term)
            .unwrap_or_else(|| no_loss(&routing.logits.device()))
    }
}

/// The same losses from sums over tokens, which ranks can add up. Sums are concatenated in the
/// order of the fields of [`BalanceConfig`]: `Σ p_te` and first choices for GShard, importance and
/// load for the load + importance loss, `Σ (log Σ exp)²` for the z-loss.
impl BalanceConfig {
    /// Length of [`BalanceConfig::sums`].
    pub(crate) fn num_sums(&self, num_experts: usize) -> usize {
        let pair = |weight: f64| if weight > 0.0 { 2 * num_experts } else { 0 };
        pair(self.gshard) + pair(self.load_importance) + usize::from(self.z_loss > 0.0)
    }

    /// Sums over the tokens of `routing`, of which there is at least one; at least one loss is on.
    pub(crate) fn sums<B: Backend>(&self, routing: &Routing<B>, gate_noise: f64) -> Tensor<B, 1> {
        let mut sums = Vec::with_capacity(5);
        if self.gshard > 0.0 {
            let (probs, ids) = (&routing.gating.probs, &routing.gating.expert_ids);
            sums.push(probs.clone().sum_dim(0));
            sums.push(one_hot(ids.clone(), 0, probs).sum_dim(0));
        }
        if self.load_importance > 0.0 {
            let [importance, load] = importance_and_load(
                routing.logits.clone(),
                routing.noisy_logits.clone(),
                routing.gating.expert_ids.clone(),
                gate_noise,
            );
            sums.extend([importance, load]);
        }
        if self.z_loss > 0.0 {
            sums.push(squared_log_sum_exp(routing.logits.clone()).sum_dim(0));
        }
        Tensor::cat(sums, 1).flatten(0, 1)
    }

    /// Weighted sum of the auxiliary losses from the sums over `tokens` tokens: `[1]`.
    pub(crate) fn loss_of_sums<B: Backend>(
        &self,
        sums: Tensor<B, 1>,
        tokens: usize,
        num_experts: usize,
    ) -> Tensor<B, 1> {
        let device = sums.device();
        let sums = sums.unsqueeze::<2>();
        let mut at = 0;
        let mut next = |len| {
            at += len;
            sums.clone().narrow(1, at - len, len)
        };
        let mut terms = Vec::with_capacity(3);
        if self.gshard > 0.0 {
            let (probs, load) = (next(num_experts), next(num_experts));
            terms.push((probs * load).sum() * (gshard_scale(tokens, num_experts) * self.gshard));
        }
        if self.load_importance > 0.0 {
            let (importance, load) = (next(num_experts), next(num_experts));
            let loss = squared_variation(importance) + squared_variation(load);
            terms.push(loss * (0.5 * self.load_importance));
        }
        if self.z_loss > 0.0 {
            terms.push(next(1).sum() * (self.z_loss / tokens as f64));
        }
        terms
            .into_iter()
            .reduce(|sum, term| sum + term)
            .unwrap_or_else(|| no_loss(&device))
    }
}

fn gshard_scale(tokens: usize, num_experts: usize) -> f64 {
    num_experts as f64 / (tokens as f64 * tokens as f64)
}

/// A loss of zero: `[1]`.
pub(crate) fn no_loss<B: Backend>(device: &B::Device) -> Tensor<B, 1> {
    Tensor::zeros([1], (device, DType::F32))
}

/// GShard's loss, `E / T² · Σ_e (Σ_t p_te) · (Σ_t [top1(t) = e])` (arXiv:2006.16668, Eq. 4, as
/// Tutel computes it): only first choices count as load, and the count has no gradient.
///
/// # Shapes
/// - `probs`: `[tokens, num_experts]`, float, `tokens >= 1`
/// - `expert_ids`: `[tokens, top_k]`, int in `0..num_experts`
pub fn gshard_loss<B: Backend>(probs: Tensor<B, 2>, expert_ids: Tensor<B, 2, Int>) -> Tensor<B, 1> {
    let [tokens, num_experts] = probs.dims();
    let load = one_hot(expert_ids, 0, &probs).sum_dim(0);
    (probs.sum_dim(0) * load).sum() * gshard_scale(tokens, num_experts)
}

/// `(importance + load) / 2` (arXiv:1701.06538, Eq. 6 and 11, as Tutel computes it).
///
/// Importance is the squared variation coefficient of `Σ_t softmax(logits)_te` over the experts;
/// load is that of `Σ_t Φ((softmax(logits)_te − θ_t) / σ)`, where `θ_t` is the last chosen *logit*
/// with noise and `σ = gate_noise / num_experts`. `θ_t` has a gradient, too. With one expert there
/// is nothing to balance, and the loss is zero.
///
/// # Shapes
/// - `logits`, `noisy_logits`: `[tokens, num_experts]`, float, `tokens >= 1`
/// - `expert_ids`: `[tokens, top_k]`, int in `0..num_experts`, the choices by `noisy_logits`
pub fn load_importance_loss<B: Backend>(
    logits: Tensor<B, 2>,
    noisy_logits: Tensor<B, 2>,
    expert_ids: Tensor<B, 2, Int>,
    gate_noise: f64,
) -> Tensor<B, 1> {
    let [importance, load] = importance_and_load(logits, noisy_logits, expert_ids, gate_noise);
    (squared_variation(importance) + squared_variation(load)) * 0.5
}

/// The two rows `[1, num_experts]` of [`load_importance_loss`], each a sum over tokens.
fn importance_and_load<B: Backend>(
    logits: Tensor<B, 2>,
    noisy_logits: Tensor<B, 2>,
    expert_ids: Tensor<B, 2, Int>,
    gate_noise: f64,
) -> [Tensor<B, 2>; 2] {
    let [_, num_experts] = logits.dims();
    let [_, top_k] = expert_ids.dims();
    let probs = softmax(logits, 1);
    // A product with the one-hot choice rather than `gather`: its gradient is a product as well,
    // where that of `gather` is a scatter.
    let last = one_hot(expert_ids, top_k - 1, &noisy_logits);
    let threshold = (noisy_logits * last).sum_dim(1);

    let std = gate_noise / num_experts as f64;
    let chosen = normal_cdf((probs.clone() - threshold) / std);
    [probs.sum_dim(0), chosen.sum_dim(0)]
}

/// The router's z-loss, `mean_t (log Σ_e exp(logits_te))²` (arXiv:2202.08906, Eq. 5), which keeps
/// logits small.
///
/// # Shapes
/// - `logits`: `[tokens, num_experts]`, float, `tokens >= 1`
pub fn z_loss<B: Backend>(logits: Tensor<B, 2>) -> Tensor<B, 1> {
    squared_log_sum_exp(logits).mean()
}

/// `(log Σ_e exp(logits_te))²`: `[tokens, 1]`.
pub(crate) fn squared_log_sum_exp<B: Backend>(logits: Tensor<B, 2>) -> Tensor<B, 2> {
    // Detached, since the result does not depend on it.
    let max = logits.clone().max_dim(1).detach();
    let log_sum_exp = (logits - max.clone()).exp().sum_dim(1).log() + max;
    log_sum_exp.clone() * log_sum_exp
}

/// Unbiased variance over squared mean of one row, `[1, num_experts]` → `[1]`.
fn squared_variation<B: Backend>(row: Tensor<B, 2>) -> Tensor<B, 1> {
    let [_, num_experts] = row.dims();
    if num_experts < 2 {
        return (row * 0.0).sum();
    }
    let mean = row.clone().mean_dim(1);
    let deviation = row - mean.clone();
    let variance = (deviation.clone() * deviation).sum_dim(1) / (num_experts - 1) as f64;
    (variance / (mean.clone() * mean + VARIATION_EPS)).sum()
}

/// `Φ(z)`, the distribution function of the standard normal distribution.
fn normal_cdf<B: Backend>(z: Tensor<B, 2>) -> Tensor<B, 2> {
    ((z / core::f64::consts::SQRT_2).erf() + 1.0) * 0.5
}

/// Choice `choice` of each token as a row of zeros and a one, shaped and typed as `like`.
fn one_hot<B: Backend>(
    expert_ids: Tensor<B, 2, Int>,
    choice: usize,
    like: &Tensor<B, 2>,
) -> Tensor<B, 2> {
    let [tokens, num_experts] = like.dims();
    let chosen = expert_ids.narrow(1, choice, 1);
    let experts = Tensor::<B, 1, Int>::arange(0..num_experts as i64, &like.device())
        .cast(IntDType::from(chosen.dtype()))
        .unsqueeze::<2>();
    chosen
        .expand([tokens, num_experts])
        .equal(experts.expand([tokens, num_experts]))
        .float()
        .cast(like.dtype())
}
