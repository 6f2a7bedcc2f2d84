//! Which parameter lies where in which flat bucket, and the update of a bucket.

use std::collections::HashMap;

use burn::tensor::backend::Backend;
use burn::tensor::{Tensor, TensorData};

use super::super::params::HostTensors;
use super::{AdamWConfig, NamedShape, decays};

/// Offsets are multiples of this many values (256 bytes of f32), the widest alignment that GPU
/// APIs ask of a view.
const ALIGNMENT: usize = 64;
/// A parameter of this many values or more has a bucket of its own: packing would copy it.
const LARGE: usize = 1 << 18;

/// A parameter's place.
#[derive(Debug, Clone)]
pub(super) struct Slot {
    pub name: String,
    pub shape: Vec<usize>,
    pub bucket: usize,
    pub offset: usize,
}

impl Slot {
    pub(super) fn len(&self) -> usize {
        self.shape.iter().product()
    }

    fn padded_len(&self) -> usize {
        self.len().next_multiple_of(ALIGNMENT)
    }
}

/// The places of all parameters, in the order of the model's visit.
#[derive(Debug)]
pub(super) struct Layout {
    slots: Vec<Slot>,
    /// Whether weight decay acts on the bucket.
    bucket_decays: Vec<bool>,
    /// Whether the bucket is of a rank's slices.
    bucket_slices: Vec<bool>,
}

impl Layout {
    /// Gives each parameter a place: small ones share one bucket per decay group, slices apart.
    pub(super) fn plan(params: Vec<NamedShape>) -> Self {
        let mut bucket_decays = Vec::new();
        let mut bucket_slices = Vec::new();
        let mut bucket_lens: Vec<usize> = Vec::new();
        let mut shared: [[Option<usize>; 2]; 2] = [[None; 2]; 2];
        let slots = params
            .into_iter()
            .map(|param| {
                let NamedShape {
                    name,
                    shape,
                    is_slice,
                } = param;
                let decay = decays(&name, shape.len());
                let mut open = || {
                    bucket_decays.push(decay);
                    bucket_slices.push(is_slice);
                    bucket_lens.push(0);
                    bucket_decays.len() - 1
                };
                let bucket = if shape.iter().product::<usize>() >= LARGE {
                    open()
                } else {
                    *shared[usize::from(is_slice)][usize::from(decay)].get_or_insert_with(open)
                };
                let slot = Slot {
                    name,
                    shape,
                    bucket,
                    offset: bucket_lens[bucket],
                };
                bucket_lens[bucket] += slot.padded_len();
                slot
            })
            .collect();
        Layout {
            slots,
            bucket_decays,
            bucket_slices,
        }
    }

    pub(super) fn sliced_buckets(&self) -> &[bool] {
        &self.bucket_slices
    }

    pub(super) fn num_slots(&self) -> usize {
        self.slots.len()
    }

    pub(super) fn slots_of(&self, bucket: usize) -> impl Iterator<Item = &Slot> {
        self.slots.iter().filter(move |slot| slot.bucket == bucket)
    }

    /// Joins flat tensors, one per slot in order, into the buckets' flat tensors.
    pub(super) fn pack<B: Backend, T>(
        &self,
        values: Vec<Tensor<B, 1>>,
        make: impl Fn(Tensor<B, 1>, bool) -> T,
    ) -> Vec<T> {
        let mut parts: Vec<Vec<Tensor<B, 1>>> = vec![Vec::new(); self.bucket_decays.len()];
        for (slot, value) in self.slots.iter().zip(values) {
            let padding = slot.padded_len() - slot.len();
            let device = value.device();
            parts[slot.bucket].push(value);
            if padding > 0 {
                parts[slot.bucket].push(Tensor::zeros([padding], &device));
            }
        }
        parts
            .into_iter()
            .zip(&self.bucket_decays)
            .map(|(mut parts, &decay)| {
                let flat = match parts.len() {
                    1 => parts.remove(0),
                    _ => Tensor::cat(parts, 0),
                };
                make(flat, decay)
            })
            .collect()
    }

    /// The parameters' flat values out of the buckets', one per slot in order.
    pub(super) fn slices<B: Backend>(&self, buckets: &[Tensor<B, 1>]) -> Vec<Tensor<B, 1>> {
        self.slots
            .iter()
            .map(|slot| {
                let flat = buckets[slot.bucket].clone();
                if flat.dims()[0] == slot.len() {
                    flat
                } else {
                    flat.narrow(0, slot.offset, slot.len())
                }
            })
            .collect()
    }

