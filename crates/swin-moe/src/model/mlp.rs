//! The dense MLP of blocks without experts.

use burn::module::Module;
use burn::tensor::Tensor;
use burn::tensor::backend::Backend;
use hexa_ops::{ExpertOps, MatmulPrecision, gelu};

use super::error::Result;
use super::geometry::BlockGeometry;
use super::layers::{Linear, LinearOptions};

/// `gelu(x · W1 + b1) · W2 + b2`.
#[derive(Module, Debug)]
pub struct Mlp<B: Backend> {
    /// `[dim, hidden]`.
    pub fc1: Linear<B>,
    /// `[hidden, dim]`.
    pub fc2: Linear<B>,
}

impl<B: ExpertOps> Mlp<B> {
    /// The MLP of one block.
    pub fn new(
        block: &BlockGeometry,
        fc2_bias: bool,
        init_std: f64,
        precision: MatmulPrecision,
        device: &B::Device,
    ) -> Self {
        let options = |bias| LinearOptions {
            bias,
            init_std,
            precision,
        };
        Self {
            fc1: Linear::new(block.dim, block.hidden, options(true), device),
            fc2: Linear::new(block.hidden, block.dim, options(fc2_bias), device),
        }
    }

    /// # Shapes
    /// `x` and result: `[tokens, dim]`, the result of [`Linear::forward`]'s type
    ///
    /// # Errors
    /// If the number of channels is another.
    pub fn forward(&self, x: Tensor<B, 2>) -> Result<Tensor<B, 2>> {
        self.fc2.forward(gelu(self.fc1.forward(x)?)?)
    }
}
