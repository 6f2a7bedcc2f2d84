//! Model-centric: tokens move.
//!
//! Forwards, all ranks gather all tokens with their routing, compute them with their own slice of
//! the experts, and the outputs are summed and scattered to the tokens' owners. Backwards, output
//! gradients are gathered; gradients of the own slice need no exchange; those of tokens and gates
//! are summed and scattered. Source: arXiv:2411.01288v4, section 4.3.

use burn::tensor::backend::Backend;
use burn::tensor::ops::{FloatTensor, IntTensor};
use burn::tensor::{DType, Int, Tensor, TensorMetadata};
use hexa_ops::backend::{
    FfnBackwardArgs, FfnGrads, FfnInputs, FfnNeeds, FfnWeights, RawExpertIndex,
};
use hexa_ops::{ExpertKernels, FfnOptions};

use super::comm::{Collective, Payload, Pending};
use super::context::ExpertParallel;
use super::{host, transfer};
use crate::error::Result;

/// Output, and what the backward pass needs.
type Forward<B> = (FloatTensor<B>, Saved<FloatTensor<B>, IntTensor<B>>);

/// What the backward pass needs.
#[derive(Debug, Clone)]
pub struct Saved<F, I> {
    tokens_per_rank: Vec<usize>,
    top_k: usize,
    dtype: DType,
    /// `None` for a rank with an empty slice, or if there are no tokens anywhere.
    computed: Option<Computed<F, I>>,
}

/// The pass of this rank's slice over everybody's tokens.
#[derive(Debug, Clone)]
struct Computed<F, I> {
    x: F,
    gates: F,
    pre_activation: F,
    index: RawExpertIndex<I>,
    options: FfnOptions,
    dropout_seed: Option<I>,
}

/// Rows of `width` elements as counts of elements.
fn elements(tokens_per_rank: &[usize], width: usize) -> Vec<usize> {
    tokens_per_rank
        .iter()
        .map(|tokens| tokens * width)
        .collect()
}

/// Starts to gather rows that each rank has some of.
pub fn start_gather<B: Backend>(
    parallel: &ExpertParallel,
    tensor: &'static str,
    part: FloatTensor<B>,
    counts: Vec<usize>,
) -> Result<Pending> {
    let comm = parallel.context.comm();
    transfer::all_gather::<B>(comm, &parallel.name(tensor), part, tensor, counts)
}

/// Starts to sum everybody's rows and to give each rank its own.
pub fn start_reduction<B: Backend>(
    parallel: &ExpertParallel,
    tensor: &'static str,
    addend: Option<FloatTensor<B>>,
    counts: Vec<usize>,
) -> Result<Pending> {
    let comm = parallel.context.comm();
    transfer::reduce_scatter::<B>(comm, &parallel.name(tensor), addend, tensor, counts)
}

/// Expert ids are few, and go through the host.
fn start_gather_of_ids(parallel: &ExpertParallel, ids: Vec<u32>, counts: Vec<usize>) -> Pending {
    let data = Payload::U32(ids);
    let collective = Collective::AllGatherV { data, counts };
    let name = parallel.name("expert ids");
    parallel.context.comm().start(&name, collective)
}

/// The weights as this rank computes with them: only one rank adds the second bias.
fn own_weights<F>(parallel: &ExpertParallel, mut weights: FfnWeights<F>) -> FfnWeights<F> {
    if parallel.context.rank() != parallel.shards.bias_owner() {
        weights.b2 = None;
    }
    weights
}

