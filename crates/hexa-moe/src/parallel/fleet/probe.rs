//! Exchanges of the two modes, timed by the very functions that the layers call.

use std::time::Instant;

use burn::tensor::TensorMetadata;
use burn::tensor::ops::{FloatTensor, IntTensor};
use hexa_ops::ExpertKernels;
use hexa_ops::backend::{FfnExecutor, FfnGrads, FfnInputs, FfnNeeds, FfnWeights};

use super::super::comm::Communicator;
use super::super::context::ExpertParallel;
use super::super::{data_centric, host, model_centric, transfer};
use crate::error::{MoeError, Result};

/// Repetitions of an exchange, as many as fit into this many seconds.
const SECONDS: f64 = 0.1;
const REPETITIONS: core::ops::RangeInclusive<usize> = 3..=15;

/// An expert FFN that computes nothing: it exchanges what a layer would, and keeps the time.
#[derive(Debug, Clone)]
pub struct LinkProbe {
    pub parallel: ExpertParallel,
    pub tokens_per_rank: Vec<usize>,
    pub seconds: std::sync::Arc<std::sync::Mutex<Option<LinkSeconds>>>,
}

/// Seconds of the slowest rank.
#[derive(Debug, Clone, Copy)]
pub struct LinkSeconds {
    pub gather_weights: f64,
    pub reduce_weight_gradients: f64,
    pub gather_tokens: f64,
    pub reduce_tokens: f64,
}

impl FfnExecutor for LinkProbe {
    type Error = MoeError;
    type Saved<B: ExpertKernels> = ();

    fn forward<B: ExpertKernels>(
        &self,
        inputs: FfnInputs<FloatTensor<B>, IntTensor<B>>,
        _differentiate: bool,
    ) -> Result<(FloatTensor<B>, ())> {
        let seconds = LinkSeconds {
            gather_weights: self.gather_weights::<B>(&inputs.weights)?,
            reduce_weight_gradients: self.reduce_weight_gradients::<B>(&inputs.weights)?,
            gather_tokens: self.gather_tokens::<B>(&inputs.x)?,
            reduce_tokens: self.reduce_tokens::<B>(&inputs.x)?,
        };
        if let Ok(mut place) = self.seconds.lock() {
            *place = Some(seconds);
        }
        Ok((inputs.x, ()))
    }

    fn backward<B: ExpertKernels>(
        &self,
        _grad_output: FloatTensor<B>,
        _weights: FfnWeights<FloatTensor<B>>,
        (): (),
        _needs: FfnNeeds,
    ) -> FfnGrads<FloatTensor<B>> {
        no_grads::<B>()
    }
}

fn no_grads<B: ExpertKernels>() -> FfnGrads<FloatTensor<B>> {
    FfnGrads {
        x: None,
        gates: None,
        w1: None,
        b1: None,
        w2: None,
        b2: None,
    }
}

impl LinkProbe {
    fn comm(&self) -> &dyn Communicator {
        self.parallel.context.comm()
    }

    fn gather_weights<B: ExpertKernels>(&self, own: &FfnWeights<FloatTensor<B>>) -> Result<f64> {
        timed(self.comm(), || {
            let pending = data_centric::start_gather::<B>(&self.parallel, own.clone())?;
            let whole = data_centric::finish_gather::<B>(&self.parallel, own, pending)?;
            sync::<B>(&whole.w1)
        })
    }

