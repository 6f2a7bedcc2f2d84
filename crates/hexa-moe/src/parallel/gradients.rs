//! Gradients of replicated parameters: sums over ranks, in buckets.

use burn::module::{AutodiffModule, ModuleVisitor, Param, ParamId};
use burn::optim::GradientsParams;
use burn::tensor::backend::{AutodiffBackend, Backend};
use burn::tensor::{Tensor, TensorPrimitive};

use super::comm::{Collective, Pending};
use super::context::ParallelContext;
use super::host;
use crate::error::Result;

/// Elements of a bucket; a larger parameter is a bucket of its own. 16 MiB.
const BUCKET_ELEMENTS: usize = 4 << 20;

/// This rank's part of a batch. A mean over ranks would be wrong where they are unequal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchShare {
    /// Samples of this rank.
    pub local: usize,
    /// Samples of all ranks.
    pub global: usize,
}

impl BatchShare {
    /// The share of a rank that has `local` samples; all ranks call it together.
    ///
    /// # Errors
    /// [`MoeError::Comm`](crate::MoeError::Comm).
    pub fn exchange(context: &ParallelContext, local: usize) -> Result<Self> {
        let own = vec![u32::try_from(local).unwrap_or(u32::MAX)];
        let all = context.comm().all_gather_u32("samples", own)?;
        let global = all.iter().map(|&samples| samples as usize).sum();
        Ok(Self { local, global })
    }

    /// Turns the mean of a loss over the local samples into this rank's addend of the mean over
    /// all: `mean · local / global`. Without local samples there is no mean; then it is zero.
    pub fn weigh<B: Backend>(&self, local_mean: Tensor<B, 1>) -> Tensor<B, 1> {
        if self.local == 0 || self.global == 0 {
            return local_mean.zeros_like();
        }
        local_mean * (self.local as f64 / self.global as f64)
    }
}

/// Replaces the gradients of replicated parameters by their sums over ranks; those of distributed
/// experts are complete already. A parameter that has a gradient on no rank gets none.
///
/// Call it on all ranks after each backward pass: it also reports what a backward pass could not,
/// and frees the cache.
///
/// # Errors
/// [`MoeError`](crate::MoeError) if the device, a rank or an earlier pass failed.
pub fn exchange_gradients<B, M>(
    context: &ParallelContext,
    module: &M,
    grads: &mut GradientsParams,
) -> Result<()>
where
    B: AutodiffBackend,
    M: AutodiffModule<B>,
{
    context.cache().clear();
    context.check()?;
    let mut collect = Collect {
        context,
        grads,
        found: Vec::new(),
        failure: None,
    };
    module.visit(&mut collect);
    let (found, failure) = (collect.found, collect.failure);
    failure.map_or(Ok(()), Err)?;

    let present = found.iter().map(|g| u32::from(g.data.is_some())).collect();
    let all = context
        .comm()
        .all_gather_u32("which gradients there are", present)?;
    let on_any_rank = |i: usize| all.iter().skip(i).step_by(found.len()).any(|&p| p == 1);
    let wanted: Vec<Found> = (0..found.len())
        .map(on_any_rank)
        .collect::<Vec<_>>()
        .into_iter()
        .zip(found)
        .filter_map(|(wanted, gradient)| wanted.then_some(gradient))
        .collect();

    let mut sums = Vec::with_capacity(wanted.len());
    let mut ids = Vec::with_capacity(wanted.len());
    for bucket in start_buckets(context, wanted) {
        let mut data = bucket.pending.wait()?.into_f32().into_iter();
        for (id, len) in bucket.parts {
            ids.push(id);
            sums.push(data.by_ref().take(len).collect::<Vec<f32>>());
        }
    }
    let sums = ids.into_iter().zip(sums).collect();
    module.visit(&mut Replace { grads, sums });
    Ok(())
}

