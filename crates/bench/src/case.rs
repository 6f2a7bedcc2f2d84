//! One measurement: shape, inputs, timing.

use std::fmt;
use std::str::FromStr;
use std::time::Instant;

use anyhow::{Result, anyhow};
use burn::backend::Autodiff;
use burn::tensor::backend::{Backend, BackendTypes};
use burn::tensor::{DType, Distribution, Tensor, TensorData};
use hexa_ops::{
    ExpertIndex, ExpertKernels, ExpertOps, ExpertParams, Favor, FfnOptions, TrainingBackend,
    expert_ffn, topk_gating,
};
use serde::Serialize;

use crate::upstream::with_gradient;

/// Shape of an expert FFN.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Shape {
    /// Tokens of a batch.
    pub tokens: usize,
    /// Width of a token.
    pub d_model: usize,
    /// Hidden width of an expert.
    pub d_ff: usize,
    /// Number of experts.
    pub num_experts: usize,
    /// Choices per token.
    pub top_k: usize,
}

impl Default for Shape {
    /// Stage 3 of Swin-MoE-Small, 1,024 tokens.
    fn default() -> Self {
        Self {
            tokens: 1024,
            d_model: 384,
            d_ff: 1536,
            num_experts: 8,
            top_k: 1,
        }
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{},{},{},{},{}",
            self.tokens, self.d_model, self.d_ff, self.num_experts, self.top_k
        )
    }
}

impl FromStr for Shape {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let wanted = || anyhow!("a shape is tokens,d_model,d_ff,num_experts,top_k, all >= 1");
        let numbers: Vec<usize> = text
            .split(',')
            .map(|part| part.trim().parse().ok().filter(|&n| n >= 1))
            .collect::<Option<_>>()
            .ok_or_else(wanted)?;
        let [tokens, d_model, d_ff, num_experts, top_k] =
            numbers.try_into().map_err(|_| wanted())?;
        Ok(Self {
            tokens,
            d_model,
            d_ff,
            num_experts,
            top_k,
        })
    }
}

impl Shape {
    /// Floating-point operations of the two forward products.
    pub fn forward_flops(self) -> f64 {
        4.0 * (self.tokens * self.top_k) as f64 * self.d_model as f64 * self.d_ff as f64
    }
}

/// Tensors of one case.
pub struct Inputs<B: ExpertOps> {
    /// Tokens: `[tokens, d_model]`.
    pub x: Tensor<B, 2>,
    /// Router logits: `[tokens, num_experts]`.
    pub logits: Tensor<B, 2>,
    /// The experts.
    pub params: ExpertParams<B>,
    favor: Favor,
}

/// What is measured.
#[derive(Debug, Clone, Copy)]
pub struct Setting {
    /// Extents.
    pub shape: Shape,
    /// Type of tokens and weights.
    pub dtype: DType,
    /// Exponent of Zipf's distribution, in proportion to which tokens choose experts; 0: all alike.
    pub skew: f64,
    /// What the layer's kernels choose where they could have either.
    pub favor: Favor,
}

impl<B: TrainingBackend> Inputs<B> {
    /// Normal tokens, weights scaled by their fan-in. The router's logits are such that the choices
    /// are drawn without replacement in proportion to Zipf's distribution.
    pub fn random(setting: Setting, device: &B::Device) -> Self {
        let Setting {
            shape,
            dtype,
            skew,
            favor,
        } = setting;
        let normal = |std: f64| Distribution::Normal(0.0, std);
        let Shape {
            tokens,
            d_model,
            d_ff,
            num_experts,
            ..
        } = shape;
        let fan_in = |n: usize| normal((n as f64).powf(-0.5));
        let matrix = |shape: [usize; 2], distribution| -> Tensor<B, 2> {
            leaf(Tensor::random(shape, distribution, device), dtype)
        };
        let stack = |shape: [usize; 3], distribution| -> Tensor<B, 3> {
            leaf(Tensor::random(shape, distribution, device), dtype)
        };
        Self {
            x: matrix([tokens, d_model], normal(1.0)),
            // The router computes in f32, whatever the tokens are.
            logits: gumbel_logits(tokens, num_experts, skew, device).require_grad(),
            params: ExpertParams {
                w1: stack([num_experts, d_model, d_ff], fan_in(d_model)),
                b1: Some(matrix([num_experts, d_ff], normal(0.1))),
                w2: stack([num_experts, d_ff, d_model], fan_in(d_ff)),
                b2: Some(matrix([num_experts, d_model], normal(0.1))),
            },
            favor,
        }
    }
}

impl<K: ExpertKernels> Inputs<Autodiff<K>> {
    /// The same tensors for passes without a graph.
    fn untracked(&self) -> Inputs<K> {
        let ExpertParams { w1, b1, w2, b2 } = &self.params;
        let inner = |bias: &Option<Tensor<Autodiff<K>, 2>>| bias.clone().map(Tensor::inner);
        Inputs {
            x: self.x.clone().inner(),
            logits: self.logits.clone().inner(),
            params: ExpertParams {
                w1: w1.clone().inner(),
                b1: inner(b1),
                w2: w2.clone().inner(),
                b2: inner(b2),
            },
            favor: self.favor,
        }
    }
}

