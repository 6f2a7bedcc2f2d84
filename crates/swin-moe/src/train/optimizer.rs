//! AdamW over a whole model at once.
//!
//! A Swin-MoE has hundreds of parameters, most of them small, and an AdamW step is a dozen
//! elementwise operations: one at a time, launching kernels costs more than running them. Small
//! parameters of one decay group therefore share a flat *bucket*, and the arithmetic runs once per
//! bucket. Parameters become views of the updated bucket, so that unpacking launches nothing where
//! the back-end can view a slice.

mod bucket;

use std::collections::HashMap;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::Tensor;
use burn::tensor::backend::{AutodiffBackend, Backend};

use self::bucket::{Bucket, Layout};
use super::device::read;
use super::error::{Result, TrainError};
use super::params::{HostTensor, HostTensors, ModulePath};

/// Constants of AdamW (arXiv:1711.05101) and of gradient clipping.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWConfig {
    /// Decay of the mean of gradients.
    pub beta1: f64,
    /// Decay of the mean of squared gradients.
    pub beta2: f64,
    /// Added to the root of the mean of squares.
    pub epsilon: f64,
    /// Decoupled weight decay of the parameters that [`decays`] names.
    pub weight_decay: f64,
    /// Upper limit of the norm of all gradients together; none if zero.
    pub clip_grad_norm: f64,
    /// Decay of the moving average of the parameters; none if zero.
    pub ema_decay: f64,
}

impl AdamWConfig {
    /// Decay of the average in the `step`-th step, from one: less at the start, so that the initial
    /// weights are soon forgotten (`(1 + t) / (10 + t)`, as TensorFlow's moving averages have it).
    fn ema_decay_at(&self, step: u64) -> f64 {
        self.ema_decay
            .min((1.0 + step as f64) / (10.0 + step as f64))
    }
}

/// A model's gradients, joined as the optimizer updates them.
#[derive(Debug, Clone)]
pub struct FlatGradients<B: Backend>(pub(super) Vec<Tensor<B, 1>>);

impl<B: Backend> FlatGradients<B> {
    /// The sums with another pass' gradients.
    pub fn plus(self, other: Self) -> Self {
        FlatGradients(
            self.0
                .into_iter()
                .zip(other.0)
                .map(|(a, b)| a + b)
                .collect(),
        )
    }
}

impl<B: Backend> FlatGradients<B> {
    /// All of them times `factor`.
    pub(super) fn times(self, factor: f64) -> Self {
        let scaled = self.0.into_iter().map(|flat| flat.mul_scalar(factor));
        FlatGradients(scaled.collect())
    }

    /// Their norm, `[1]`.
    pub(super) fn norm(&self) -> Tensor<B, 1> {
        global_norm(&self.0)
    }
}

/// Whether weight decay acts on a parameter: on tensors of two or more dimensions, but not on the
/// position bias' MLP, the router's cosine parts, nor experts' biases (`[num_experts, width]`).
pub fn decays(name: &str, num_dims: usize) -> bool {
    const EXEMPT: [&str; 8] = [
        "cpb_mlp",
        "temperature",
        "cosine_projector",
        "sim_matrix",
        "b1",
        "b2",
        "fc1_bias",
        "fc2_bias",
    ];
    num_dims >= 2 && !name.split('.').any(|part| EXEMPT.contains(&part))
}

/// AdamW with decoupled decay, as PyTorch computes it, and global clipping by norm.
#[derive(Debug)]
pub struct AdamW<B: AutodiffBackend> {
    config: AdamWConfig,
    layout: Layout,
    buckets: Vec<Bucket<B::InnerBackend>>,
    steps: u64,
}

impl<B: AutodiffBackend> AdamW<B> {
    /// An optimizer for the trained parameters of `model`, with zero moments.
    pub fn new<M: Module<B>>(config: AdamWConfig, model: &M) -> Self {
        Self::of_slices(config, model, &|_| false)
    }

    /// An optimizer for a rank's parameters, of which `is_slice` names those that are slices; the
    /// others are on all ranks.
    pub fn of_slices<M: Module<B>>(
        config: AdamWConfig,
        model: &M,
        is_slice: &dyn Fn(&str) -> bool,
    ) -> Self {
        let mut collector = Collector::<B> {
            path: ModulePath::default(),
            is_slice,
            slots: Vec::new(),
            values: Vec::new(),
        };
        model.visit(&mut collector);
        let layout = Layout::plan(collector.slots);
        let averages = config.ema_decay > 0.0;
        let buckets = layout.pack(collector.values, |params, decay| {
            Bucket::new(params, decay, averages)
        });
        AdamW {
            config,
            layout,
            buckets,
            steps: 0,
        }
    }

