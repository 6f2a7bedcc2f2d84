//! The parallel forward pass of [`Moe`]: what [`crate::moe`] specifies, over all ranks' tokens.

use burn::tensor::{DType, Int, Tensor, TensorData, TensorPrimitive};
use hexa_ops::backend::{FfnInputs, FfnWeights};
use hexa_ops::{ExpertOps, OpsError};

use super::context::{ExpertParallel, Mode};
use super::executor::ParallelFfn;
use super::host;
use super::waste::{RankTiles, tile_waste};
use crate::balance::no_loss;
use crate::error::{MoeError, Result};
use crate::load::{GlobalLoad, LoadStats, RouterMeans, router_sums};
use crate::moe::{Moe, MoeOutput};
use crate::router::Routing;

/// Runs the layer on this rank's tokens, which may be none; all ranks call it together.
pub(crate) fn forward<B: ExpertOps>(
    moe: &Moe<B>,
    parallel: &ExpertParallel,
    x: Tensor<B, 2>,
) -> Result<MoeOutput<B, 2>> {
    parallel.context.check()?;
    check_slices(moe, parallel)?;
    let [tokens, _] = x.dims();
    let routing = if tokens > 0 {
        Some(moe.router.route(x.clone())?)
    } else {
        None
    };
    let counts = exchange_counts(moe, parallel, &x, routing.as_ref())?;
    let (aux_loss, router) = exchange_statistics(moe, parallel, &counts, &routing, &x)?;

    let computed = x
        .clone()
        .cast(moe.experts.precision.operand_dtype(x.dtype()));
    let mut output = experts(moe, parallel, counts.tokens_per_rank, &routing, computed)?;
    let mut aux_loss = aux_loss;
    if tokens == 0 {
        // The backward pass of a rank without tokens must reach the layer, too, whose collectives
        // the others wait in; a loss over no output would not.
        aux_loss = aux_loss + output.clone().sum().cast(DType::F32);
    } else if let Some(shared) = &moe.shared {
        output = output + shared.forward_shared(x.clone())?;
    }
    let output = output.cast(x.dtype());
    let device = x.device();
    let tokens_per_expert: Vec<i32> = counts.tokens_per_expert;
    let num_experts = tokens_per_expert.len();
    Ok(MoeOutput {
        output,
        aux_loss,
        load: LoadStats {
            tokens_per_expert: Tensor::<B, 1, Int>::from_data(
                TensorData::new(tokens_per_expert, [num_experts]),
                &device,
            ),
            routing: routing.map(Routing::detach),
            tile_rows: hexa_ops::tile_rows::<B>(&device),
            global: Some(GlobalLoad {
                router,
                tile_waste: counts.tile_waste,
            }),
        },
    })
}

/// Starts the gather of the layer's weights, so that it is in flight while what lies in front of
/// the layer computes.
pub(crate) fn prefetch<B: ExpertOps>(moe: &Moe<B>, parallel: &ExpertParallel) -> Result<()> {
    if parallel.mode != Mode::DataCentric {
        return Ok(());
    }
    parallel.context.check()?;
    check_slices(moe, parallel)?;
    let experts = &moe.experts;
    let float3 = |t: Tensor<B, 3>| t.detach().into_primitive().tensor();
    let float2 = |t: Tensor<B, 2>| t.detach().into_primitive().tensor();
    let weights = FfnWeights {
        w1: float3(experts.w1.val()),
        b1: experts.b1.as_ref().map(|b1| float2(b1.val())),
        w2: float3(experts.w2.val()),
        b2: None,
    };
    super::data_centric::prefetch::<B>(parallel, weights)
}

fn read_param<B: ExpertOps, const D: usize>(
    tensor: Tensor<B, D>,
    name: &'static str,
) -> Result<Vec<f32>> {
    host::read::<B>(tensor.into_primitive().tensor(), name)
}

