//! The expert FFN of a parallel layer as one differentiable operation.
//!
//! One operation per layer keeps the order of collectives in our hands: within it, it is written
//! down; between layers, it follows from the data, since a layer's input depends on the output of
//! the layer before. A rank without tokens or with an empty slice takes part in all of them.

use burn::tensor::TensorMetadata;
use burn::tensor::ops::{FloatTensor, IntTensor};
use hexa_ops::ExpertKernels;
use hexa_ops::backend::{FfnExecutor, FfnGrads, FfnInputs, FfnNeeds, FfnWeights};

use super::context::{ExpertParallel, Mode};
use super::shard::HostExperts;
use super::{data_centric, host, model_centric};
use crate::error::MoeError;

/// One layer's forward pass.
#[derive(Debug, Clone)]
pub struct ParallelFfn {
    pub parallel: ExpertParallel,
    /// Tokens of each rank in this pass.
    pub tokens_per_rank: Vec<usize>,
    pub top_k: usize,
}

/// What the backward pass needs.
#[derive(Debug, Clone)]
pub enum Saved<F, I> {
    DataCentric(data_centric::Saved<F, I>),
    ModelCentric(model_centric::Saved<F, I>),
}

impl FfnExecutor for ParallelFfn {
    type Error = MoeError;
    type Saved<B: ExpertKernels> = Saved<FloatTensor<B>, IntTensor<B>>;

    fn forward<B: ExpertKernels>(
        &self,
        inputs: FfnInputs<FloatTensor<B>, IntTensor<B>>,
        differentiate: bool,
    ) -> Result<(FloatTensor<B>, Self::Saved<B>), MoeError> {
        match self.parallel.mode {
            Mode::DataCentric => {
                let (y, saved) = data_centric::forward::<B>(&self.parallel, inputs, differentiate)?;
                Ok((y, Saved::DataCentric(saved)))
            }
            Mode::ModelCentric => {
                let counts = &self.tokens_per_rank;
                let (y, saved) = model_centric::forward::<B>(&self.parallel, counts, inputs)?;
                Ok((y, Saved::ModelCentric(saved)))
            }
        }
    }

    fn backward<B: ExpertKernels>(
        &self,
        grad_output: FloatTensor<B>,
        weights: FfnWeights<FloatTensor<B>>,
        saved: Self::Saved<B>,
        needs: FfnNeeds,
    ) -> FfnGrads<FloatTensor<B>> {
        let own = weights.clone();
        let grads = self.parallel.context.check().and_then(|()| match saved {
            Saved::DataCentric(saved) => {
                data_centric::backward::<B>(&self.parallel, grad_output, own, saved, needs)
            }
            Saved::ModelCentric(saved) => {
                model_centric::backward::<B>(&self.parallel, grad_output, own, saved, needs)
            }
        });
        let grads = grads.unwrap_or_else(|error| {
            self.parallel.context.remember(error);
            FfnGrads {
                x: None,
                gates: None,
                w1: None,
                b1: None,
                w2: None,
                b2: None,
            }
        });
        self.with_zeros::<B>(grads, weights, needs)
    }
}

impl ParallelFfn {
    /// Fills in zeros for wanted gradients that this rank has no share in.
    fn with_zeros<B: ExpertKernels>(
        &self,
        grads: FfnGrads<FloatTensor<B>>,
        weights: FfnWeights<FloatTensor<B>>,
        needs: FfnNeeds,
    ) -> FfnGrads<FloatTensor<B>> {
        let (device, dtype) = (B::float_device(&weights.w1), weights.w1.dtype());
        let tokens = self.tokens_per_rank[self.parallel.context.rank()];
        let zeros = |shape| B::float_zeros(shape, &device, dtype.into());
        let fill = |needed: bool, grad: Option<_>, shape: Option<burn::tensor::Shape>| match shape {
            Some(shape) if needed => Some(grad.unwrap_or_else(|| zeros(shape))),
            _ => None,
        };
        let d_model = self.parallel.shards.d_model;
        FfnGrads {
            x: fill(needs.x, grads.x, Some([tokens, d_model].into())),
            gates: fill(needs.gates, grads.gates, Some([tokens, self.top_k].into())),
            w1: fill(needs.w1, grads.w1, Some(weights.w1.shape())),
            b1: fill(needs.b1, grads.b1, weights.b1.map(|b1| b1.shape())),
            w2: fill(needs.w2, grads.w2, Some(weights.w2.shape())),
            b2: fill(needs.b2, grads.b2, weights.b2.map(|b2| b2.shape())),
        }
    }
}

/// Puts this rank's part of the weight gradients, as far as wanted, into `grads`.
pub(super) fn write_slices<B: ExpertKernels>(
    grads: &mut FfnGrads<FloatTensor<B>>,
    part: HostExperts,
    own: &FfnWeights<FloatTensor<B>>,
    needs: FfnNeeds,
) {
    let write = |data, like: &FloatTensor<B>| {
        host::write::<B>(data, like.shape(), like.dtype(), &B::float_device(like))
    };
    grads.w1 = needs.w1.then(|| write(part.w1, &own.w1));
    grads.b1 = own
        .b1
        .as_ref()
        .filter(|_| needs.b1)
        .map(|b1| write(part.b1, b1));
    grads.w2 = needs.w2.then(|| write(part.w2, &own.w2));
}
