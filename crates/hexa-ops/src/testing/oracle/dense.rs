//! Batched dense matrix products.

/// `c[b] = lhs[b] · rhs[b]`.
#[derive(Debug, Clone, Copy)]
pub struct Matmul<'a> {
    /// Left operand: `[batches, m, k]`.
    pub lhs: &'a [f64],
    /// Right operand: `[batches, k, n]`.
    pub rhs: &'a [f64],
    /// Number of independent products.
    pub batches: usize,
    /// Rows of the result.
    pub m: usize,
    /// Length of the sums.
    pub k: usize,
    /// Columns of the result.
    pub n: usize,
}

/// Gradients of [`Matmul`], shaped as its operands.
#[derive(Debug, Clone)]
pub struct MatmulGrads {
    /// Gradient of the left operand.
    pub lhs: Vec<f64>,
    /// Gradient of the right operand.
    pub rhs: Vec<f64>,
}

impl Matmul<'_> {
    /// The product: `[batches, m, n]`.
    pub fn forward(&self) -> Vec<f64> {
        let mut out = vec![0.0; self.batches * self.m * self.n];
        self.each_product(|lhs, rhs, c| out[c] += self.lhs[lhs] * self.rhs[rhs]);
        out
    }

    /// Gradients from that of the result.
    pub fn backward(&self, grad: &[f64]) -> MatmulGrads {
        let mut grads = MatmulGrads {
            lhs: vec![0.0; self.lhs.len()],
            rhs: vec![0.0; self.rhs.len()],
        };
        self.each_product(|lhs, rhs, c| {
            grads.lhs[lhs] += grad[c] * self.rhs[rhs];
            grads.rhs[rhs] += grad[c] * self.lhs[lhs];
        });
        grads
    }

    /// Calls `f` with the places of both factors and of the sum, for every product there is.
    fn each_product(&self, mut f: impl FnMut(usize, usize, usize)) {
        for b in 0..self.batches {
            for i in 0..self.m {
                for j in 0..self.n {
                    for l in 0..self.k {
                        f(
                            (b * self.m + i) * self.k + l,
                            (b * self.k + l) * self.n + j,
                            (b * self.m + i) * self.n + j,
                        );
                    }
                }
            }
        }
    }
}