    /// Takes the gradients of `model`'s trained parameters out of the results of backward passes,
    /// of which each parameter had a part in one.
    ///
    /// # Errors
    /// [`TrainError::NoGradient`] if a trained parameter has none.
    pub fn gradients<M: Module<B>>(
        &self,
        model: &M,
        gradients: Vec<B::Gradients>,
    ) -> Result<FlatGradients<B::InnerBackend>> {
        self.gradients_or_zeros(model, gradients, false)
    }

    /// [`AdamW::gradients`]; with `zeros`, those instead of gradients that are missing.
    pub(super) fn gradients_or_zeros<M: Module<B>>(
        &self,
        model: &M,
        mut gradients: Vec<B::Gradients>,
        zeros: bool,
    ) -> Result<FlatGradients<B::InnerBackend>> {
        let mut taker = GradientTaker::<B> {
            path: ModulePath::default(),
            gradients: &mut gradients,
            taken: Vec::with_capacity(self.layout.num_slots()),
            zeros,
            without: None,
        };
        model.visit(&mut taker);
        if let Some(name) = taker.without {
            return Err(TrainError::NoGradient { name });
        }
        Ok(FlatGradients(self.layout.pack(taker.taken, |flat, _| flat)))
    }

    /// Whether each bucket is of slices.
    pub(super) fn sliced_buckets(&self) -> &[bool] {
        self.layout.sliced_buckets()
    }

    /// Updates all parameters and gives the norm of the gradients before clipping, `[1]`.
    ///
    /// Nothing is read back to the host.
    pub fn step<M: Module<B>>(
        &mut self,
        model: M,
        gradients: FlatGradients<B::InnerBackend>,
        lr: f64,
    ) -> (M, Tensor<B::InnerBackend, 1>) {
        let norm = global_norm(&gradients.0);
        (self.update(model, gradients, norm.clone(), lr), norm)
    }

    /// Updates all parameters with gradients of this norm, `[1]`.
    pub(super) fn update<M: Module<B>>(
        &mut self,
        model: M,
        gradients: FlatGradients<B::InnerBackend>,
        norm: Tensor<B::InnerBackend, 1>,
        lr: f64,
    ) -> M {
        let grads = gradients.0;
        let scale = (self.config.clip_grad_norm > 0.0).then(|| {
            // PyTorch's clip_grad_norm_: max / (norm + 1e-6), at most 1.
            norm.add_scalar(1e-6)
                .recip()
                .mul_scalar(self.config.clip_grad_norm)
                .clamp_max(1.0)
        });
        self.steps += 1;
        self.buckets = std::mem::take(&mut self.buckets)
            .into_iter()
            .zip(grads)
            .map(|(bucket, grad)| {
                let grad = match &scale {
                    Some(scale) => grad.mul(scale.clone()),
                    None => grad,
                };
                bucket.updated(grad, &self.config, lr, self.steps)
            })
            .collect();
        let flat = self.buckets.iter().map(Bucket::params).collect::<Vec<_>>();
        let mut placer = Placer {
            flat: self.layout.slices(&flat).into_iter(),
        };
        model.map(&mut placer)
    }

    /// The model with the parameters' moving averages instead of the trained ones, if there are
    /// any; the model as it is otherwise.
    pub fn averaged<M: Module<B::InnerBackend>>(&self, model: M) -> M {
        let averages: Option<Vec<_>> = self.buckets.iter().map(Bucket::average).collect();
        match averages {
            Some(flat) => model.map(&mut InnerPlacer {
                path: ModulePath::default(),
                flat: self.layout.named_slices(&flat),
            }),
            None => model,
        }
    }

    /// The moments by parameter name, and the number of steps, for a checkpoint.
    ///
    /// # Errors
    /// [`TrainError::Device`] if a read fails.
    pub fn state(&self) -> Result<HostTensors> {
        let mut tensors = HostTensors::new();
        for (bucket_index, bucket) in self.buckets.iter().enumerate() {
            let kinds = [
                ("first", Some(bucket.first())),
                ("second", Some(bucket.second())),
                (AVERAGE, bucket.average()),
            ];
            for (kind, flat) in kinds {
                let Some(flat) = flat else { continue };
                let flat = read(flat, "the optimizer's moments")?;
                for slot in self.layout.slots_of(bucket_index) {
                    let values = flat.values[slot.offset..slot.offset + slot.len()].to_vec();
                    let shape = slot.shape.clone();
                    tensors.insert(
                        format!("{kind}.{}", slot.name),
                        HostTensor { shape, values },
                    );
                }
            }
        }
        let halves = [self.steps >> 24, self.steps & 0xff_ffff].map(|half| half as f32);
        tensors.insert(
            "steps".to_owned(),
            HostTensor {
                shape: vec![2],
                values: halves.to_vec(),
            },
        );
        Ok(tensors)
    }