/// Global numbers of tokens.
struct Counts {
    tokens_per_rank: Vec<usize>,
    tokens_per_expert: Vec<i32>,
    tile_waste: f64,
}

fn exchange_counts<B: ExpertOps>(
    moe: &Moe<B>,
    parallel: &ExpertParallel,
    x: &Tensor<B, 2>,
    routing: Option<&Routing<B>>,
) -> Result<Counts> {
    let num_experts = moe.router.num_experts;
    // This rank's tokens, rows of its tiles, and slots of each expert.
    let mut own = vec![0u32; 2 + num_experts];
    let whole = |value: usize| u32::try_from(value).unwrap_or(u32::MAX);
    own[0] = whole(x.dims()[0]);
    own[1] = whole(hexa_ops::tile_rows::<B>(&x.device()));
    if let Some(routing) = routing {
        for id in host::read_ids(routing.gating.expert_ids.clone())? {
            own[2 + id as usize] += 1;
        }
    }
    let name = parallel.name("token counts");
    let all = parallel.context.comm().all_gather_u32(&name, own)?;
    let mut tokens_per_expert = vec![0i32; num_experts];
    let mut tokens_per_rank = Vec::with_capacity(parallel.context.world_size());
    let mut tiles = Vec::with_capacity(parallel.context.world_size());
    for rank in all.chunks_exact(2 + num_experts) {
        tokens_per_rank.push(rank[0] as usize);
        tiles.push(RankTiles {
            rows: rank[1] as usize,
            tokens_per_expert: rank[2..].iter().map(|&count| count.into()).collect(),
        });
        for (sum, count) in tokens_per_expert.iter_mut().zip(&rank[2..]) {
            *sum = sum.saturating_add_unsigned(*count);
        }
    }
    let slots = tokens_per_rank.iter().sum::<usize>() * moe.router.top_k;
    if slots > i32::MAX as usize {
        return Err(MoeError::Ops(OpsError::Value {
            name: "tokens of all ranks · top_k",
            got: slots.to_string(),
            allowed: "at most 2147483647 slots",
            remedy: "split the batch",
        }));
    }
    Ok(Counts {
        tile_waste: tile_waste(parallel.mode, &parallel.shards.widths, &tiles),
        tokens_per_rank,
        tokens_per_expert,
    })
}

/// Auxiliary loss over the global batch, and the router's means over it.
///
/// Losses are functions of sums over tokens. The sums are replaced by their global values, with
/// the gradient of the local ones: what comes behind is the same on all ranks, so that each rank's
/// gradient is its tokens' share and the backward pass needs no collective.
fn exchange_statistics<B: ExpertOps>(
    moe: &Moe<B>,
    parallel: &ExpertParallel,
    counts: &Counts,
    routing: &Option<Routing<B>>,
    x: &Tensor<B, 2>,
) -> Result<(Tensor<B, 1>, Option<RouterMeans>)> {
    let device = x.device();
    let num_experts = moe.router.num_experts;
    let len = moe.balance.num_sums(num_experts);
    let local = routing
        .as_ref()
        .filter(|_| len > 0)
        .map(|routing| moe.balance.sums(routing, moe.router.gate_noise));
    let addend = match routing {
        Some(routing) => {
            let mut sums: Vec<_> = local.iter().map(|local| local.clone().detach()).collect();
            sums.push(router_sums(&routing.clone().detach()));
            read_param(Tensor::cat(sums, 0), "routing statistics")?
        }
        None => vec![0.0; len + RouterMeans::NUM_SUMS],
    };
    let name = parallel.name("routing statistics");
    let mut global = parallel.context.comm().all_reduce(&name, addend)?;
    let router = global.split_off(len.min(global.len()));
    let router: Vec<f64> = router.into_iter().map(f64::from).collect();

    let tokens: usize = counts.tokens_per_rank.iter().sum();
    let router = RouterMeans::of_sums(&router, tokens, moe.router.top_k);
    if tokens == 0 || len == 0 {
        return Ok((no_loss(&device), router));
    }
    let global = Tensor::<B, 1>::from_data(TensorData::new(global, [len]), (&device, DType::F32));
    let sums = match local {
        // a − a is exactly zero, so that the value is exactly the global one.
        Some(local) => global + (local.clone() - local.detach()),
        None => global,
    };
    let loss = moe.balance.loss_of_sums(sums, tokens, num_experts);
    Ok((loss, router))
}

