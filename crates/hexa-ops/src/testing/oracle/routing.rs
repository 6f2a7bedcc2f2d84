//! Gating and the expert index.

use crate::types::RowOrder;

/// Which experts each token goes to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Routing {
    /// Number of tokens.
    pub tokens: usize,
    /// Choices per token.
    pub top_k: usize,
    /// Number of experts.
    pub num_experts: usize,
    /// Expert of each slot: `[tokens · top_k]`.
    pub expert_ids: Vec<usize>,
}

impl Routing {
    /// The routing of `expert_ids`, `[tokens, top_k]`, each in `0..num_experts`.
    pub fn new(tokens: usize, top_k: usize, num_experts: usize, expert_ids: Vec<usize>) -> Self {
        assert_eq!(expert_ids.len(), tokens * top_k);
        assert!(expert_ids.iter().all(|&id| id < num_experts));
        Self {
            tokens,
            top_k,
            num_experts,
            expert_ids,
        }
    }

    /// Number of (token, choice) slots.
    pub fn num_slots(&self) -> usize {
        self.expert_ids.len()
    }

    /// Slots of each expert: `[num_experts]`.
    pub fn counts(&self) -> Vec<usize> {
        (0..self.num_experts)
            .map(|e| self.expert_ids.iter().filter(|&&id| id == e).count())
            .collect()
    }

    /// First position of each expert, and the number of slots: `[num_experts + 1]`.
    pub fn offsets(&self) -> Vec<usize> {
        (0..=self.num_experts)
            .map(|e| self.expert_ids.iter().filter(|&&id| id < e).count())
            .collect()
    }

    /// Slot at each position: `[tokens · top_k]`.
    pub fn slots(&self) -> Vec<usize> {
        let mut slots = Vec::with_capacity(self.num_slots());
        for e in 0..self.num_experts {
            slots.extend((0..self.num_slots()).filter(|&s| self.expert_ids[s] == e));
        }
        slots
    }

    /// Position of each slot: how many slots sort before it.
    pub fn positions(&self) -> Vec<usize> {
        let ids = &self.expert_ids;
        (0..ids.len())
            .map(|s| {
                (0..ids.len())
                    .filter(|&other| (ids[other], other) < (ids[s], s))
                    .count()
            })
            .collect()
    }

    /// Row that each slot reads or writes in a matrix of this order.
    pub fn rows(&self, order: RowOrder) -> Vec<usize> {
        match order {
            RowOrder::Token => (0..self.num_slots()).map(|s| s / self.top_k).collect(),
            RowOrder::Slot => (0..self.num_slots()).collect(),
            RowOrder::Expert => self.positions(),
        }
    }

    /// Number of rows of a matrix in this order.
    pub fn num_rows(&self, order: RowOrder) -> usize {
        if order == RowOrder::Token {
            self.tokens
        } else {
            self.num_slots()
        }
    }
}

/// Softmax of each row of `logits`, `[tokens, num_experts]`.
pub fn softmax(logits: &[f64], num_experts: usize) -> Vec<f64> {
    let mut probs = Vec::with_capacity(logits.len());
    for row in logits.chunks(num_experts) {
        let largest = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let total: f64 = row.iter().map(|l| (l - largest).exp()).sum();
        probs.extend(row.iter().map(|l| (l - largest).exp() / total));
    }
    probs
}

/// Top-k softmax gating.
#[derive(Debug, Clone)]
pub struct Gating {
    /// Softmax of the logits: `[tokens, num_experts]`.
    pub probs: Vec<f64>,
    /// Weight of each choice: `[tokens, top_k]`.
    pub weights: Vec<f64>,
    /// Chosen experts: `[tokens, top_k]`.
    pub expert_ids: Vec<usize>,
}

/// Softmax and the `top_k` largest of it, of equal logits the lower id first.
///
/// With `normalize` a token's weights are divided by their sum; it is at least
/// `top_k / num_experts`, so no lower bound is needed here.
pub fn topk_gating(logits: &[f64], num_experts: usize, top_k: usize, normalize: bool) -> Gating {
    let probs = softmax(logits, num_experts);
    let mut weights = Vec::new();
    let mut expert_ids = Vec::new();
    for (row, probs) in logits.chunks(num_experts).zip(probs.chunks(num_experts)) {
        let mut taken = vec![false; num_experts];
        let start = weights.len();
        for _ in 0..top_k {
            let mut best = None;
            for e in 0..num_experts {
                if !taken[e] && best.is_none_or(|b: usize| row[e] > row[b]) {
                    best = Some(e);
                }
            }
            let best = best.expect("top_k is at most num_experts");
            taken[best] = true;
            expert_ids.push(best);
            weights.push(probs[best]);
        }
        if normalize {
            let total: f64 = weights[start..].iter().sum();
            weights[start..].iter_mut().for_each(|w| *w /= total);
        }
    }
    Gating {
        probs,
        weights,
        expert_ids,
    }
}

/// Gradient of the logits, `[tokens, num_experts]`, from those of the probabilities and of the
/// weights, by the full Jacobians.
pub fn gating_backward(
    gating: &Gating,
    num_experts: usize,
    normalize: bool,
    grad_probs: &[f64],
    grad_weights: &[f64],
) -> Vec<f64> {
    let tokens = gating.probs.len() / num_experts;
    let top_k = gating.weights.len().checked_div(tokens).unwrap_or(0);
    let mut grad_logits = vec![0.0; gating.probs.len()];
    for t in 0..tokens {
        let p = &gating.probs[t * num_experts..(t + 1) * num_experts];
        let ids = &gating.expert_ids[t * top_k..(t + 1) * top_k];
        let chosen: f64 = ids.iter().map(|&e| p[e]).sum();
        let mut grad_p = grad_probs[t * num_experts..(t + 1) * num_experts].to_vec();
        for (j, &ej) in ids.iter().enumerate() {
            for (i, &ei) in ids.iter().enumerate() {
                // w_i = p_i, or p_i / Σ p: derivative with respect to p_j.
                let same = if i == j { 1.0 } else { 0.0 };
                let slope = if normalize {
                    same / chosen - p[ei] / (chosen * chosen)
                } else {
                    same
                };
                grad_p[ej] += grad_weights[t * top_k + i] * slope;
            }
        }
        for a in 0..num_experts {
            for b in 0..num_experts {
                let same = if a == b { 1.0 } else { 0.0 };
                grad_logits[t * num_experts + a] += grad_p[b] * p[b] * (same - p[a]);
            }
        }
    }
    grad_logits
}
