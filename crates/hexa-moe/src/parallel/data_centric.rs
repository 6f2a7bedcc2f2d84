//! Data-centric: weights move.
//!
//! Forwards, the layer's weights are gathered and each rank computes its own tokens. Backwards,
//! they are gathered again; each rank computes full weight gradients for its tokens, which are
//! summed and scattered to the owners; token gradients stay where they are. Source:
//! arXiv:2411.01288v4, section 4.3.

use std::sync::Arc;

use burn::tensor::TensorMetadata;
use burn::tensor::backend::Backend;
use burn::tensor::ops::{FloatTensor, IntTensor};
use hexa_ops::ExpertKernels;
use hexa_ops::FfnOptions;
use hexa_ops::backend::{
    FfnBackwardArgs, FfnGrads, FfnInputs, FfnNeeds, FfnWeights, RawExpertIndex,
};

use super::cache::{PassId, Purpose};
use super::comm::{Collective, DeviceCollective, Payload, Pending};
use super::context::{ExpertParallel, ParallelContext};
use super::shard::{ExpertShards, HostExperts};
use super::shard_device::DeviceExperts;
use super::{host, transfer};
use crate::error::Result;

/// Output, and what the backward pass needs.
type Forward<B> = (FloatTensor<B>, Saved<FloatTensor<B>, IntTensor<B>>);

/// What the backward pass needs.
#[derive(Debug, Clone)]
pub struct Saved<F, I> {
    pass: PassId,
    x: F,
    gates: F,
    pre_activation: F,
    index: RawExpertIndex<I>,
    options: FfnOptions,
    dropout_seed: Option<I>,
    /// Without the shared cache, the layer's own.
    retained: Option<(FfnWeights<F>, Arc<Retained>)>,
}

/// Bytes that are accounted for as long as this lives.
#[derive(Debug)]
struct Retained {
    context: ParallelContext,
    bytes: usize,
}

impl Drop for Retained {
    fn drop(&mut self) {
        self.context.cache().forget(self.bytes);
    }
}

/// Starts the gather of a layer's weights from this rank's slices.
pub fn start_gather<B: Backend>(
    parallel: &ExpertParallel,
    weights: FfnWeights<FloatTensor<B>>,
) -> Result<Pending> {
    let comm = parallel.context.comm();
    let counts = parallel.shards.counts();
    let collective = if transfer::on_device::<B>(comm, &weights.w1).is_some() {
        let part = DeviceExperts::<B>::new(weights.w1, weights.b1, weights.w2).pack();
        let part = Some(transfer::wrap(part));
        Collective::OnDevice(DeviceCollective::AllGatherV { part, counts })
    } else {
        let part = HostExperts {
            w1: host::read::<B>(weights.w1, "w1")?,
            b1: weights
                .b1
                .map_or(Ok(Vec::new()), |b1| host::read::<B>(b1, "b1"))?,
            w2: host::read::<B>(weights.w2, "w2")?,
        };
        let data = Payload::F32(ExpertShards::pack(part));
        Collective::AllGatherV { data, counts }
    };
    Ok(comm.start(&parallel.name("expert weights"), collective))
}

/// The whole layer's weights, on the device of this rank's slices.
pub fn finish_gather<B: ExpertKernels>(
    parallel: &ExpertParallel,
    own: &FfnWeights<FloatTensor<B>>,
    pending: Pending,
) -> Result<FfnWeights<FloatTensor<B>>> {
    let shards = &parallel.shards;
    let payload = pending.wait()?;
    if let Payload::Device(parts) = &payload
        && let Some(parts) = parts.get::<B>()
    {
        let whole = DeviceExperts::<B>::assemble(shards, transfer::flat::<B>(parts));
        return Ok(FfnWeights {
            w1: whole.w1.into_primitive().tensor(),
            b1: whole.b1.map(|b1| b1.into_primitive().tensor()),
            w2: whole.w2.into_primitive().tensor(),
            b2: own.b2.clone(),
        });
    }
    let whole = shards.assemble(&payload.into_f32());
    let (device, dtype) = (B::float_device(&own.w1), own.w1.dtype());
    let (experts, d_model, d_ff) = (shards.num_experts, shards.d_model, shards.d_ff());
    let columns = shards.columns(d_ff);
    Ok(FfnWeights {
        w1: host::write::<B>(whole.w1, [experts, d_model, columns], dtype, &device),
        b1: shards
            .has_b1
            .then(|| host::write::<B>(whole.b1, [experts, columns], dtype, &device)),
        w2: host::write::<B>(whole.w2, [experts, d_ff, d_model], dtype, &device),
        b2: own.b2.clone(),
    })
}

