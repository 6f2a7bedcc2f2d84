//! What is trained: Mixture-of-Experts layers, each behind a dense block, with residuals.

use std::fmt;
use std::str::FromStr;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use burn::backend::Autodiff;
use burn::module::Module;
use burn::nn::{Linear, LinearConfig};
use burn::tensor::backend::Backend;
use burn::tensor::{Distribution, Tensor};
use hexa_moe::parallel::fleet::{FfnShape, LayerShape, MeasuredStep, Workload};
use hexa_moe::parallel::{
    BackwardEnd, ParallelContext, ParallelPlan, broadcast_parameters, parallelize,
};
use hexa_moe::{ExpertOps, Moe, MoeConfig, backends::Cpu};
use serde::Serialize;

/// Ranks compute on the processor.
pub type B = Autodiff<Cpu>;

/// A sample is an 8 × 8 image, as far as shares of a batch go.
pub const TOKENS_PER_SAMPLE: usize = 64;

/// Shape of a net.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct NetShape {
    /// Width of a token.
    pub d_model: usize,
    /// Hidden width of an expert.
    pub d_ff: usize,
    /// Experts of each layer.
    pub num_experts: usize,
    /// Choices per token.
    pub top_k: usize,
    /// Layers.
    pub layers: usize,
}

impl NetShape {
    /// Two shapes whose modes break even at different numbers of tokens.
    pub fn defaults() -> [Self; 2] {
        let of = |num_experts, d_ff| Self {
            d_model: 256,
            d_ff,
            num_experts,
            top_k: 1,
            layers: 2,
        };
        [of(4, 1024), of(8, 768)]
    }

    /// The net and a batch of `tokens` as planning sees them.
    pub fn workload(self, tokens: usize) -> Result<Workload> {
        let layer = LayerShape {
            ffn: FfnShape::of(&self.moe()),
            tokens_per_sample: TOKENS_PER_SAMPLE,
        };
        let all = Net::<B>::new(self)?.num_params() as u64;
        let sliced = self.layers as u64 * layer.ffn.params(self.d_ff);
        Ok(Workload {
            layers: vec![layer; self.layers],
            batch: tokens / TOKENS_PER_SAMPLE,
            replicated_params: all - sliced,
            activation_bytes_per_sample: (4 * TOKENS_PER_SAMPLE * self.layers * 8 * self.d_model)
                as u64,
        })
    }

    fn moe(self) -> MoeConfig {
        MoeConfig::new(self.d_model, self.d_ff, self.num_experts).with_top_k(self.top_k)
    }
}

impl fmt::Display for NetShape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{},{},{},{},{}",
            self.d_model, self.d_ff, self.num_experts, self.top_k, self.layers
        )
    }
}

impl FromStr for NetShape {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let wanted =
            || anyhow!("a shape is d_model,d_ff,num_experts,top_k,layers, all of them >= 1");
        let numbers: Vec<usize> = text
            .split(',')
            .map(|part| part.trim().parse().ok().filter(|&n| n >= 1))
            .collect::<Option<_>>()
            .ok_or_else(wanted)?;
        let [d_model, d_ff, num_experts, top_k, layers] =
            numbers.try_into().map_err(|_| wanted())?;
        let shape = Self {
            d_model,
            d_ff,
            num_experts,
            top_k,
            layers,
        };
        shape.moe().validate()?;
        Ok(shape)
    }
}

/// A dense block, which stands for attention, and a Mixture-of-Experts layer behind it.
#[derive(Module, Debug)]
pub struct Block<B: Backend> {
    up: Linear<B>,
    down: Linear<B>,
    moe: Moe<B>,
}

/// The net.
#[derive(Module, Debug)]
pub struct Net<B: Backend> {
    blocks: Vec<Block<B>>,
}

impl<B: ExpertOps> Net<B> {
    /// A net on one device.
    pub fn new(shape: NetShape) -> Result<Self> {
        let device = B::Device::default();
        let width = shape.d_model;
        let block = |_| {
            Ok(Block {
                up: LinearConfig::new(width, 2 * width).init(&device),
                down: LinearConfig::new(2 * width, width).init(&device),
                moe: shape.moe().init(&device)?,
            })
        };
        Ok(Self {
            blocks: (0..shape.layers).map(block).collect::<Result<_>>()?,
        })
    }

    /// This rank's part of a net that all ranks make together.
    pub fn distributed(
        shape: NetShape,
        context: &ParallelContext,
        plan: &ParallelPlan,
    ) -> Result<Self> {
        let mut net = broadcast_parameters::<B, _>(context, Self::new(shape)?)?;
        for (i, (block, layer)) in net.blocks.iter_mut().zip(&plan.layers).enumerate() {
            let moe = block.moe.clone();
            block.moe = parallelize(moe, context, i, layer.mode, layer.widths.clone())?;
        }
        Ok(net)
    }

    /// Output and auxiliary loss. With `early`, each layer's gather starts in front of the dense
    /// block.
    pub fn forward(
        &self,
        mut x: Tensor<B, 2>,
        early: bool,
    ) -> Result<(Tensor<B, 2>, Tensor<B, 1>)> {
        let mut aux_loss = Tensor::zeros([1], &x.device());
        for block in &self.blocks {
            if early {
                block.moe.prefetch()?;
            }
            let dense = hexa_ops::gelu(block.up.forward(x.clone()))?;
            x = x + block.down.forward(dense);
            let out = block.moe.try_forward(x.clone())?;
            x = x + out.output;
            aux_loss = aux_loss + out.aux_loss;
        }
        Ok((x, aux_loss))
    }
}

/// Tokens of some samples, with a gradient, as if further layers came before.
pub fn tokens(samples: usize, d_model: usize) -> Tensor<B, 2> {
    let shape = [samples * TOKENS_PER_SAMPLE, d_model];
    Tensor::random(shape, Distribution::Normal(0.0, 1.0), &Default::default()).require_grad()
}

/// Hidden units of the experts where all else is measured.
const NARROW: usize = 8;

/// The net with narrow experts on one rank, for calibration.
pub struct OneRank {
    net: Net<B>,
    d_model: usize,
    x: Option<Tensor<B, 2>>,
}

impl OneRank {
    /// A net of its own.
    pub fn new(shape: NetShape) -> Result<Self> {
        Ok(Self {
            net: Net::new(NetShape {
                d_ff: NARROW,
                ..shape
            })?,
            d_model: shape.d_model,
            x: None,
        })
    }
}

impl MeasuredStep for OneRank {
    fn expert_units(&self) -> usize {
        NARROW
    }

    fn forward_backward(&mut self, samples: usize) -> Result<Duration, String> {
        let x = match self.x.take() {
            Some(x) if x.dims()[0] == samples * TOKENS_PER_SAMPLE => x,
            _ => tokens(samples, self.d_model),
        };
        self.x = Some(x.clone());
        let (start, end) = (Instant::now(), BackwardEnd::default());
        let x = end.mark(x).map_err(|e| e.to_string())?;
        let (y, aux_loss) = self.net.forward(x, false).map_err(|e| e.to_string())?;
        drop((y.mean() + aux_loss).backward());
        Ok(end.since(start))
    }

    fn update(&mut self) -> Result<(u64, Duration), String> {
        // These measurements train nothing.
        Ok((0, Duration::ZERO))
    }
}
