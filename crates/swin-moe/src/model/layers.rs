//! The two layers that everything else is made of: linear and layer norm.

use burn::module::{Module, Param};
use burn::tensor::backend::Backend;
use burn::tensor::{Distribution, Tensor, TensorPrimitive};
use hexa_ops::{ExpertOps, MatmulPrecision, linear};

use super::error::Result;

/// `x · W + b`.
#[derive(Module, Debug)]
pub struct Linear<B: Backend> {
    /// `[in, out]`.
    pub weight: Param<Tensor<B, 2>>,
    /// `[out]`.
    pub bias: Option<Param<Tensor<B, 1>>>,
    #[module(skip)]
    precision: MatmulPrecision,
}

/// How a linear layer is built.
#[derive(Debug, Clone, Copy)]
pub struct LinearOptions {
    /// Whether it has a bias, initially zero.
    pub bias: bool,
    /// Standard deviation of the initial weights.
    pub init_std: f64,
    /// Arithmetic of the product.
    pub precision: MatmulPrecision,
}

impl<B: ExpertOps> Linear<B> {
    /// Weights from a normal distribution. The published model truncates it at ±2, which is a
    /// hundred standard deviations and more away, so nothing is cut off here.
    pub fn new(d_in: usize, d_out: usize, options: LinearOptions, device: &B::Device) -> Self {
        let weight = Tensor::random(
            [d_in, d_out],
            Distribution::Normal(0.0, options.init_std),
            device,
        );
        Self {
            weight: Param::from_tensor(weight),
            bias: options
                .bias
                .then(|| Param::from_tensor(Tensor::zeros([d_out], device))),
            precision: options.precision,
        }
    }

    /// As PyTorch initialises a convolution: uniform within `±1/√fan_in`, the bias too.
    pub fn new_uniform(
        d_in: usize,
        d_out: usize,
        precision: MatmulPrecision,
        device: &B::Device,
    ) -> Self {
        let bound = 1.0 / (d_in as f64).sqrt();
        let uniform = Distribution::Uniform(-bound, bound);
        Self {
            weight: Param::from_tensor(Tensor::random([d_in, d_out], uniform, device)),
            bias: Some(Param::from_tensor(Tensor::random([d_out], uniform, device))),
            precision,
        }
    }

    /// The result is of the type that the product's operands were rounded to, which is that of `x`
    /// but in mixed precision.
    ///
    /// # Shapes
    /// - `x`: `[rows, in]`
    /// - result: `[rows, out]`
    ///
    /// # Errors
    /// If the widths differ.
    pub fn forward(&self, x: Tensor<B, 2>) -> Result<Tensor<B, 2>> {
        let bias = self.bias.as_ref().map(|bias| bias.val());
        Ok(linear(x, self.weight.val(), bias, self.precision)?)
    }
}

/// `(x − mean) / √(var + 1e-5) · w + b` over the channels, the variance biased.
#[derive(Module, Debug)]
pub struct LayerNorm<B: Backend> {
    /// `[channels]`.
    pub weight: Param<Tensor<B, 1>>,
    /// `[channels]`.
    pub bias: Param<Tensor<B, 1>>,
}

/// PyTorch's default.
const EPSILON: f64 = 1e-5;

impl<B: Backend> LayerNorm<B> {
    /// Weight one, bias zero.
    pub fn new(channels: usize, device: &B::Device) -> Self {
        Self {
            weight: Param::from_tensor(Tensor::ones([channels], device)),
            bias: Param::from_tensor(Tensor::zeros([channels], device)),
        }
    }

    /// # Shapes
    /// `x` and result: `[rows, channels]`, of the parameters' type
    pub fn forward(&self, x: Tensor<B, 2>) -> Tensor<B, 2> {
        Tensor::from_primitive(TensorPrimitive::Float(B::layer_norm(
            x.into_primitive().tensor(),
            self.weight.val().into_primitive().tensor(),
            Some(self.bias.val().into_primitive().tensor()),
            EPSILON,
        )))
    }
}