    fn reduce_weight_gradients<B: ExpertKernels>(
        &self,
        own: &FfnWeights<FloatTensor<B>>,
    ) -> Result<f64> {
        let parallel = &self.parallel;
        let pending = data_centric::start_gather::<B>(parallel, own.clone())?;
        let whole = data_centric::finish_gather::<B>(parallel, own, pending)?;
        let grads = FfnGrads {
            w1: Some(whole.w1),
            b1: whole.b1,
            w2: Some(whole.w2),
            ..no_grads::<B>()
        };
        let needs = FfnNeeds {
            x: false,
            gates: false,
            w1: true,
            b1: own.b1.is_some(),
            w2: true,
            b2: false,
        };
        timed(self.comm(), || {
            let pending = data_centric::start_reduction::<B>(parallel, Some(&grads))?;
            let mut slices = no_grads::<B>();
            data_centric::finish_reduction::<B>(parallel, pending, &mut slices, own, needs)?;
            slices.w1.as_ref().map_or(Ok(()), sync::<B>)
        })
    }

    fn gather_tokens<B: ExpertKernels>(&self, x: &FloatTensor<B>) -> Result<f64> {
        let [counts, shape] = self.token_counts();
        let (dtype, device) = (x.dtype(), B::float_device(x));
        timed(self.comm(), || {
            let (own, counts) = (x.clone(), counts.clone());
            let pending = model_centric::start_gather::<B>(&self.parallel, "tokens", own, counts)?;
            let all = transfer::finish::<B>(pending, [shape[0], shape[1]], dtype, &device)?;
            sync::<B>(&all)
        })
    }

    fn reduce_tokens<B: ExpertKernels>(&self, x: &FloatTensor<B>) -> Result<f64> {
        let [counts, shape] = self.token_counts();
        let (dtype, device) = (x.dtype(), B::float_device(x));
        let all = vec![1.0; shape[0] * shape[1]];
        let partial = host::write::<B>(all, [shape[0], shape[1]], dtype, &device);
        timed(self.comm(), || {
            let (addend, counts) = (Some(partial.clone()), counts.clone());
            let pending =
                model_centric::start_reduction::<B>(&self.parallel, "outputs", addend, counts)?;
            sync::<B>(&transfer::finish::<B>(pending, x.shape(), dtype, &device)?)
        })
    }

    /// Elements of each rank's tokens, and the shape of all of them.
    fn token_counts(&self) -> [Vec<usize>; 2] {
        let d_model = self.parallel.shards.d_model;
        let counts = self.tokens_per_rank.iter().map(|tokens| tokens * d_model);
        [
            counts.collect(),
            vec![self.tokens_per_rank.iter().sum(), d_model],
        ]
    }
}

/// Waits until a tensor is there.
fn sync<B: ExpertKernels>(tensor: &FloatTensor<B>) -> Result<()> {
    B::sync(&B::float_device(tensor)).map_err(|error| {
        MoeError::Ops(hexa_ops::OpsError::Device {
            tensor: "an exchange",
            reason: format!("{error:?}"),
        })
    })
}

/// Median seconds of `exchange` after a warm-up, of the slowest rank; all ranks begin together.
pub fn timed(comm: &dyn Communicator, mut exchange: impl FnMut() -> Result<()>) -> Result<f64> {
    let start = Instant::now();
    exchange()?;
    let first = slowest(comm, start.elapsed().as_secs_f64())?;
    // The same number on all ranks, as they have the same `first`.
    let repetitions = (SECONDS / first.max(1e-9)) as usize;
    let repetitions = repetitions.clamp(*REPETITIONS.start(), *REPETITIONS.end());
    let mut seconds = Vec::with_capacity(repetitions);
    for _ in 0..repetitions {
        comm.barrier("calibration")?;
        let start = Instant::now();
        exchange()?;
        seconds.push(start.elapsed().as_secs_f64());
    }
    slowest(comm, median(&mut seconds))
}

/// The most of all ranks' values.
fn slowest(comm: &dyn Communicator, value: f64) -> Result<f64> {
    let counts = vec![1; comm.world_size()];
    let all = comm.all_gather_v("calibrated time", vec![value as f32], &counts)?;
    Ok(f64::from(all.into_iter().fold(0.0, f32::max)))
}

/// The middle of the values, which are sorted; the lower one of two.
fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => 0.0,
        len => values[(len - 1) / 2],
    }
}
