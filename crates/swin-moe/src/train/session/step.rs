//! One optimizer step.

use burn::tensor::Tensor;
use hexa_ops::{TrainingBackend, memory};

use super::Session;
use crate::data::Batch;
use crate::train::device::{self, scalar};
use crate::train::error::Result;
use crate::train::optimizer::FlatGradients;
use crate::train::pass::{self, LossWeights};
use crate::train::random::{pass_seed, step_seed};
use crate::train::ranks::Reduced;

/// What one step leaves on the device for the log.
pub(super) struct StepTrace<B: TrainingBackend> {
    /// Images of all ranks.
    pub images: usize,
    /// On several ranks, this rank's addend.
    pub ce_loss: Tensor<B::InnerBackend, 1>,
    pub aux_loss: Tensor<B::InnerBackend, 1>,
    pub grad_norm: Tensor<B::InnerBackend, 1>,
    /// Of each part of the step, its layers'.
    pub loads: Vec<hexa_moe::LoadStats<B>>,
    pub lr: f64,
}

/// Sums over the parts of a step.
struct PartSums<B: TrainingBackend> {
    ce_loss: Tensor<B::InnerBackend, 1>,
    aux_loss: Tensor<B::InnerBackend, 1>,
    gradients: FlatGradients<B::InnerBackend>,
    /// Of each part, its layers'.
    loads: Vec<hexa_moe::LoadStats<B>>,
}

impl<B: TrainingBackend> PartSums<B> {
    fn plus(self, other: Self) -> Self {
        PartSums {
            ce_loss: self.ce_loss + other.ce_loss,
            aux_loss: self.aux_loss + other.aux_loss,
            gradients: self.gradients.plus(other.gradients),
            loads: [self.loads, other.loads].concat(),
        }
    }
}

impl<B: TrainingBackend> Session<'_, B> {
    /// One optimizer step; none without images on any rank. A run alone reads nothing from the
    /// device.
    pub(super) fn step(&mut self, batch: Batch) -> Result<Option<StepTrace<B>>> {
        let share = self
            .ranks
            .begin_step(batch.len(), self.control.stop.is_raised())?;
        if share.global == 0 {
            return Ok(None);
        }
        let lr = self.schedule.lr_at(self.place.step);
        let seed = step_seed(self.config.train.seed, self.place.step);
        B::seed(self.device, seed);
        let position = batch.position as u64;
        if (self.place.step + 1).is_multiple_of(self.log_every()) {
            self.memory.watch();
        }
        let parts = self.config.train.accumulation_steps;
        let mut sums: Option<PartSums<B>> = None;
        for (number, part) in self.ranks.parts(batch, parts).into_iter().enumerate() {
            let Some(part) = self.part(part, share.global, pass_seed(seed, number))? else {
                continue;
            };
            sums = Some(match sums {
                Some(sums) => sums.plus(part),
                None => part,
            });
        }
        let Some(PartSums {
            ce_loss,
            aux_loss,
            gradients,
            loads,
        }) = sums
        else {
            return Ok(None);
        };
        let gradients = match self.place.loss_scale {
            Some(scale) => gradients.times(1.0 / f64::from(scale.value())),
            None => gradients,
        };
        let Reduced {
            gradients,
            norm: grad_norm,
        } = self.ranks.reduce(&self.optimizer, gradients)?;
        let place = &mut self.place;
        let is_accepted = match &mut place.loss_scale {
            // In f16 a step waits for the device, as it may have to be left out.
            Some(scale) => scale.accept(scalar(grad_norm.clone())?, place.step + 1, lr)?,
            None => true,
        };
        if is_accepted {
            let (model, norm) = (self.model.clone(), grad_norm.clone());
            self.model = self.optimizer.update(model, gradients, norm, lr);
            memory::note::<B>(self.device);
        }
        place.ce_sum = place.ce_sum.clone() + ce_loss.clone();
        place.aux_sum = place.aux_sum.clone() + aux_loss.clone();
        place.step += 1;
        place.batch = position + 1;
        Ok(Some(StepTrace {
            images: share.global,
            ce_loss,
            aux_loss,
            grad_norm,
            loads,
            lr,
        }))
    }

    /// Losses and gradients of a part of a step's images, weighted by its share of them; none
    /// without images on any rank.
    fn part(&self, part: Batch, images: usize, seed: u64) -> Result<Option<PartSums<B>>> {
        let share = self.ranks.share(part.len(), images)?;
        if share.global == 0 {
            return Ok(None);
        }
        let weights = LossWeights {
            label_smoothing: self.config.train.label_smoothing,
            ce: share.local as f64 / images as f64,
            aux: share.global as f64 / images as f64,
            scale: self
                .place
                .loss_scale
                .map_or(1.0, |scale| f64::from(scale.value())),
        };
        let is_empty = part.is_empty();
        let pass = if is_empty {
            pass::without_images(&self.model, weights, self.config.init.freeze, self.device)?
        } else {
            let (images, targets) = device::upload::<B>(part, self.device);
            pass::by_settings(&self.config, &self.model, images, targets, weights, seed)?
        };
        let gradients = self
            .optimizer
            .gradients_or_zeros(&self.model, pass.gradients, is_empty)?;
        Ok(Some(PartSums {
            ce_loss: pass.ce_loss,
            aux_loss: pass.aux_loss,
            gradients,
            loads: pass.loads,
        }))
    }
}
