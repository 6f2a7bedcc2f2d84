//! Gradients of replicated parameters: sums over ranks, in buckets.

use core::ops::Range;
use std::collections::HashMap;

use burn::module::{AutodiffModule, ModuleVisitor, Param, ParamId};
use burn::optim::GradientsParams;
use burn::tensor::backend::{AutodiffBackend, Backend};
use burn::tensor::ops::FloatTensor;
use burn::tensor::{DType, Tensor, TensorPrimitive};

use super::comm::{Collective, Communicator, DeviceCollective, DeviceTensor, Payload, Pending};
use super::context::ParallelContext;
use super::{host, transfer};
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
    };
    module.visit(&mut collect);
    let found = collect.found;

    let present = found.iter().map(|g| u32::from(g.grad.is_some())).collect();
    let all = context
        .comm()
        .all_gather_u32("which gradients there are", present)?;
    let on_any_rank = |i: usize| all.iter().skip(i).step_by(found.len()).any(|&p| p == 1);
    let wanted: Vec<Found<B::InnerBackend>> = (0..found.len())
        .map(on_any_rank)
        .collect::<Vec<_>>()
        .into_iter()
        .zip(found)
        .filter_map(|(wanted, gradient)| wanted.then_some(gradient))
        .collect();

    let mut sums = HashMap::new();
    for bucket in start_buckets(context, wanted)? {
        let sum: Sum<B::InnerBackend> = Sum::new(bucket.pending.wait()?);
        let mut start = 0;
        for (id, len) in bucket.parts {
            sums.insert(id, sum.part(start..start + len));
            start += len;
        }
    }
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
struct Found<B: Backend> {
    id: ParamId,
    len: usize,
    grad: Option<Tensor<B, 1>>,
}

struct Bucket {
    parts: Vec<(ParamId, usize)>,
    pending: Pending,
}

/// The summed gradients of a bucket, or of one parameter.
enum Sum<B: Backend> {
    Host(Vec<f32>),
    Device(Tensor<B, 1>),
}

impl<B: Backend> Sum<B> {
    fn new(payload: Payload) -> Self {
        if let Payload::Device(sum) = &payload
            && let Some(sum) = sum.get::<B>()
        {
            return Sum::Device(transfer::flat::<B>(sum));
        }
        Sum::Host(payload.into_f32())
    }

    fn part(&self, range: Range<usize>) -> Self {
        match self {
            Sum::Host(data) => Sum::Host(data[range].to_vec()),
            Sum::Device(sum) => Sum::Device(sum.clone().slice_dim(0, range)),
        }
    }
}

fn start_buckets<B: Backend>(
    context: &ParallelContext,
    gradients: Vec<Found<B>>,
) -> Result<Vec<Bucket>> {
    let mut buckets: Vec<Bucket> = Vec::new();
    let mut open: Vec<Found<B>> = Vec::new();
    let mut elements = 0;
    for gradient in gradients {
        if elements + gradient.len > BUCKET_ELEMENTS && !open.is_empty() {
            buckets.push(start_bucket(context, buckets.len(), &open)?);
            open.clear();
            elements = 0;
        }
        elements += gradient.len;
        open.push(gradient);
    }
    if !open.is_empty() {
        buckets.push(start_bucket(context, buckets.len(), &open)?);
    }
    Ok(buckets)
}

fn start_bucket<B: Backend>(
    context: &ParallelContext,
    number: usize,
    gradients: &[Found<B>],
) -> Result<Bucket> {
    let comm = context.comm();
    let collective = match on_device(comm, gradients) {
        Some(addend) => Collective::OnDevice(DeviceCollective::AllReduce { addend }),
        None => {
            let mut data = Vec::with_capacity(gradients.iter().map(|g| g.len).sum());
            for gradient in gradients {
                match &gradient.grad {
                    Some(grad) => data.extend(read(grad.clone())?),
                    None => data.resize(data.len() + gradient.len, 0.0),
                }
            }
            Collective::AllReduce { data }
        }
    };
    Ok(Bucket {
        parts: gradients.iter().map(|g| (g.id, g.len)).collect(),
        pending: comm.start(&format!("gradients, bucket {number}"), collective),
    })
}

/// A bucket for an engine that takes all of its gradients where they are.
fn on_device<B: Backend>(comm: &dyn Communicator, gradients: &[Found<B>]) -> Option<DeviceTensor> {
    let device = gradients
        .iter()
        .find_map(|g| Some(g.grad.as_ref()?.device()))?;
    let mut pieces = Vec::new();
    for gradient in gradients.iter().filter(|g| g.len > 0) {
        let grad = match &gradient.grad {
            Some(grad) => grad.clone(),
            None => Tensor::zeros([gradient.len], (&device, DType::F32)),
        };
        transfer::on_device::<B>(comm, &grad.clone().into_primitive().tensor())?;
        pieces.push(grad);
    }
    (!pieces.is_empty()).then(|| transfer::wrap(Tensor::cat(pieces, 0)))
}

fn primitive<B: Backend, const D: usize>(tensor: Tensor<B, D>) -> FloatTensor<B> {
    tensor.into_primitive().tensor()
}

fn read<B: Backend, const D: usize>(grad: Tensor<B, D>) -> Result<Vec<f32>> {
    host::read::<B>(primitive(grad), "gradient")
}

struct Collect<'a, B: Backend> {
    context: &'a ParallelContext,
    grads: &'a GradientsParams,
    found: Vec<Found<B>>,
}

impl<B: AutodiffBackend> ModuleVisitor<B> for Collect<'_, B::InnerBackend> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        if self.context.is_sharded(param.id) || !param.val().is_require_grad() {
            return;
        }
        let grad = self.grads.get::<B::InnerBackend, D>(param.id);
        self.found.push(Found {
            id: param.id,
            len: param.val().shape().num_elements(),
            grad: grad.map(|grad| transfer::flat::<B::InnerBackend>(primitive(grad))),
        });
    }
}

struct Replace<'a, B: Backend> {
    grads: &'a mut GradientsParams,
    sums: HashMap<ParamId, Sum<B>>,
}

impl<B: AutodiffBackend> ModuleVisitor<B> for Replace<'_, B::InnerBackend> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        let Some(sum) = self.sums.remove(&param.id) else {
            return;
        };
        let tensor = param.val();
        let sum = match sum {
            Sum::Host(sum) => {
                let (dtype, device) = (tensor.dtype(), tensor.device());
                let sum = host::write::<B::InnerBackend>(sum, tensor.dims(), dtype, &device);
                Tensor::<B::InnerBackend, D>::from_primitive(TensorPrimitive::Float(sum))
            }
            Sum::Device(sum) => sum.reshape(tensor.dims()).cast(tensor.dtype()),
        };
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