/// See [`hexa_ops::backend::FfnExecutor::forward`].
pub fn forward<B: ExpertKernels>(
    parallel: &ExpertParallel,
    tokens_per_rank: &[usize],
    inputs: FfnInputs<FloatTensor<B>, IntTensor<B>>,
) -> Result<Forward<B>> {
    let rank = parallel.context.rank();
    let (device, dtype) = (B::float_device(&inputs.x), inputs.x.dtype());
    let d_model = parallel.shards.d_model;
    let top_k = inputs.gates.shape()[1];
    let tokens: usize = tokens_per_rank.iter().sum();

    let rows = |width| elements(tokens_per_rank, width);
    let ids = host::read_ids(Tensor::<B, 2, Int>::from_primitive(inputs.expert_ids))?;
    let x = start_gather::<B>(parallel, "tokens", inputs.x, rows(d_model))?;
    let gates = start_gather::<B>(parallel, "gate weights", inputs.gates, rows(top_k))?;
    let ids = start_gather_of_ids(parallel, ids, rows(top_k));

    let mut computed = None;
    let mut addend = None;
    if parallel.shards.widths[rank] > 0 && tokens > 0 {
        let x = transfer::finish::<B>(x, [tokens, d_model], dtype, &device)?;
        let gates = transfer::finish::<B>(gates, [tokens, top_k], dtype, &device)?;
        let ids = host::write_ids::<B>(ids.wait()?.into_u32(), [tokens, top_k], &device);
        let index = B::expert_index(ids, parallel.shards.num_experts);
        let out = <B as ExpertKernels>::expert_ffn(
            x.clone(),
            gates.clone(),
            own_weights(parallel, inputs.weights),
            index.clone(),
            inputs.options,
            inputs.dropout_seed.clone(),
        );
        addend = Some(out.output);
        computed = Some(Computed {
            x,
            gates,
            pre_activation: out.pre_activation,
            index,
            options: inputs.options,
            dropout_seed: inputs.dropout_seed,
        });
    } else {
        for pending in [x, gates, ids] {
            pending.wait()?;
        }
    }
    let output = start_reduction::<B>(parallel, "outputs", addend, rows(d_model))?;
    let shape = [tokens_per_rank[rank], d_model];
    let output = transfer::finish::<B>(output, shape, dtype, &device)?;
    let saved = Saved {
        tokens_per_rank: tokens_per_rank.to_vec(),
        top_k,
        dtype,
        computed,
    };
    Ok((output, saved))
}

/// See [`hexa_ops::backend::FfnExecutor::backward`].
pub fn backward<B: ExpertKernels>(
    parallel: &ExpertParallel,
    grad_output: FloatTensor<B>,
    own: FfnWeights<FloatTensor<B>>,
    saved: Saved<FloatTensor<B>, IntTensor<B>>,
    needs: FfnNeeds,
) -> Result<FfnGrads<FloatTensor<B>>> {
    let rank = parallel.context.rank();
    let device = B::float_device(&own.w1);
    let (d_model, top_k, dtype) = (parallel.shards.d_model, saved.top_k, saved.dtype);
    let rows = |width| elements(&saved.tokens_per_rank, width);
    let tokens: usize = saved.tokens_per_rank.iter().sum();

    let all = start_gather::<B>(parallel, "output gradients", grad_output, rows(d_model))?;

    let mut grads = FfnGrads {
        x: None,
        gates: None,
        w1: None,
        b1: None,
        w2: None,
        b2: None,
    };
    if let Some(computed) = saved.computed {
        let weights = own_weights(parallel, own.clone());
        grads = <B as ExpertKernels>::expert_ffn_backward(FfnBackwardArgs {
            grad_output: transfer::finish::<B>(all, [tokens, d_model], dtype, &device)?,
            x: computed.x,
            gates: computed.gates,
            // Whether this rank's own tokens need gradients says nothing about the others'.
            needs: FfnNeeds {
                x: true,
                gates: true,
                b2: needs.b2 && weights.b2.is_some(),
                ..needs
            },
            weights,
            pre_activation: computed.pre_activation,
            index: computed.index,
            options: computed.options,
            dropout_seed: computed.dropout_seed,
        });
    } else {
        all.wait()?;
    }
    let (x, gates) = (grads.x.take(), grads.gates.take());
    let x = start_reduction::<B>(parallel, "token gradients", x, rows(d_model))?;
    let gates = start_reduction::<B>(parallel, "gate gradients", gates, rows(top_k))?;
    let own_rows = |pending: Pending, width| {
        let shape = [saved.tokens_per_rank[rank], width];
        transfer::finish::<B>(pending, shape, dtype, &device)
    };
    grads.x = Some(own_rows(x, d_model)?);
    grads.gates = Some(own_rows(gates, top_k)?);
    Ok(grads)
}
