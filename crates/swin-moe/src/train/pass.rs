//! A forward and a backward pass over a batch: with all activations kept in between, or with those
//! of one segment of the model at a time (activation checkpointing, arXiv:1604.06174).

use burn::tensor::Tensor;
use hexa_moe::LoadStats;
use hexa_ops::{TrainingBackend, memory};

use super::error::{Result, TrainError};
use super::finetune;
use super::loss::{Targets, cross_entropy};
use super::random::segment_seed;
use crate::config::{Config, Freeze};
use crate::model::SwinMoe;

/// How the losses of a batch are formed.
#[derive(Debug, Clone, Copy)]
pub struct LossWeights {
    /// See [`cross_entropy`].
    pub label_smoothing: f64,
    /// Factor of the mean cross entropy.
    pub ce: f64,
    /// Factor of the layers' balance losses.
    pub aux: f64,
    /// Factor that gradients have, and losses have not.
    pub scale: f64,
}

/// What a pass gives.
#[derive(Debug)]
pub struct Pass<B: TrainingBackend> {
    /// Cross entropy with its factor: `[1]`.
    pub ce_loss: Tensor<B::InnerBackend, 1>,
    /// Balance losses with their factor: `[1]`.
    pub aux_loss: Tensor<B::InnerBackend, 1>,
    /// The gradient of each trained parameter is in one of them.
    pub gradients: Vec<B::Gradients>,
    /// Load of the experts, layers in the model's order.
    pub loads: Vec<LoadStats<B>>,
}

/// The pass that the settings ask for; `seed` is that of what it draws a second time.
pub(super) fn by_settings<B: TrainingBackend>(
    config: &Config,
    model: &SwinMoe<B>,
    images: Tensor<B, 4>,
    targets: Targets<B>,
    weights: LossWeights,
    seed: u64,
) -> Result<Pass<B>> {
    let freeze = config.init.freeze;
    // A frozen backbone keeps nothing.
    if config.train.activation_checkpointing && freeze == Freeze::None {
        let seed = |segment| segment_seed(seed, segment);
        by_segments(model, images, targets, weights, seed)
    } else {
        whole(model, images, targets, weights, freeze)
    }
}

/// The pass that keeps all activations.
///
/// # Errors
/// If the model refuses the images, or a rank fails.
pub fn whole<B: TrainingBackend>(
    model: &SwinMoe<B>,
    images: Tensor<B, 4>,
    targets: Targets<B>,
    weights: LossWeights,
    freeze: Freeze,
) -> Result<Pass<B>> {
    let device = images.device();
    let output = finetune::forward(model, images, freeze)?;
    let ce_loss = cross_entropy(output.logits, targets, weights.label_smoothing);
    let ce_loss = weighed(ce_loss, weights.ce);
    let aux_loss = weighed(output.aux_loss, weights.aux);
    let loss = ce_loss.clone() + aux_loss.clone();
    let gradients = weighed(loss, weights.scale).backward();
    memory::note::<B>(&device);
    Ok(Pass {
        ce_loss: ce_loss.inner(),
        aux_loss: aux_loss.inner(),
        gradients: vec![gradients],
        loads: output.loads,
    })
}

/// The pass of a rank that has no images: its part in the other ranks' experts.
///
/// # Errors
/// If a rank fails.
pub(super) fn without_images<B: TrainingBackend>(
    model: &SwinMoe<B>,
    weights: LossWeights,
    freeze: Freeze,
    device: &B::Device,
) -> Result<Pass<B>> {
    let output = finetune::forward_without_images(model, device, freeze)?;
    let aux_loss = weighed(output.aux_loss, weights.aux);
    let has_graph = freeze == Freeze::Backbone || model.moe_layers().next().is_some();
    Ok(Pass {
        ce_loss: Tensor::zeros([1], device),
        aux_loss: aux_loss.clone().inner(),
        gradients: has_graph
            .then(|| weighed(aux_loss, weights.scale).backward())
            .into_iter()
            .collect(),
        loads: output.loads,
    })
}

