//! Between pixels and tokens: patch embedding at the start, patch merging between stages.

use burn::module::Module;
use burn::tensor::Tensor;
use burn::tensor::backend::Backend;
use hexa_ops::{ExpertOps, MatmulPrecision};

use super::config::SwinMoeConfig;
use super::error::Result;
use super::layers::{LayerNorm, Linear, LinearOptions};

/// A convolution whose stride is its kernel's size, as a linear layer on unfolded patches.
#[derive(Module, Debug)]
pub struct PatchEmbed<B: Backend> {
    /// Weight `[in_chans · patch · patch, embed_dim]`, rows in the order channel, row, column.
    pub proj: Linear<B>,
    /// Layer norm of the tokens.
    pub norm: Option<LayerNorm<B>>,
    patch_size: usize,
}

impl<B: ExpertOps> PatchEmbed<B> {
    /// Initialised as PyTorch initialises a convolution, which the published model keeps.
    pub fn new(config: &SwinMoeConfig, device: &B::Device) -> Self {
        let pixels = config.in_chans * config.patch_size * config.patch_size;
        Self {
            proj: Linear::new_uniform(pixels, config.embed_dim, config.precision, device),
            norm: config
                .patch_norm
                .then(|| LayerNorm::new(config.embed_dim, device)),
            patch_size: config.patch_size,
        }
    }

    /// # Shapes
    /// - `images`: `[batch, channels, height, width]`, height and width multiples of the patch
    /// - result: `[batch · height/patch · width/patch, embed_dim]`
    ///
    /// # Errors
    /// If the number of channels is another.
    pub fn forward(&self, images: Tensor<B, 4>) -> Result<Tensor<B, 2>> {
        let [batch, chans, height, width] = images.dims();
        let p = self.patch_size;
        let (rows, cols) = (height / p, width / p);
        let patches = images
            .reshape([batch, chans, rows, p, cols, p])
            .permute([0, 2, 4, 1, 3, 5])
            .reshape([batch * rows * cols, chans * p * p]);
        let dtype = patches.dtype();
        let tokens = self.proj.forward(patches)?.cast(dtype);
        Ok(match &self.norm {
            Some(norm) => norm.forward(tokens),
            None => tokens,
        })
    }
}

/// Four neighbouring tokens become one of twice the channels.
#[derive(Module, Debug)]
pub struct PatchMerging<B: Backend> {
    /// Layer norm over the concatenated channels.
    pub norm: LayerNorm<B>,
    /// `[4 · dim, 2 · dim]`.
    pub reduction: Linear<B>,
    grid: usize,
}

impl<B: ExpertOps> PatchMerging<B> {
    /// For a grid of `grid` by `grid` tokens, `grid` even.
    pub fn new(
        dim: usize,
        grid: usize,
        init_std: f64,
        precision: MatmulPrecision,
        device: &B::Device,
    ) -> Self {
        let options = LinearOptions {
            bias: false,
            init_std,
            precision,
        };
        Self {
            norm: LayerNorm::new(4 * dim, device),
            reduction: Linear::new(4 * dim, 2 * dim, options, device),
            grid,
        }
    }

    /// # Shapes
    /// - `x`: `[batch · grid · grid, dim]`
    /// - result: `[batch · grid/2 · grid/2, 2 · dim]`
    ///
    /// # Errors
    /// If the number of channels is another.
    pub fn forward(&self, x: Tensor<B, 2>) -> Result<Tensor<B, 2>> {
        let [tokens, dim] = x.dims();
        let half = self.grid / 2;
        let batch = tokens / (self.grid * self.grid);
        // The published order of the four tokens is column first: (0,0), (1,0), (0,1), (1,1).
        let merged = x
            .reshape([batch, half, 2, half, 2, dim])
            .permute([0, 1, 3, 4, 2, 5])
            .reshape([batch * half * half, 4 * dim]);
        let dtype = merged.dtype();
        Ok(self
            .reduction
            .forward(self.norm.forward(merged))?
            .cast(dtype))
    }
}