    /// Continues from the state of an earlier optimizer of the same model.
    ///
    /// # Errors
    /// In words, what is missing or of another shape.
    pub fn load_state(&mut self, mut tensors: HostTensors) -> std::result::Result<(), String> {
        let steps = tensors
            .remove("steps")
            .ok_or("the optimizer's steps are missing")?;
        let &[high, low] = steps.values.as_slice() else {
            return Err("the optimizer's steps have another shape".to_owned());
        };
        for (index, bucket) in self.buckets.iter_mut().enumerate() {
            let first = self.layout.flat_state(index, "first", &mut tensors)?;
            let second = self.layout.flat_state(index, "second", &mut tensors)?;
            bucket.set_moments(first, second);
            if bucket.average().is_some() {
                bucket.set_average(self.layout.flat_state(index, AVERAGE, &mut tensors)?);
            }
        }
        if let Some(name) = tensors.keys().next() {
            return Err(format!(
                "the optimizer's tensor {name} belongs to no parameter"
            ));
        }
        self.steps = ((high as u64) << 24) | low as u64;
        Ok(())
    }
}

/// What the moving averages are called among the optimizer's tensors.
const AVERAGE: &str = "average";

/// The parameters' moving averages among an optimizer's tensors, by the parameters' names.
pub fn averages(optimizer: &HostTensors) -> HostTensors {
    let prefix = format!("{AVERAGE}.");
    optimizer
        .iter()
        .filter_map(|(name, tensor)| {
            let name = name.strip_prefix(&prefix)?;
            Some((name.to_owned(), tensor.clone()))
        })
        .collect()
}

/// `√ Σ g²` over all buckets; their padding is zero. Buckets are summed in order.
fn global_norm<B: Backend>(grads: &[Tensor<B, 1>]) -> Tensor<B, 1> {
    let squares = grads
        .iter()
        .map(|grad| grad.clone().square().sum())
        .collect();
    Tensor::cat(squares, 0).sum().sqrt()
}

/// A trained parameter.
#[derive(Debug, Clone)]
pub(super) struct NamedShape {
    pub name: String,
    pub shape: Vec<usize>,
    pub is_slice: bool,
}

/// Whether the optimizer has the parameter: if it is trained, and not an empty slice.
fn takes_part<B: AutodiffBackend, const D: usize>(value: &Tensor<B, D>) -> bool {
    value.is_require_grad() && value.shape().num_elements() > 0
}

struct Collector<'a, B: AutodiffBackend> {
    path: ModulePath,
    is_slice: &'a dyn Fn(&str) -> bool,
    slots: Vec<NamedShape>,
    values: Vec<Tensor<B::InnerBackend, 1>>,
}

impl<B: AutodiffBackend> ModuleVisitor<B> for Collector<'_, B> {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.enter(name);
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.exit();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        let value = param.val();
        if takes_part(&value) {
            let name = self.path.name();
            self.slots.push(NamedShape {
                is_slice: (self.is_slice)(&name),
                name,
                shape: value.dims().to_vec(),
            });
            self.values.push(flatten(value.inner()));
        }
    }
}

struct GradientTaker<'a, B: AutodiffBackend> {
    path: ModulePath,
    gradients: &'a mut [B::Gradients],
    taken: Vec<Tensor<B::InnerBackend, 1>>,
    zeros: bool,
    without: Option<String>,
}

impl<B: AutodiffBackend> ModuleVisitor<B> for GradientTaker<'_, B> {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.enter(name);
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.exit();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        let value = param.val();
        if !takes_part(&value) {
            return;
        }
        let mut passes = self.gradients.iter_mut();
        match passes.find_map(|gradients| value.grad_remove(gradients)) {
            Some(gradient) => self.taken.push(flatten(gradient)),
            None if self.zeros => {
                let len = value.shape().num_elements();
                self.taken.push(Tensor::zeros([len], &value.device()));
            }
            None => self.without = Some(self.path.name()),
        }
    }
}

struct Placer<I> {
    flat: I,
}

impl<B, I> ModuleMapper<B> for Placer<I>
where
    B: AutodiffBackend,
    I: Iterator<Item = Tensor<B::InnerBackend, 1>>,
{
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        let (id, old, mapper) = param.consume();
        let value = match takes_part(&old).then(|| self.flat.next()).flatten() {
            Some(flat) => Tensor::from_inner(flat.reshape(old.shape())).require_grad(),
            None => old,
        };
        Param::from_mapped_value(id, value, mapper)
    }
}

/// Gives a model without gradients the values of some of its parameters.
struct InnerPlacer<B: Backend> {
    path: ModulePath,
    flat: HashMap<String, Tensor<B, 1>>,
}

impl<B: Backend> ModuleMapper<B> for InnerPlacer<B> {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.enter(name);
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.exit();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        let (id, old, mapper) = param.consume();
        let value = match self.flat.remove(&self.path.name()) {
            Some(flat) => flat.reshape(old.shape()),
            None => old,
        };
        Param::from_mapped_value(id, value, mapper)
    }
}

fn flatten<B: Backend, const D: usize>(tensor: Tensor<B, D>) -> Tensor<B, 1> {
    let len = tensor.shape().num_elements();
    tensor.reshape([len])
}
