//! Multi-head self-attention inside windows.

use burn::module::Module;
use burn::tensor::activation::softmax;
use burn::tensor::backend::Backend;
use burn::tensor::{Tensor, TensorData};
use hexa_ops::{ExpertOps, MatmulPrecision, matmul, matmul_to_f32};

use super::error::Result;
use super::geometry::{BlockGeometry, WindowLayout};
use super::layers::{Linear, LinearOptions};
use super::position_bias::{CpbMlp, PairExpansion};
use super::window;

/// `softmax(q kᵀ / √head_dim + bias + mask) v`, per window and head, on the shifted grid.
#[derive(Module, Debug)]
pub struct WindowAttention<B: Backend> {
    /// `[dim, 3 · dim]`: queries, keys, values, each by head.
    pub qkv: Linear<B>,
    /// `[dim, dim]`.
    pub proj: Linear<B>,
    /// The position bias.
    pub cpb_mlp: CpbMlp<B>,
    pairs: PairExpansion<B>,
    /// `[windows, n, n]`, if the grid is shifted.
    mask: Option<Tensor<B, 3>>,
    num_heads: usize,
    #[module(skip)]
    layout: WindowLayout,
    #[module(skip)]
    precision: MatmulPrecision,
}

impl<B: ExpertOps> WindowAttention<B> {
    /// The attention of one block.
    pub fn new(
        block: &BlockGeometry,
        init_std: f64,
        precision: MatmulPrecision,
        device: &B::Device,
    ) -> Self {
        let options = LinearOptions {
            bias: true,
            init_std,
            precision,
        };
        let layout = block.layout;
        let n = layout.window_tokens();
        let mask = window::attention_mask(layout).map(|mask| {
            Tensor::from_data(TensorData::new(mask, [layout.num_windows(), n, n]), device)
        });
        Self {
            qkv: Linear::new(block.dim, 3 * block.dim, options, device),
            proj: Linear::new(block.dim, block.dim, options, device),
            // A bias of some hundred numbers, which half precision would round for no gain.
            cpb_mlp: CpbMlp::new(
                block.num_heads,
                init_std,
                precision.of_f32_products(),
                device,
            ),
            pairs: PairExpansion::new(block, precision.of_f32_products(), device),
            mask,
            num_heads: block.num_heads,
            layout,
            precision,
        }
    }

    /// In mixed precision, scores, bias and softmax are in the type of `x`; the result is of
    /// [`Linear::forward`]'s.
    ///
    /// # Shapes
    /// `x` and result: `[batch · grid · grid, dim]`, by sample, row, column
    ///
    /// # Errors
    /// If the number of channels is another.
    pub fn forward(&self, x: Tensor<B, 2>) -> Result<Tensor<B, 2>> {
        let [tokens, dim] = x.dims();
        let n = self.layout.window_tokens();
        let windows = tokens / n;
        let (heads, head_dim) = (self.num_heads, dim / self.num_heads);

        let dtype = self.precision.operand_dtype(x.dtype());
        let x = x.cast(dtype);
        let x = window::partition(x, self.layout);
        let qkv = self
            .qkv
            .forward(x)?
            .reshape([windows, n, 3, heads, head_dim])
            .permute([2, 0, 3, 1, 4])
            .reshape([3, windows * heads, n, head_dim]);
        let part = |i| {
            qkv.clone()
                .narrow(0, i, 1)
                .reshape([windows * heads, n, head_dim])
        };
        let query = part(0).mul_scalar((head_dim as f64).powf(-0.5));
        let scores = matmul_to_f32(query, part(1).swap_dims(1, 2), self.precision)?;
        let weights = softmax(self.add_bias(scores, windows)?, 2);
        let x = matmul(weights, part(2), self.precision)?
            .reshape([windows, heads, n, head_dim])
            .permute([0, 2, 1, 3])
            .reshape([tokens, dim]);
        Ok(window::reverse(self.proj.forward(x)?, self.layout))
    }

    /// Adds the position bias and the mask to `[windows · heads, n, n]`.
    fn add_bias(&self, scores: Tensor<B, 3>, windows: usize) -> Result<Tensor<B, 3>> {
        let n = self.layout.window_tokens();
        let (heads, per_image) = (self.num_heads, self.layout.num_windows());
        let bias = self.pairs.bias(&self.cpb_mlp)?;
        let biased =
            match &self.mask {
                // Summed first: both are far smaller than the scores of a whole batch.
                Some(mask) => {
                    let bias = bias.reshape([1, 1, heads, n, n])
                        + mask.clone().reshape([1, per_image, 1, n, n]);
                    (scores.reshape([windows / per_image, per_image, heads, n, n]) + bias)
                        .reshape([windows * heads, n, n])
                }
                None => (scores.reshape([windows, heads, n, n]) + bias.unsqueeze()).reshape([
                    windows * heads,
                    n,
                    n,
                ]),
            };
        Ok(biased)
    }
}
