//! The layer in f64 on the host: token by token, sharing no code with the crate.

use std::f64::consts::SQRT_2;

use hexa_moe::{MoeConfig, RouterConfig};
use hexa_ops::testing::gradcheck::central_differences;
use hexa_ops::testing::oracle::{Gating, activate, erf, softmax, topk_gating};

use crate::support::Named;

/// The layer without noise.
pub struct HostMoe<'a> {
    pub config: &'a MoeConfig,
    pub params: &'a Named,
}

pub struct HostOutput {
    pub gating: Gating,
    pub output: Vec<f64>,
    pub aux_loss: f64,
}

impl HostMoe<'_> {
    pub fn forward(&self, x: &[f64]) -> HostOutput {
        let MoeConfig {
            d_model,
            num_experts,
            top_k,
            ref balance,
            ..
        } = *self.config;
        let logits = self.logits(x);
        let gating = topk_gating(&logits, num_experts, top_k, self.config.normalize_gate);

        let mut output = vec![0.0; x.len()];
        for (t, token) in x.chunks(d_model).enumerate() {
            for j in t * top_k..(t + 1) * top_k {
                let y = self.expert("experts", self.config.d_ff, gating.expert_ids[j], token);
                for (o, y) in y.iter().enumerate() {
                    output[t * d_model + o] += gating.weights[j] * y;
                }
            }
            if self.config.shared_d_ff > 0 {
                let y = self.expert("shared", self.config.shared_d_ff, 0, token);
                for (o, y) in y.iter().enumerate() {
                    output[t * d_model + o] += y;
                }
            }
        }

        let sigma = self.config.gate_noise / num_experts as f64;
        let aux_loss = balance.gshard * gshard(&gating, num_experts)
            + balance.load_importance
                * load_importance(&logits, &logits, &gating.expert_ids, top_k, sigma)
            + balance.z_loss * z_loss(&logits, num_experts);
        HostOutput {
            gating,
            output,
            aux_loss,
        }
    }

    /// `Σ output · direction + aux_loss`.
    pub fn objective(&self, x: &[f64], direction: &[f64]) -> f64 {
        let out = self.forward(x);
        let task: f64 = out.output.iter().zip(direction).map(|(y, d)| y * d).sum();
        task + out.aux_loss
    }

    /// Gradients of [`HostMoe::objective`] for the tokens and for each parameter.
    pub fn gradients(&self, x: &[f64], direction: &[f64]) -> (Vec<f64>, Named) {
        const STEP: f64 = 1e-5;
        let grad_x = central_differences(x, STEP, |x| self.objective(x, direction));
        let params = self
            .params
            .iter()
            .map(|(name, at)| {
                let grad = central_differences(at, STEP, |moved| {
                    let mut params = self.params.clone();
                    params.insert(name.clone(), moved.to_vec());
                    let moved = HostMoe {
                        config: self.config,
                        params: &params,
                    };
                    moved.objective(x, direction)
                });
                (name.clone(), grad)
            })
            .collect();
        (grad_x, params)
    }

    pub fn logits(&self, x: &[f64]) -> Vec<f64> {
        let (d, e) = (self.config.d_model, self.config.num_experts);
        match self.config.router {
            RouterConfig::Linear => {
                let w = &self.params["router.scorer.Linear.weight"];
                x.chunks(d).flat_map(|token| times(token, w, e)).collect()
            }
            RouterConfig::Cosine { dim, .. } => {
                let w = &self.params["router.scorer.Cosine.cosine_projector.weight"];
                let b = &self.params["router.scorer.Cosine.cosine_projector.bias"];
                let s = &self.params["router.scorer.Cosine.sim_matrix"];
                let t = self.params["router.scorer.Cosine.temperature"][0];
                let scale = t.min(100f64.ln()).exp();
                let mut logits = Vec::new();
                for token in x.chunks(d) {
                    let p: Vec<f64> = times(token, w, dim)
                        .iter()
                        .zip(b)
                        .map(|(p, b)| p + b)
                        .collect();
                    for expert in 0..e {
                        let v: Vec<f64> = (0..dim).map(|i| s[i * e + expert]).collect();
                        let dot: f64 = p.iter().zip(&v).map(|(p, v)| p * v).sum();
                        logits.push(scale * dot / (norm(&p) * norm(&v)));
                    }
                }
                logits
            }
        }
    }

    fn expert(&self, group: &str, d_ff: usize, expert: usize, token: &[f64]) -> Vec<f64> {
        let d = self.config.d_model;
        let h = self.config.activation.hidden_width(d_ff);
        let w1 = &self.params[&format!("{group}.w1")][expert * d * h..(expert + 1) * d * h];
        let w2 = &self.params[&format!("{group}.w2")][expert * d_ff * d..(expert + 1) * d_ff * d];
        let bias = |name: &str, width: usize| -> Vec<f64> {
            match self.params.get(&format!("{group}.{name}")) {
                Some(b) => b[expert * width..(expert + 1) * width].to_vec(),
                None => vec![0.0; width],
            }
        };
        let hidden: Vec<f64> = times(token, w1, h)
            .iter()
            .zip(bias("b1", h))
            .map(|(v, b)| v + b)
            .collect();
        let activated = activate(self.config.activation, &hidden);
        times(&activated, w2, d)
            .iter()
            .zip(bias("b2", d))
            .map(|(v, b)| v + b)
            .collect()
    }
}

