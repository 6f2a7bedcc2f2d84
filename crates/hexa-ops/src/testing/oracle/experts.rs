//! ESMM, ESTMM, ESS and the combination over a token's choices.

use super::Routing;
use crate::types::RowOrder;

/// `y_i = x_i · W[R(i)] + b[R(i)]`.
#[derive(Debug, Clone, Copy)]
pub struct Esmm<'a> {
    /// The routing.
    pub routing: &'a Routing,
    /// Left operand, in `x_order`: `[rows, width_in]`.
    pub x: &'a [f64],
    /// Order of the rows of `x`.
    pub x_order: RowOrder,
    /// Weights: `[num_experts, width_in, width_out]`, the last two swapped if `transposed`.
    pub w: &'a [f64],
    /// Whether each expert's matrix is stored transposed.
    pub transposed: bool,
    /// Bias: `[num_experts, width_out]`.
    pub bias: Option<&'a [f64]>,
    /// Order of the rows of the result.
    pub out_order: RowOrder,
    /// Columns of `x`.
    pub width_in: usize,
    /// Columns of the result.
    pub width_out: usize,
}

/// Gradients of [`Esmm`], shaped as its inputs.
#[derive(Debug, Clone)]
pub struct EsmmGrads {
    /// Gradient of the left operand.
    pub x: Vec<f64>,
    /// Gradient of the weights, as they are stored.
    pub w: Vec<f64>,
    /// Gradient of the bias, whether or not there is one.
    pub bias: Vec<f64>,
}

impl Esmm<'_> {
    fn weight_at(&self, expert: usize, i: usize, o: usize) -> usize {
        let within = if self.transposed {
            o * self.width_in + i
        } else {
            i * self.width_out + o
        };
        expert * self.width_in * self.width_out + within
    }

    /// The product: `[slots, width_out]`.
    pub fn forward(&self) -> Vec<f64> {
        let (x_rows, y_rows) = (
            self.routing.rows(self.x_order),
            self.routing.rows(self.out_order),
        );
        let mut y = vec![0.0; self.routing.num_slots() * self.width_out];
        for (s, &expert) in self.routing.expert_ids.iter().enumerate() {
            for o in 0..self.width_out {
                let mut sum = self.bias.map_or(0.0, |b| b[expert * self.width_out + o]);
                for i in 0..self.width_in {
                    sum += self.x[x_rows[s] * self.width_in + i]
                        * self.w[self.weight_at(expert, i, o)];
                }
                y[y_rows[s] * self.width_out + o] = sum;
            }
        }
        y
    }

    /// Gradients from that of the result.
    pub fn backward(&self, grad: &[f64]) -> EsmmGrads {
        let (x_rows, y_rows) = (
            self.routing.rows(self.x_order),
            self.routing.rows(self.out_order),
        );
        let mut grads = EsmmGrads {
            x: vec![0.0; self.x.len()],
            w: vec![0.0; self.w.len()],
            bias: vec![0.0; self.routing.num_experts * self.width_out],
        };
        for (s, &expert) in self.routing.expert_ids.iter().enumerate() {
            for o in 0..self.width_out {
                let g = grad[y_rows[s] * self.width_out + o];
                grads.bias[expert * self.width_out + o] += g;
                for i in 0..self.width_in {
                    let (x_at, w_at) =
                        (x_rows[s] * self.width_in + i, self.weight_at(expert, i, o));
                    grads.x[x_at] += g * self.w[w_at];
                    grads.w[w_at] += g * self.x[x_at];
                }
            }
        }
        grads
    }
}

/// `M_e = Σ_{R(i)=e} a_iᵀ b_i`.
#[derive(Debug, Clone, Copy)]
pub struct Estmm<'a> {
    /// The routing.
    pub routing: &'a Routing,
    /// Left operand: `[rows, width_a]`.
    pub a: &'a [f64],
    /// Order of the rows of `a`.
    pub a_order: RowOrder,
    /// Right operand: `[rows, width_b]`.
    pub b: &'a [f64],
    /// Order of the rows of `b`.
    pub b_order: RowOrder,
    /// Columns of `a`.
    pub width_a: usize,
    /// Columns of `b`.
    pub width_b: usize,
}

