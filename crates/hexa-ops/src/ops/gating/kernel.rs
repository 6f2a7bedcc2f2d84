//! Device code of the gating.

use cubecl::prelude::*;

/// Softmax and the `top_k` largest probabilities, one unit per token.
#[cube(launch_unchecked, address_type = "dynamic")]
pub fn topk_softmax<F: Float, A: Float, I: Int>(
    logits: &Array<F>,
    probs: &mut Array<F>,
    weights: &mut Array<F>,
    expert_ids: &mut Array<I>,
    tokens: usize,
    num_experts: usize,
    row_stride: usize,
    step: usize,
    top_k: usize,
    epsilon: InputScalar,
    #[comptime] normalize: bool,
    #[define(F, A, I)] _dtypes: [StorageType; 3],
) {
    let token = ABSOLUTE_POS;
    if token >= tokens {
        terminate!();
    }
    let row = token * row_stride;

    let mut largest = sort_key::<A>(A::cast_from(logits[row]));
    for e in 1..num_experts {
        largest = max(largest, sort_key::<A>(A::cast_from(logits[row + e * step])));
    }
    let mut sum = A::new(0.0);
    for e in 0..num_experts {
        sum += (A::cast_from(logits[row + e * step]) - largest).exp();
    }
    for e in 0..num_experts {
        let p = (A::cast_from(logits[row + e * step]) - largest).exp() / sum;
        probs[token * num_experts + e] = F::cast_from(p);
    }

    // Selection without marks: a candidate is what comes after the last choice in the order
    // (logit descending, id ascending). Each round finds one, because `top_k <= num_experts`.
    let mut chosen_sum = A::new(0.0);
    let mut last_key = largest;
    let mut last_id = 0usize;
    for j in 0..top_k {
        let mut best_id = num_experts;
        let mut best_key = largest;
        for e in 0..num_experts {
            let key = sort_key::<A>(A::cast_from(logits[row + e * step]));
            let remains = j == 0 || key < last_key || (key == last_key && e > last_id);
            if remains && (best_id == num_experts || key > best_key) {
                best_id = e;
                best_key = key;
            }
        }
        last_id = min(best_id, num_experts - 1);
        last_key = best_key;
        let p = (A::cast_from(logits[row + last_id * step]) - largest).exp() / sum;
        chosen_sum += p;
        weights[token * top_k + j] = F::cast_from(p);
        expert_ids[token * top_k + j] = I::cast_from(last_id as u32);
    }

    if normalize {
        let divisor = max(chosen_sum, epsilon.get::<A>());
        for j in 0..top_k {
            let id = u32::cast_from(expert_ids[token * top_k + j]) as usize;
            let p = (A::cast_from(logits[row + id * step]) - largest).exp() / sum;
            weights[token * top_k + j] = F::cast_from(p / divisor);
        }
    }
}

/// The logit, or the smallest number for NaN, so that the order is total.
#[cube]
fn sort_key<A: Float>(logit: A) -> A {
    select(bool::cast_from(logit.is_nan()), A::min_value(), logit)
}

/// Gradient of the probabilities from that of the weights, one unit per probability.
#[cube(launch_unchecked, address_type = "dynamic")]
pub fn topk_weights_vjp<F: Float, A: Float, I: Int>(
    probs: &Array<F>,
    expert_ids: &Array<I>,
    grad_weights: &Array<F>,
    grad_probs: &mut Array<F>,
    num_elements: usize,
    num_experts: usize,
    top_k: usize,
    epsilon: InputScalar,
    #[comptime] normalize: bool,
    #[define(F, A, I)] _dtypes: [StorageType; 3],
) {
    if ABSOLUTE_POS >= num_elements {
        terminate!();
    }
    let token = ABSOLUTE_POS / num_experts;
    let expert = ABSOLUTE_POS % num_experts;

    let mut sum = A::new(0.0);
    let mut dot = A::new(0.0);
    let mut direct = A::new(0.0);
    let mut chosen = false;
    for j in 0..top_k {
        let id = expert_ids[token * top_k + j];
        let last = I::cast_from((num_experts - 1) as u32);
        let id = u32::cast_from(max(min(id, last), I::from_int(0))) as usize;
        let grad = A::cast_from(grad_weights[token * top_k + j]);
        if normalize {
            let p = A::cast_from(probs[token * num_experts + id]);
            sum += p;
            dot += grad * p;
        }
        if id == expert {
            direct += grad;
            chosen = true;
        }
    }

    let mut result = direct;
    if normalize {
        // w = p / s with s = max(Σ p, ε); the sum's share vanishes where ε takes its place.
        let floor = epsilon.get::<A>();
        if sum > floor {
            result = (direct - dot / sum) / sum;
        } else {
            result = direct / floor;
        }
    }
    grad_probs[ABSOLUTE_POS] = select(chosen, F::cast_from(result), F::new(0.0));
}

/// `p · (g − Σ g p)`, one unit per token.
#[cube(launch_unchecked, address_type = "dynamic")]
pub fn softmax_vjp<F: Float, A: Float>(
    probs: &Array<F>,
    grad: &Array<F>,
    grad_logits: &mut Array<F>,
    tokens: usize,
    num_experts: usize,
    #[define(F, A)] _dtypes: [StorageType; 2],
) {
    let token = ABSOLUTE_POS;
    if token >= tokens {
        terminate!();
    }
    let row = token * num_experts;
    let mut dot = A::new(0.0);
    for e in 0..num_experts {
        dot += A::cast_from(probs[row + e]) * A::cast_from(grad[row + e]);
    }
    for e in 0..num_experts {
        let p = A::cast_from(probs[row + e]);
        let g = A::cast_from(grad[row + e]);
        grad_logits[row + e] = F::cast_from(p * (g - dot));
    }
}
