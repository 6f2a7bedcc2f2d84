//! AdamW over a whole model at once.
//!
//! A Swin-MoE has hundreds of parameters, most of them small, and an AdamW step is a dozen
//! elementwise operations: one at a time, launching kernels costs more than running them. Small
//! parameters of one decay group therefore share a flat *bucket*, and the arithmetic runs once per
//! bucket. Parameters become views of the updated bucket, so that unpacking launches nothing where
//! the back-end can view a slice.

mod bucket;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::Tensor;
use burn::tensor::backend::AutodiffBackend;

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
        let buckets = layout.pack(collector.values, Bucket::new);
        AdamW {
            config,
            layout,
            buckets,
            steps: 0,
        }
    }

    /// Updates all parameters and gives the norm of the gradients before clipping, `[1]`.
    ///
    /// Nothing is read back to the host.
    ///
    /// # Errors
    /// [`TrainError::NoGradient`] if a trained parameter has none.
    pub fn step<M: Module<B>>(
        &mut self,
        model: M,
        gradients: B::Gradients,
        lr: f64,
    ) -> Result<(M, Tensor<B::InnerBackend, 1>)> {
        let grads = self.take_gradients(&model, gradients, false)?;
        let norm = global_norm(&grads);
        Ok((self.update(model, grads, norm.clone(), lr), norm))
    }

    /// The gradients of the trained parameters, one tensor per bucket.
    ///
    /// # Errors
    /// [`TrainError::NoGradient`] if a trained parameter has none and `zeros` does not replace it.
    pub(super) fn take_gradients<M: Module<B>>(
        &self,
        model: &M,
        mut gradients: B::Gradients,
        zeros: bool,
    ) -> Result<Vec<Tensor<B::InnerBackend, 1>>> {
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
        Ok(self.layout.pack(taker.taken, |flat, _| flat))
    }

    /// Whether each bucket is of slices.
    pub(super) fn sliced_buckets(&self) -> &[bool] {
        self.layout.sliced_buckets()
    }

    /// Updates all parameters with gradients of this norm, `[1]`.
    pub(super) fn update<M: Module<B>>(
        &mut self,
        model: M,
        grads: Vec<Tensor<B::InnerBackend, 1>>,
        norm: Tensor<B::InnerBackend, 1>,
        lr: f64,
    ) -> M {
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
        let mut placer = Placer {
            flat: self.layout.slices(&self.buckets).into_iter(),
        };
        model.map(&mut placer)
    }

    /// The moments by parameter name, and the number of steps, for a checkpoint.
    ///
    /// # Errors
    /// [`TrainError::Device`] if a read fails.
    pub fn state(&self) -> Result<HostTensors> {
        let mut tensors = HostTensors::new();
        for (kind, pick) in [
            ("first", Bucket::first as fn(&Bucket<B::InnerBackend>) -> _),
            ("second", Bucket::second),
        ] {
            for (bucket_index, bucket) in self.buckets.iter().enumerate() {
                let flat = read(pick(bucket), "the optimizer's moments")?;
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

/// `√ Σ g²` over all buckets; their padding is zero. Buckets are summed in order.
fn global_norm<B: burn::tensor::backend::Backend>(grads: &[Tensor<B, 1>]) -> Tensor<B, 1> {
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
    gradients: &'a mut B::Gradients,
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
        match value.grad_remove(self.gradients) {
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

fn flatten<B: burn::tensor::backend::Backend, const D: usize>(
    tensor: Tensor<B, D>,
) -> Tensor<B, 1> {
    let len = tensor.shape().num_elements();
    tensor.reshape([len])
}