/// See [`hexa_ops::backend::FfnExecutor::forward`].
pub fn forward<B: ExpertKernels>(
    parallel: &ExpertParallel,
    inputs: FfnInputs<FloatTensor<B>, IntTensor<B>>,
    differentiate: bool,
) -> Result<Forward<B>> {
    let cache = parallel.context.cache();
    let bytes = parallel.shards.whole_bytes();
    let own = inputs.weights;
    let purpose = Purpose::Forward {
        layer: parallel.layer,
    };
    let pending = match cache.take_in_flight(purpose) {
        Some(pending) => pending,
        None => {
            cache.release();
            start_gather::<B>(parallel, own.clone())?
        }
    };
    let weights = finish_gather::<B>(parallel, &own, pending)?;
    let pass = cache.new_pass();
    let mut retained = None;
    if cache.is_shared() {
        cache.hold(pass, weights.clone(), bytes);
    } else {
        cache.retain(bytes);
        let context = parallel.context.clone();
        retained = Some((weights.clone(), Arc::new(Retained { context, bytes })));
    }

    let index = B::expert_index(inputs.expert_ids, parallel.shards.num_experts);
    let out = <B as ExpertKernels>::expert_ffn(
        inputs.x.clone(),
        inputs.gates.clone(),
        weights,
        index.clone(),
        inputs.options,
        inputs.dropout_seed.clone(),
    );
    if !differentiate {
        cache.release();
    } else if cache.is_shared() {
        let parallel = parallel.clone();
        cache.record(pass, parallel.layer, bytes, move || {
            start_gather::<B>(&parallel, own.clone())
        });
    }
    let saved = Saved {
        pass,
        x: inputs.x,
        gates: inputs.gates,
        pre_activation: out.pre_activation,
        index,
        options: inputs.options,
        dropout_seed: inputs.dropout_seed,
        retained,
    };
    Ok((out.output, saved))
}

/// See [`hexa_ops::backend::FfnExecutor::backward`].
pub fn backward<B: ExpertKernels>(
    parallel: &ExpertParallel,
    grad_output: FloatTensor<B>,
    own: FfnWeights<FloatTensor<B>>,
    saved: Saved<FloatTensor<B>, IntTensor<B>>,
    needs: FfnNeeds,
) -> Result<FfnGrads<FloatTensor<B>>> {
    let pass = saved.pass;
    let weights = match saved.retained {
        Some((weights, _)) => weights,
        None => gather_again::<B>(parallel, &own, pass)?,
    };
    // All ranks train the same parameters, so that all take part in the exchange or none does.
    let exchange = needs.w1 || needs.b1 || needs.w2;
    let has_tokens = saved.index.tokens > 0;
    let grads = <B as ExpertKernels>::expert_ffn_backward(FfnBackwardArgs {
        grad_output,
        x: saved.x,
        gates: saved.gates,
        weights,
        pre_activation: saved.pre_activation,
        index: saved.index,
        options: saved.options,
        dropout_seed: saved.dropout_seed,
        needs: FfnNeeds {
            w1: exchange,
            b1: exchange && own.b1.is_some(),
            w2: exchange,
            ..needs
        },
    });
    let pending = if exchange {
        let grads = has_tokens.then_some(&grads);
        Some(start_reduction::<B>(parallel, grads)?)
    } else {
        None
    };
    // The place is free again: the layer in front gathers while this one's gradients are summed.
    parallel.context.cache().release();
    parallel.context.cache().start_previous(pass)?;

    let mut out = FfnGrads {
        w1: None,
        b1: None,
        w2: None,
        ..grads
    };
    if let Some(pending) = pending {
        finish_reduction::<B>(parallel, pending, &mut out, &own, needs)?;
    }
    Ok(out)
}