/// Row vector times a matrix of `width` columns.
fn times(row: &[f64], matrix: &[f64], width: usize) -> Vec<f64> {
    (0..width)
        .map(|c| {
            row.iter()
                .enumerate()
                .map(|(r, v)| v * matrix[r * width + c])
                .sum()
        })
        .collect()
}

fn norm(v: &[f64]) -> f64 {
    v.iter().map(|v| v * v).sum::<f64>().sqrt().max(1e-12)
}

/// GShard's loss.
pub fn gshard(gating: &Gating, num_experts: usize) -> f64 {
    let tokens = gating.probs.len() / num_experts;
    let top_k = gating.expert_ids.len() / tokens;
    (0..num_experts)
        .map(|e| {
            let prob: f64 = (0..tokens).map(|t| gating.probs[t * num_experts + e]).sum();
            let first = (0..tokens)
                .filter(|t| gating.expert_ids[t * top_k] == e)
                .count();
            prob * first as f64
        })
        .sum::<f64>()
        * num_experts as f64
        / (tokens * tokens) as f64
}

/// Half the sum of importance and load loss.
pub fn load_importance(
    logits: &[f64],
    noisy: &[f64],
    expert_ids: &[usize],
    top_k: usize,
    sigma: f64,
) -> f64 {
    let tokens = expert_ids.len() / top_k;
    let num_experts = logits.len() / tokens;
    let probs = softmax(logits, num_experts);
    let mut importance = vec![0.0; num_experts];
    let mut load = vec![0.0; num_experts];
    for t in 0..tokens {
        let last = expert_ids[t * top_k + top_k - 1];
        let threshold = noisy[t * num_experts + last];
        for e in 0..num_experts {
            let p = probs[t * num_experts + e];
            importance[e] += p;
            load[e] += 0.5 * (1.0 + erf((p - threshold) / sigma / SQRT_2));
        }
    }
    (variation(&importance) + variation(&load)) / 2.0
}

fn variation(v: &[f64]) -> f64 {
    if v.len() < 2 {
        return 0.0;
    }
    let mean = v.iter().sum::<f64>() / v.len() as f64;
    let variance = v.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (v.len() - 1) as f64;
    variance / (mean * mean + 1e-10)
}

/// Mean squared log-sum-exp.
pub fn z_loss(logits: &[f64], num_experts: usize) -> f64 {
    let tokens = logits.len() / num_experts;
    logits
        .chunks(num_experts)
        .map(|row| row.iter().map(|l| l.exp()).sum::<f64>().ln().powi(2))
        .sum::<f64>()
        / tokens as f64
}