fn experts<B: ExpertOps>(
    moe: &Moe<B>,
    parallel: &ExpertParallel,
    tokens_per_rank: Vec<usize>,
    routing: &Option<Routing<B>>,
    x: Tensor<B, 2>,
) -> Result<Tensor<B, 2>> {
    let (device, dtype) = (x.device(), x.dtype());
    let experts = &moe.experts;
    let top_k = moe.router.top_k;
    let (gates, expert_ids) = match routing {
        Some(routing) => (
            routing.gating.weights.clone().cast(dtype),
            routing.gating.expert_ids.clone(),
        ),
        None => (
            Tensor::empty([0, top_k], (&device, dtype)),
            Tensor::empty([0, top_k], &device),
        ),
    };
    // Again in each pass, since loading a record gives parameters other ids.
    parallel.context.note_sharded(experts.sliced_params());

    let (options, seed) = experts.options(&device);
    // Ranks whose generators are seeded alike must not draw the same mask for other tokens or
    // columns. Seeds have 24 bits.
    let rank = (parallel.context.rank() & 0x7f) as i32;
    let seed = seed.map(|seed| (seed + (rank << 24)).into_primitive());
    let executor = ParallelFfn {
        parallel: parallel.clone(),
        tokens_per_rank,
        top_k,
    };
    let float2 = |t: Tensor<B, 2>| t.cast(dtype).into_primitive().tensor();
    let float3 = |t: Tensor<B, 3>| t.cast(dtype).into_primitive().tensor();
    let output = B::expert_ffn_by(
        &executor,
        FfnInputs {
            x: x.into_primitive().tensor(),
            gates: gates.into_primitive().tensor(),
            weights: FfnWeights {
                w1: float3(experts.w1.val()),
                b1: experts.b1.as_ref().map(|b1| float2(b1.val())),
                w2: float3(experts.w2.val()),
                b2: experts.b2.as_ref().map(|b2| float2(b2.val())),
            },
            expert_ids: expert_ids.into_primitive(),
            options,
            dropout_seed: seed,
        },
    )?;
    Ok(Tensor::from_primitive(TensorPrimitive::Float(output)))
}

/// The parameters must be this rank's slices; a loaded record may not be.
fn check_slices<B: ExpertOps>(moe: &Moe<B>, parallel: &ExpertParallel) -> Result<()> {
    let shards = &parallel.shards;
    let units = shards.widths[parallel.context.rank()];
    let columns = shards.columns(units);
    let (experts, d_model) = (shards.num_experts, shards.d_model);
    let mut shapes = vec![
        (
            "w1",
            moe.experts.w1.dims().to_vec(),
            vec![experts, d_model, columns],
        ),
        (
            "w2",
            moe.experts.w2.dims().to_vec(),
            vec![experts, units, d_model],
        ),
    ];
    if let Some(b1) = &moe.experts.b1 {
        shapes.push(("b1", b1.dims().to_vec(), vec![experts, columns]));
    }
    if let Some(b2) = &moe.experts.b2 {
        shapes.push(("b2", b2.dims().to_vec(), vec![experts, d_model]));
    }
    for (tensor, got, expected) in shapes {
        if got != expected {
            return Err(MoeError::Ops(OpsError::Shape {
                op: "parallel Moe",
                tensor,
                got,
                expected: format!(
                    "{expected:?}, the slice of rank {}",
                    parallel.context.rank()
                ),
                remedy: "load records of the whole into an undistributed layer, then distribute it",
            }));
        }
    }
    Ok(())
}