/// The weights of a pass, from the cache or from the ranks.
fn gather_again<B: ExpertKernels>(
    parallel: &ExpertParallel,
    own: &FfnWeights<FloatTensor<B>>,
    pass: PassId,
) -> Result<FfnWeights<FloatTensor<B>>> {
    let cache = parallel.context.cache();
    if let Some(weights) = cache.take_held::<FfnWeights<FloatTensor<B>>>(pass) {
        // Back into the place, which frees them when the next layer needs it.
        cache.hold(pass, weights.clone(), parallel.shards.whole_bytes());
        return Ok(weights);
    }
    let pending = match cache.take_in_flight(Purpose::Backward { pass }) {
        Some(pending) => pending,
        None => start_gather::<B>(parallel, own.clone())?,
    };
    let weights = finish_gather::<B>(parallel, own, pending)?;
    cache.hold(pass, weights.clone(), parallel.shards.whole_bytes());
    Ok(weights)
}

/// Starts the sum of all ranks' weight gradients, which scatters them to their owners; `None` for
/// zeros.
pub fn start_reduction<B: ExpertKernels>(
    parallel: &ExpertParallel,
    grads: Option<&FfnGrads<FloatTensor<B>>>,
) -> Result<Pending> {
    let comm = parallel.context.comm();
    let counts = parallel.shards.counts();
    let collective = match grads.map(|grads| (grads, &grads.w1, &grads.w2)) {
        Some((grads, Some(w1), Some(w2))) if transfer::on_device::<B>(comm, w1).is_some() => {
            let grads = DeviceExperts::<B>::new(w1.clone(), grads.b1.clone(), w2.clone());
            let addend = Some(transfer::wrap(grads.scatter(&parallel.shards)));
            Collective::OnDevice(DeviceCollective::ReduceScatterV { addend, counts })
        }
        _ => {
            let data = grads.map(|grads| pack_grads::<B>(parallel, grads));
            let data = data.transpose()?;
            Collective::ReduceScatterV { data, counts }
        }
    };
    Ok(comm.start(&parallel.name("expert weight gradients"), collective))
}

/// Puts this rank's part of the sum, as far as wanted, into `out`.
pub fn finish_reduction<B: ExpertKernels>(
    parallel: &ExpertParallel,
    pending: Pending,
    out: &mut FfnGrads<FloatTensor<B>>,
    own: &FfnWeights<FloatTensor<B>>,
    needs: FfnNeeds,
) -> Result<()> {
    let rank = parallel.context.rank();
    let payload = pending.wait()?;
    if let Payload::Device(part) = &payload
        && let Some(part) = part.get::<B>()
    {
        let part = transfer::flat::<B>(part);
        let part = DeviceExperts::<B>::unpack(&parallel.shards, rank, part);
        out.w1 = needs.w1.then(|| part.w1.into_primitive().tensor());
        let b1 = part.b1.filter(|_| needs.b1);
        out.b1 = b1.map(|b1| b1.into_primitive().tensor());
        out.w2 = needs.w2.then(|| part.w2.into_primitive().tensor());
    } else {
        let part = parallel.shards.unpack(rank, payload.into_f32());
        super::executor::write_slices::<B>(out, part, own, needs);
    }
    Ok(())
}

/// Whole weight gradients as all ranks' parts.
fn pack_grads<B: ExpertKernels>(
    parallel: &ExpertParallel,
    grads: &FfnGrads<FloatTensor<B>>,
) -> Result<Vec<f32>> {
    let read = |grad: &Option<FloatTensor<B>>, name| match grad {
        Some(grad) => host::read::<B>(grad.clone(), name),
        None => Ok(Vec::new()),
    };
    Ok(parallel.shards.scatter(&HostExperts {
        w1: read(&grads.w1, "gradient of w1")?,
        b1: read(&grads.b1, "gradient of b1")?,
        w2: read(&grads.w2, "gradient of w2")?,
    }))
}

/// Starts the gather for the layer's next forward pass.
pub fn prefetch<B: Backend>(
    parallel: &ExpertParallel,
    weights: FfnWeights<FloatTensor<B>>,
) -> Result<()> {
    let cache = parallel.context.cache();
    let purpose = Purpose::Forward {
        layer: parallel.layer,
    };
    cache.start(purpose, parallel.shards.whole_bytes(), || {
        start_gather::<B>(parallel, weights)
    })
}
