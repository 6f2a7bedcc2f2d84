//! Making a layer parallel and whole again.

use std::collections::BTreeSet;

use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::backend::Backend;
use burn::tensor::{Tensor, TensorPrimitive};
use hexa_ops::ExpertOps;

use super::context::{ExpertParallel, Mode, ParallelContext};
use super::host;
use super::shard::{ExpertShards, HostExperts};
use crate::error::{MoeError, Result};
use crate::moe::Moe;

/// Distributes a whole layer: this rank keeps its slices of the experts, whose widths `widths`
/// gives for all ranks ([`split_proportional`](super::split_proportional)). No data move: all
/// ranks must have the same layer, of one seed or by [`broadcast_parameters`].
///
/// Slices are leaves of the graph and keep their parameters' ids. `layer` numbers the layers of
/// the model, equally on all ranks.
///
/// # Errors
/// [`MoeError::Split`] unless there is one width per rank and they sum to `d_ff`;
/// [`MoeError::Ops`] if the device fails.
pub fn parallelize<B: ExpertOps>(
    mut moe: Moe<B>,
    context: &ParallelContext,
    layer: usize,
    mode: Mode,
    widths: Vec<usize>,
) -> Result<Moe<B>> {
    let [num_experts, d_ff, d_model] = moe.experts.w2.dims();
    let shards = ExpertShards {
        num_experts,
        d_model,
        columns_per_unit: moe.experts.activation.hidden_width(1),
        has_b1: moe.experts.b1.is_some(),
        widths,
    };
    shards.validate(d_ff, context.world_size())?;
    let rank = context.rank();
    let part = shards.slice(rank, &read_experts(&moe)?);
    moe = write_experts(moe, &shards, shards.widths[rank], part);
    context.note_sharded(moe.experts.sliced_params());
    moe.parallel = Some(ExpertParallel {
        context: context.reference(),
        mode,
        shards,
        layer,
    });
    Ok(moe)
}

/// Gathers the slices of a distributed layer into a whole one, on all ranks. A layer that is not
/// distributed is returned as it is.
///
/// # Errors
/// [`MoeError`] if the device or a rank failed.
pub fn gather_experts<B: ExpertOps>(mut moe: Moe<B>) -> Result<Moe<B>> {
    let Some(parallel) = moe.parallel.take() else {
        return Ok(moe);
    };
    let part = ExpertShards::pack(read_experts(&moe)?);
    let name = parallel.name("experts");
    let counts = parallel.shards.counts();
    let parts = parallel.context.comm().all_gather_v(&name, part, &counts)?;
    let whole = parallel.shards.assemble(&parts);
    let d_ff = parallel.shards.d_ff();
    parallel
        .context
        .note_replicated(moe.experts.sliced_params());
    Ok(write_experts(moe, &parallel.shards, d_ff, whole))
}

fn read_experts<B: ExpertOps>(moe: &Moe<B>) -> Result<HostExperts> {
    let experts = &moe.experts;
    Ok(HostExperts {
        w1: host::read::<B>(experts.w1.val().into_primitive().tensor(), "w1")?,
        b1: match &experts.b1 {
            Some(b1) => host::read::<B>(b1.val().into_primitive().tensor(), "b1")?,
            None => Vec::new(),
        },
        w2: host::read::<B>(experts.w2.val().into_primitive().tensor(), "w2")?,
    })
}

fn write_experts<B: ExpertOps>(
    mut moe: Moe<B>,
    shards: &ExpertShards,
    units: usize,
    part: HostExperts,
) -> Moe<B> {
    let columns = shards.columns(units);
    let (num_experts, d_model) = (shards.num_experts, shards.d_model);
    let experts = &mut moe.experts;
    experts.w1 = replace(&experts.w1, part.w1, [num_experts, d_model, columns]);
    experts.w2 = replace(&experts.w2, part.w2, [num_experts, units, d_model]);
    experts.b1 = experts
        .b1
        .as_ref()
        .map(|b1| replace(b1, part.b1, [num_experts, columns]));
    moe
}

/// The parameter with other elements, of its own id, type and device.
fn replace<B: Backend, const D: usize>(
    param: &Param<Tensor<B, D>>,
    data: Vec<f32>,
    shape: [usize; D],
) -> Param<Tensor<B, D>> {
    let old = param.val();
    let data = host::write::<B>(data, shape, old.dtype(), &old.device());
    let tensor = Tensor::from_primitive(TensorPrimitive::Float(data));
    Param::initialized(param.id, tensor.set_require_grad(old.is_require_grad()))
}

/// Gives all ranks rank 0's parameters, those of distributed experts excepted.
///
/// # Errors
/// [`MoeError`] if the device or a rank failed.
pub fn broadcast_parameters<B: Backend, M: Module<B>>(
    context: &ParallelContext,
    module: M,
) -> Result<M> {
    context.check()?;
    let mut mapper = Broadcast {
        context,
        seen: BTreeSet::new(),
        failure: None,
    };
    let module = module.map(&mut mapper);
    mapper.failure.map_or(Ok(module), Err)
}

struct Broadcast<'a> {
    context: &'a ParallelContext,
    seen: BTreeSet<u64>,
    failure: Option<MoeError>,
}

impl Broadcast<'_> {
    fn receive<B: Backend, const D: usize>(
        &mut self,
        param: &Param<Tensor<B, D>>,
    ) -> Result<Param<Tensor<B, D>>> {
        let tensor = param.val();
        let shape = tensor.dims();
        let name = format!("parameter {} {shape:?}", self.seen.len());
        let data = host::read::<B>(tensor.into_primitive().tensor(), "parameter")?;
        let len = data.len();
        let data = self.context.comm().broadcast(&name, data, 0, len)?;
        Ok(replace(param, data, shape))
    }
}

impl<B: Backend> ModuleMapper<B> for Broadcast<'_> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        if self.failure.is_some() || self.context.is_sharded(param.id) {
            return param;
        }
        match self.receive(&param) {
            Ok(received) => {
                self.seen.insert(param.id.val());
                received
            }
            Err(error) => {
                self.failure = Some(error);
                param
            }
        }
    }
}