impl<B: ExpertOps> Inputs<B> {
    /// Routing and expert FFN.
    pub fn forward(&self, top_k: usize) -> Result<Tensor<B, 2>> {
        let gating = topk_gating(self.logits.clone(), top_k, true)?;
        let gates = gating.weights.clone().cast(self.x.dtype());
        self.experts(gates, &ExpertIndex::from_gating(&gating))
    }

    /// The expert FFN of given choices and weights.
    pub fn experts(&self, gates: Tensor<B, 2>, index: &ExpertIndex<B>) -> Result<Tensor<B, 2>> {
        let options = FfnOptions {
            favor: self.favor,
            ..FfnOptions::default()
        };
        let y = expert_ffn(
            self.x.clone(),
            gates,
            self.params.clone(),
            index,
            options,
            None,
        )?;
        Ok(y)
    }
}

/// A tracked tensor of these elements in `dtype`, without the graph of the conversion.
pub fn leaf<B: TrainingBackend, const D: usize>(
    tensor: Tensor<B, D>,
    dtype: DType,
) -> Tensor<B, D> {
    Tensor::from_inner(tensor.inner().cast(dtype)).require_grad()
}

/// `[tokens, num_experts]`: logarithms of the experts' weights plus Gumbel noise, whose largest `k`
/// are a draw without replacement.
pub fn gumbel_logits<B: Backend>(
    tokens: usize,
    num_experts: usize,
    skew: f64,
    device: &B::Device,
) -> Tensor<B, 2> {
    let weights: Vec<f32> = (1..=num_experts)
        .map(|rank| (-skew * (rank as f64).ln()) as f32)
        .collect();
    let weights = Tensor::<B, 1>::from_data(TensorData::from(weights.as_slice()), device);
    let open_interval = Distribution::Uniform(1e-7, 1.0 - 1e-7);
    let uniform = Tensor::<B, 2>::random([tokens, num_experts], open_interval, device);
    uniform.log().neg().log().neg() + weights.unsqueeze()
}

/// Seconds of each repetition, ascending.
#[derive(Debug, Serialize)]
pub struct Timings {
    /// Routing and forward pass, without a graph.
    pub forward_s: Vec<f64>,
    /// Routing, forward and backward pass.
    pub forward_backward_s: Vec<f64>,
    /// Bytes on the device at the peak of the latter, beyond inputs and weights.
    pub extra_bytes: Option<u64>,
}

/// Times a case; the device is synchronised around each repetition, which is [`RUNS`] runs.
pub fn measure<K: ExpertKernels>(
    setting: Setting,
    repetitions: u32,
    device: &<Autodiff<K> as BackendTypes>::Device,
) -> Result<Timings> {
    let Setting { shape, dtype, .. } = setting;
    let inputs = Inputs::<Autodiff<K>>::random(setting, device);
    let normal = Distribution::Normal(0.0, 1.0);
    let upstream =
        Tensor::<K, 2>::random([shape.tokens, shape.d_model], normal, device).cast(dtype);
    // With a graph, Burn would keep what passes have saved until a later backward pass.
    let untracked = inputs.untracked();
    let forward = || untracked.forward(shape.top_k).map(drop);
    let forward_backward = || -> Result<()> {
        let y = inputs.forward(shape.top_k)?;
        drop(with_gradient(y, upstream.clone()).backward());
        Ok(())
    };
    Ok(Timings {
        forward_s: time::<K>(repetitions, device, forward)?,
        forward_backward_s: time::<Autodiff<K>>(repetitions, device, forward_backward)?,
        extra_bytes: extra_bytes(forward_backward)?,
    })
}

/// What `work` takes at its peak, where the device tells.
fn extra_bytes(work: impl Fn() -> Result<()>) -> Result<Option<u64>> {
    #[cfg(feature = "cube")]
    {
        hexa_ops::memory::watch();
        let done = work();
        let seen = hexa_ops::memory::end_watch();
        done.map(|()| seen.map(|seen| seen.most_bytes - seen.least_bytes))
    }
    #[cfg(not(feature = "cube"))]
    {
        drop(work);
        Ok(None)
    }
}

/// Runs in one repetition: a training step does not wait for the device after each layer.
const RUNS: u32 = 8;

/// Seconds of each of the repetitions of `work`, ascending, after two runs that are not counted.
pub fn time<B: Backend>(
    repetitions: u32,
    device: &B::Device,
    work: impl Fn() -> Result<()>,
) -> Result<Vec<f64>> {
    let sync = || B::sync(device).map_err(|error| anyhow!("the device failed: {error:?}"));
    for _ in 0..2 {
        work()?;
    }
    sync()?;
    let mut seconds = Vec::new();
    for _ in 0..repetitions {
        let start = Instant::now();
        for _ in 0..RUNS {
            work()?;
        }
        sync()?;
        seconds.push(start.elapsed().as_secs_f64() / f64::from(RUNS));
    }
    seconds.sort_by(f64::total_cmp);
    Ok(seconds)
}