impl Estmm<'_> {
    /// The products: `[num_experts, width_a, width_b]`.
    pub fn forward(&self) -> Vec<f64> {
        let mut m = vec![0.0; self.routing.num_experts * self.width_a * self.width_b];
        self.each_product(|a, b, at| m[at] += self.a[a] * self.b[b]);
        m
    }

    /// Gradients of `a` and `b` from that of the result.
    pub fn backward(&self, grad: &[f64]) -> (Vec<f64>, Vec<f64>) {
        let (mut grad_a, mut grad_b) = (vec![0.0; self.a.len()], vec![0.0; self.b.len()]);
        self.each_product(|a, b, at| {
            grad_a[a] += grad[at] * self.b[b];
            grad_b[b] += grad[at] * self.a[a];
        });
        (grad_a, grad_b)
    }

    fn each_product(&self, mut f: impl FnMut(usize, usize, usize)) {
        let (a_rows, b_rows) = (
            self.routing.rows(self.a_order),
            self.routing.rows(self.b_order),
        );
        for (s, &expert) in self.routing.expert_ids.iter().enumerate() {
            for i in 0..self.width_a {
                for j in 0..self.width_b {
                    f(
                        a_rows[s] * self.width_a + i,
                        b_rows[s] * self.width_b + j,
                        (expert * self.width_a + i) * self.width_b + j,
                    );
                }
            }
        }
    }
}

/// `s_e = Σ_{R(i)=e} g_i x_i`.
#[derive(Debug, Clone, Copy)]
pub struct Ess<'a> {
    /// The routing.
    pub routing: &'a Routing,
    /// What is summed: `[rows, width]`.
    pub x: &'a [f64],
    /// Order of the rows of `x`.
    pub x_order: RowOrder,
    /// Weight of each slot, `[tokens, top_k]`; one if absent.
    pub gates: Option<&'a [f64]>,
    /// Columns of `x`.
    pub width: usize,
}

impl Ess<'_> {
    /// The sums: `[num_experts, width]`.
    pub fn forward(&self) -> Vec<f64> {
        let rows = self.routing.rows(self.x_order);
        let mut sums = vec![0.0; self.routing.num_experts * self.width];
        for (s, &expert) in self.routing.expert_ids.iter().enumerate() {
            for j in 0..self.width {
                sums[expert * self.width + j] +=
                    self.gates.map_or(1.0, |g| g[s]) * self.x[rows[s] * self.width + j];
            }
        }
        sums
    }

    /// Gradient of `x` from that of the sums.
    pub fn backward(&self, grad: &[f64]) -> Vec<f64> {
        let rows = self.routing.rows(self.x_order);
        let mut grad_x = vec![0.0; self.x.len()];
        for (s, &expert) in self.routing.expert_ids.iter().enumerate() {
            for j in 0..self.width {
                grad_x[rows[s] * self.width + j] +=
                    self.gates.map_or(1.0, |g| g[s]) * grad[expert * self.width + j];
            }
        }
        grad_x
    }
}

/// `out_t = Σ_j g_tj · y_tj`.
#[derive(Debug, Clone, Copy)]
pub struct Combine<'a> {
    /// The routing.
    pub routing: &'a Routing,
    /// What is combined: `[slots, width]`.
    pub y: &'a [f64],
    /// Order of the rows of `y`.
    pub y_order: RowOrder,
    /// Gate weights, `[tokens, top_k]`; one if absent.
    pub gates: Option<&'a [f64]>,
    /// Columns of `y`.
    pub width: usize,
}

impl Combine<'_> {
    /// The weighted sums: `[tokens, width]`.
    pub fn forward(&self) -> Vec<f64> {
        let rows = self.routing.rows(self.y_order);
        let mut out = vec![0.0; self.routing.tokens * self.width];
        for s in 0..self.routing.num_slots() {
            for j in 0..self.width {
                out[s / self.routing.top_k * self.width + j] +=
                    self.gates.map_or(1.0, |g| g[s]) * self.y[rows[s] * self.width + j];
            }
        }
        out
    }
}