/// The pass that keeps the inputs of the model's segments, and computes what is between them a
/// second time when the backward pass comes there.
///
/// Both times, the generator is seeded with the segment's own `seed`: what the first pass drops, the
/// second one drops.
///
/// # Errors
/// As [`whole`].
pub fn by_segments<B: TrainingBackend>(
    model: &SwinMoe<B>,
    images: Tensor<B, 4>,
    targets: Targets<B>,
    weights: LossWeights,
    seed: impl Fn(usize) -> u64,
) -> Result<Pass<B>> {
    let (device, batch) = (images.device(), images.dims()[0]);
    let segments: Vec<_> = model.segments().collect();
    let embedded = model.embed(images)?;

    let mut aux_loss = Tensor::zeros([1], &device);
    let mut loads = Vec::new();
    let mut inputs = Vec::with_capacity(segments.len());
    let mut x = embedded.clone().inner();
    for (number, segment) in segments.iter().enumerate() {
        B::seed(&device, seed(number));
        let input = Tensor::from_inner(x.clone()).require_grad();
        let anchor = Anchor::new(&input);
        let (y, report) = segment.forward(input)?;
        inputs.push(std::mem::replace(&mut x, y.inner()));
        if let Some(report) = report {
            aux_loss = aux_loss + weighed(report.aux_loss, weights.aux).inner();
            loads.push(report.load);
        }
        anchor.free_graph();
    }

    let last = Tensor::from_inner(x).require_grad();
    let logits = model.classify(model.pool(last.clone(), batch))?;
    let ce_loss = cross_entropy(logits, targets, weights.label_smoothing);
    let ce_loss = weighed(ce_loss, weights.ce);
    let mut gradients = Vec::with_capacity(segments.len() + 2);
    let scaled = weighed(ce_loss.clone(), weights.scale);
    let mut upstream = backward(scaled, last, &mut gradients)?;
    for (number, (segment, input)) in segments.iter().zip(inputs).enumerate().rev() {
        B::seed(&device, seed(number));
        let input = Tensor::from_inner(input).require_grad();
        let (y, report) = segment.forward(input.clone())?;
        let loss = product(y, upstream);
        let loss = match report {
            Some(report) => loss + weighed(report.aux_loss, weights.aux * weights.scale),
            None => loss,
        };
        upstream = backward(loss, input, &mut gradients)?;
    }
    gradients.push(product(embedded, upstream).backward());
    memory::note::<B>(&device);
    Ok(Pass {
        ce_loss: ce_loss.inner(),
        aux_loss,
        gradients,
        loads,
    })
}

/// Goes backwards from `loss`, and gives the gradient of `input`.
fn backward<B: TrainingBackend>(
    loss: Tensor<B, 1>,
    input: Tensor<B, 2>,
    gradients: &mut Vec<B::Gradients>,
) -> Result<Tensor<B::InnerBackend, 2>> {
    let mut found = loss.backward();
    memory::note::<B>(&input.device());
    let gradient = input.grad_remove(&mut found);
    gradients.push(found);
    gradient.ok_or_else(|| TrainError::NoGradient {
        name: "(the tokens between two blocks)".to_owned(),
    })
}

/// A scalar whose gradient with respect to `y` is `upstream`.
fn product<B: TrainingBackend>(
    y: Tensor<B, 2>,
    upstream: Tensor<B::InnerBackend, 2>,
) -> Tensor<B, 1> {
    (y * Tensor::from_inner(upstream)).sum()
}

/// Frees what a forward pass whose output is gone has left.
///
/// Burn looks for that in backward passes only, and in their own graph. So there is one, from one of
/// the input's values to the input. It starts from a node that was there before the forward pass:
/// Burn 0.21 forgets to which graph an input belongs once that graph has become part of another.
struct Anchor<B: TrainingBackend>(Tensor<B, 2>);

impl<B: TrainingBackend> Anchor<B> {
    fn new(input: &Tensor<B, 2>) -> Self {
        Anchor(input.clone().slice([0..1, 0..1]))
    }

    fn free_graph(self) {
        drop(self.0.backward());
    }
}

fn weighed<B: TrainingBackend>(loss: Tensor<B, 1>, factor: f64) -> Tensor<B, 1> {
    if factor == 1.0 { loss } else { loss * factor }
}