    /// As [`Layout::slices`], by the parameters' names.
    pub(super) fn named_slices<B: Backend>(
        &self,
        buckets: &[Tensor<B, 1>],
    ) -> HashMap<String, Tensor<B, 1>> {
        let names = self.slots.iter().map(|slot| slot.name.clone());
        names.zip(self.slices(buckets)).collect()
    }

    /// Takes one kind of moment of a bucket's parameters out of a checkpoint's tensors.
    pub(super) fn flat_state(
        &self,
        bucket: usize,
        kind: &str,
        tensors: &mut HostTensors,
    ) -> Result<Vec<f32>, String> {
        let mut flat = Vec::new();
        for slot in self.slots_of(bucket) {
            let name = format!("{kind}.{}", slot.name);
            let tensor = tensors
                .remove(&name)
                .ok_or_else(|| format!("the optimizer's tensor {name} is missing"))?;
            if tensor.shape != slot.shape {
                return Err(format!(
                    "the optimizer's tensor {name} has shape {:?}, allowed is {:?}",
                    tensor.shape, slot.shape
                ));
            }
            flat.extend(tensor.values);
            flat.resize(slot.offset + slot.padded_len(), 0.0);
        }
        Ok(flat)
    }
}

/// Parameters that are updated together, and their moments.
#[derive(Debug)]
pub(super) struct Bucket<B: Backend> {
    params: Tensor<B, 1>,
    first: Tensor<B, 1>,
    second: Tensor<B, 1>,
    /// Moving average of the parameters.
    average: Option<Tensor<B, 1>>,
    decay: bool,
}

impl<B: Backend> Bucket<B> {
    pub(super) fn new(params: Tensor<B, 1>, decay: bool, averages: bool) -> Self {
        Bucket {
            first: params.zeros_like(),
            second: params.zeros_like(),
            average: averages.then(|| params.clone()),
            params,
            decay,
        }
    }

    pub(super) fn params(&self) -> Tensor<B, 1> {
        self.params.clone()
    }

    pub(super) fn average(&self) -> Option<Tensor<B, 1>> {
        self.average.clone()
    }

    pub(super) fn set_average(&mut self, average: Vec<f32>) {
        let len = average.len();
        let data = TensorData::new(average, [len]);
        self.average = Some(Tensor::from_data(data, &self.params.device()));
    }

    pub(super) fn first(&self) -> Tensor<B, 1> {
        self.first.clone()
    }

    pub(super) fn second(&self) -> Tensor<B, 1> {
        self.second.clone()
    }

    pub(super) fn set_moments(&mut self, first: Vec<f32>, second: Vec<f32>) {
        let device = self.params.device();
        let upload = |values: Vec<f32>| {
            let len = values.len();
            Tensor::from_data(TensorData::new(values, [len]), &device)
        };
        self.first = upload(first);
        self.second = upload(second);
    }

    /// One step, the `step`-th from one. Consumes itself, so that the back-end may reuse memory.
    ///
    /// ```text
    /// m ← β₁ m + (1 − β₁) g          v ← β₂ v + (1 − β₂) g²
    /// p ← (1 − lr·wd) p − lr / (1 − β₁ᵗ) · m / (√v / √(1 − β₂ᵗ) + ε)
    /// a ← d a + (1 − d) p             the moving average, if there is one
    /// ```
    pub(super) fn updated(
        self,
        grad: Tensor<B, 1>,
        config: &AdamWConfig,
        lr: f64,
        step: u64,
    ) -> Self {
        let &AdamWConfig { beta1, beta2, .. } = config;
        let step = step.min(i32::MAX as u64) as i32;
        let first_correction = 1.0 - beta1.powi(step);
        let second_correction = (1.0 - beta2.powi(step)).sqrt();

        let first = self.first.mul_scalar(beta1) + grad.clone().mul_scalar(1.0 - beta1);
        let second = self.second.mul_scalar(beta2) + grad.square().mul_scalar(1.0 - beta2);
        let denominator = second
            .clone()
            .sqrt()
            .mul_scalar(1.0 / second_correction)
            .add_scalar(config.epsilon);
        let update = first
            .clone()
            .div(denominator)
            .mul_scalar(lr / first_correction);
        let params = if self.decay && config.weight_decay > 0.0 {
            self.params.mul_scalar(1.0 - lr * config.weight_decay)
        } else {
            self.params
        };
        let params = params - update;
        let average = self.average.map(|average| {
            let decay = config.ema_decay_at(step as u64);
            average.mul_scalar(decay) + params.clone().mul_scalar(1.0 - decay)
        });
        Bucket {
            params,
            first,
            second,
            average,
            decay: self.decay,
        }
    }
}
