//! One Swin block: attention and MLP, each with norm before and residual around.

use burn::module::Module;
use burn::tensor::Tensor;
use burn::tensor::backend::Backend;
use hexa_moe::{LoadStats, Moe};
use hexa_ops::ExpertOps;

use super::attention::WindowAttention;
use super::config::SwinMoeConfig;
use super::drop_path::drop_path;
use super::error::Result;
use super::geometry::BlockGeometry;
use super::layers::LayerNorm;
use super::mlp::Mlp;

/// The second half of a block.
#[derive(Module, Debug)]
#[allow(clippy::large_enum_variant)] // A model has dozens of these, not millions.
pub enum FeedForward<B: Backend> {
    /// The same weights for every token.
    Dense(Mlp<B>),
    /// Each token's experts.
    Moe(Moe<B>),
}

/// What a Mixture-of-Experts layer reports besides its output.
#[derive(Debug, Clone)]
pub struct MoeReport<B: Backend> {
    /// Weighted balance loss: `[1]`.
    pub aux_loss: Tensor<B, 1>,
    /// Tokens per expert.
    pub load: LoadStats<B>,
}

/// `x + attn(norm1(x))`, then `x + mlp(norm2(x))`.
#[derive(Module, Debug)]
pub struct SwinBlock<B: Backend> {
    /// Norm before the attention.
    pub norm1: LayerNorm<B>,
    /// Window attention.
    pub attn: WindowAttention<B>,
    /// Norm before the MLP.
    pub norm2: LayerNorm<B>,
    /// The MLP, dense or with experts.
    pub mlp: FeedForward<B>,
    tokens: usize,
    drop_path: f64,
}

impl<B: ExpertOps> SwinBlock<B> {
    /// The block with these sizes.
    ///
    /// # Errors
    /// If the Mixture-of-Experts layer refuses its settings.
    pub fn new(config: &SwinMoeConfig, block: &BlockGeometry, device: &B::Device) -> Result<Self> {
        let (init_std, precision) = (config.init_std, config.precision);
        Ok(Self {
            norm1: LayerNorm::new(block.dim, device),
            attn: WindowAttention::new(block, init_std, precision, device),
            norm2: LayerNorm::new(block.dim, device),
            mlp: if block.is_moe {
                FeedForward::Moe(config.moe_layer(block.dim, block.hidden).init(device)?)
            } else {
                FeedForward::Dense(Mlp::new(
                    block,
                    config.fc2_bias,
                    init_std,
                    precision,
                    device,
                ))
            },
            tokens: block.layout.grid * block.layout.grid,
            drop_path: block.drop_path,
        })
    }

    /// Switches noise, dropout and stochastic depth off for good.
    pub fn without_noise(mut self) -> Self {
        self.drop_path = 0.0;
        if let FeedForward::Moe(moe) = self.mlp {
            self.mlp = FeedForward::Moe(moe.without_noise());
        }
        self
    }

    /// # Shapes
    /// `x` and result: `[batch · grid · grid, dim]`
    ///
    /// # Errors
    /// If the number of channels is another.
    pub fn forward(&self, x: Tensor<B, 2>) -> Result<(Tensor<B, 2>, Option<MoeReport<B>>)> {
        let batch = x.dims()[0] / self.tokens;
        if let FeedForward::Moe(moe) = &self.mlp {
            moe.prefetch()?;
        }
        // Branches may come in half precision; the residual stream stays as it is.
        let dtype = x.dtype();
        let skip = |branch: Tensor<B, 2>| drop_path(branch.cast(dtype), batch, self.drop_path);
        let attended = self.attn.forward(self.norm1.forward(x.clone()))?;
        let x = x + skip(attended);

        let normed = self.norm2.forward(x.clone());
        let (y, report) = match &self.mlp {
            FeedForward::Dense(mlp) => (mlp.forward(normed)?, None),
            FeedForward::Moe(moe) => {
                let out = moe.try_forward(normed)?;
                let report = MoeReport {
                    aux_loss: out.aux_loss,
                    load: out.load,
                };
                (out.output, Some(report))
            }
        };
        Ok((x + skip(y), report))
    }
}