/// Squared norm of all gradients together, as if on one device; call it after
/// [`exchange_gradients`], on all ranks.
///
/// # Errors
/// [`MoeError`](crate::MoeError) if the device or a rank failed.
pub fn global_squared_norm<B, M>(
    context: &ParallelContext,
    module: &M,
    grads: &GradientsParams,
) -> Result<f64>
where
    B: AutodiffBackend,
    M: AutodiffModule<B>,
{
    let mut norms = Norms {
        context,
        grads,
        sharded: 0.0,
        replicated: 0.0,
        failure: None,
    };
    module.visit(&mut norms);
    let failure = norms.failure.take();
    failure.map_or(Ok(()), Err)?;
    // Two halves of the f64, since sums are in f32.
    let high = norms.sharded as f32;
    let low = (norms.sharded - f64::from(high)) as f32;
    let sums = context.comm().all_gather_v(
        "squared norm",
        vec![high, low],
        &vec![2; context.world_size()],
    )?;
    Ok(norms.replicated + sums.into_iter().map(f64::from).sum::<f64>())
}

/// A replicated parameter's gradient.
struct Found {
    id: ParamId,
    len: usize,
    data: Option<Vec<f32>>,
}

struct Bucket {
    parts: Vec<(ParamId, usize)>,
    pending: Pending,
}

fn start_buckets(context: &ParallelContext, gradients: Vec<Found>) -> Vec<Bucket> {
    let mut buckets: Vec<Bucket> = Vec::new();
    let mut parts = Vec::new();
    let mut data = Vec::new();
    let mut close = |parts: &mut Vec<_>, data: &mut Vec<f32>| {
        if parts.is_empty() {
            return;
        }
        let name = format!("gradients, bucket {}", buckets.len());
        let data = core::mem::take(data);
        buckets.push(Bucket {
            parts: core::mem::take(parts),
            pending: context.comm().start(&name, Collective::AllReduce { data }),
        });
    };
    for gradient in gradients {
        if data.len() + gradient.len > BUCKET_ELEMENTS {
            close(&mut parts, &mut data);
        }
        parts.push((gradient.id, gradient.len));
        match gradient.data {
            Some(values) => data.extend(values),
            None => data.resize(data.len() + gradient.len, 0.0),
        }
    }
    close(&mut parts, &mut data);
    buckets
}

fn read<B: Backend, const D: usize>(grad: Tensor<B, D>) -> Result<Vec<f32>> {
    host::read::<B>(grad.into_primitive().tensor(), "gradient")
}

struct Collect<'a> {
    context: &'a ParallelContext,
    grads: &'a GradientsParams,
    found: Vec<Found>,
    failure: Option<crate::MoeError>,
}

impl<B: AutodiffBackend> ModuleVisitor<B> for Collect<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        if self.context.is_sharded(param.id) || !param.val().is_require_grad() {
            return;
        }
        let grad = self.grads.get::<B::InnerBackend, D>(param.id);
        match grad.map(read).transpose() {
            Ok(data) => self.found.push(Found {
                id: param.id,
                len: param.val().shape().num_elements(),
                data,
            }),
            Err(error) => self.failure = Some(error),
        }
    }
}

struct Replace<'a> {
    grads: &'a mut GradientsParams,
    sums: std::collections::HashMap<ParamId, Vec<f32>>,
}

impl<B: AutodiffBackend> ModuleVisitor<B> for Replace<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        let Some(sum) = self.sums.remove(&param.id) else {
            return;
        };
        let tensor = param.val();
        let sum =
            host::write::<B::InnerBackend>(sum, tensor.dims(), tensor.dtype(), &tensor.device());
        let sum = Tensor::<B::InnerBackend, D>::from_primitive(TensorPrimitive::Float(sum));
        self.grads.register(param.id, sum);
    }
}

struct Norms<'a> {
    context: &'a ParallelContext,
    grads: &'a GradientsParams,
    sharded: f64,
    replicated: f64,
    failure: Option<crate::MoeError>,
}

impl<B: AutodiffBackend> ModuleVisitor<B> for Norms<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        let Some(grad) = self.grads.get::<B::InnerBackend, D>(param.id) else {
            return;
        };
        match read(grad) {
            Ok(data) => {
                let square: f64 = data.iter().map(|&g| f64::from(g).powi(2)).sum();
                if self.context.is_sharded(param.id) {
                    self.sharded += square;
                } else {
                    self.replicated += square;
                }
            }
            Err(error) => self.failure = Some(error),
        }
    }
}
