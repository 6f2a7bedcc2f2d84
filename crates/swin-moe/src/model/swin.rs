//! The whole model.

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::Tensor;
use burn::tensor::backend::Backend;
use hexa_moe::{LoadStats, Moe};
use hexa_ops::ExpertOps;

use super::block::FeedForward;
use super::config::SwinMoeConfig;
use super::error::{ModelError, Result};
use super::layers::{LayerNorm, Linear, LinearOptions};
use super::patch::PatchEmbed;
use super::stage::{Segment, Stage};

/// Patch embedding, stages, norm, mean over the tokens, linear head.
#[derive(Module, Debug)]
pub struct SwinMoe<B: Backend> {
    /// Pixels to tokens.
    pub patch_embed: PatchEmbed<B>,
    /// The stages, first to last.
    pub layers: Vec<Stage<B>>,
    /// Norm of the last stage's tokens.
    pub norm: LayerNorm<B>,
    /// The classifier.
    pub head: Linear<B>,
    #[module(skip)]
    config: SwinMoeConfig,
}

/// What the backbone, which is all but the head, makes of a batch of images.
#[derive(Debug, Clone)]
pub struct SwinFeatures<B: Backend> {
    /// Mean over an image's tokens, after the last norm: `[batch, dim of the last stage]`.
    pub features: Tensor<B, 2>,
    /// Sum of the layers' weighted balance losses: `[1]`.
    pub aux_loss: Tensor<B, 1>,
    /// Load of the experts, one entry for each Mixture-of-Experts layer, first to last.
    pub loads: Vec<LoadStats<B>>,
}

/// What the model says about a batch of images.
#[derive(Debug, Clone)]
pub struct SwinOutput<B: Backend> {
    /// `[batch, classes]`.
    pub logits: Tensor<B, 2>,
    /// Sum of the layers' weighted balance losses: `[1]`.
    pub aux_loss: Tensor<B, 1>,
    /// Load of the experts, one entry for each Mixture-of-Experts layer, first to last.
    pub loads: Vec<LoadStats<B>>,
}

impl<B: ExpertOps> SwinMoe<B> {
    pub(super) fn new(config: &SwinMoeConfig, device: &B::Device) -> Result<Self> {
        let geometry = config.geometry()?;
        let layers = geometry
            .stages
            .iter()
            .map(|stage| Stage::new(config, stage, device))
            .collect::<Result<_>>()?;
        let features = config.stage_dim(config.depths.len() - 1);
        let head = LinearOptions {
            bias: true,
            init_std: config.init_std,
            precision: config.precision,
        };
        let model = Self {
            patch_embed: PatchEmbed::new(config, device),
            layers,
            norm: LayerNorm::new(features, device),
            head: Linear::new(features, config.num_classes, head, device),
            config: config.clone(),
        };
        model.visit(&mut DrawAll);
        Ok(model)
    }

    /// What the model was built from.
    pub fn config(&self) -> &SwinMoeConfig {
        &self.config
    }

    /// Switches noise, dropout and stochastic depth off for good, so that a back-end with autodiff
    /// computes what `valid()` computes, and its gradients.
    pub fn without_noise(mut self) -> Self {
        self.layers = self.layers.into_iter().map(Stage::without_noise).collect();
        self
    }

    /// Applies the model.
    ///
    /// Noise, dropout and stochastic depth are on iff the back-end differentiates, as in Burn's
    /// own modules; evaluate with `model.valid()`.
    ///
    /// # Shapes
    /// `images`: `[batch, channels, size, size]`, normalised, at least one
    ///
    /// # Errors
    /// [`ModelError::Images`] if the images are of another shape.
    pub fn forward(&self, images: Tensor<B, 4>) -> Result<SwinOutput<B>> {
        let SwinFeatures {
            features,
            aux_loss,
            loads,
        } = self.features(images)?;
        Ok(SwinOutput {
            logits: self.classify(features)?,
            aux_loss,
            loads,
        })
    }

    /// Scores of the classes.
    ///
    /// # Shapes
    /// - `features`: those of [`SwinMoe::features`], `[batch, dim]`
    /// - result: `[batch, classes]`, of the features' type
    ///
    /// # Errors
    /// If the features have another width.
    pub fn classify(&self, features: Tensor<B, 2>) -> Result<Tensor<B, 2>> {
        let dtype = features.dtype();
        Ok(self.head.forward(features)?.cast(dtype))
    }

    /// Applies all of the model but its head.
    ///
    /// # Shapes
    /// `images`: as [`SwinMoe::forward`] takes them
    ///
    /// # Errors
    /// As there.
    pub fn features(&self, images: Tensor<B, 4>) -> Result<SwinFeatures<B>> {
        let [batch, ..] = images.dims();
        self.features_of(self.embed(images)?, batch)
    }

    /// Applies all of the model but the patch embedding and the head.
    ///
    /// # Shapes
    /// `x`: as [`SwinMoe::embed`] gives it, `[batch · patches, embed_dim]`
    ///
    /// # Errors
    /// As there.
    pub fn features_of(&self, mut x: Tensor<B, 2>, batch: usize) -> Result<SwinFeatures<B>> {
        let device = x.device();
        let mut aux_loss: Option<Tensor<B, 1>> = None;
        let mut loads = Vec::new();
        for segment in self.segments() {
            let (y, report) = segment.forward(x)?;
            x = y;
            if let Some(report) = report {
                aux_loss = Some(match aux_loss {
                    Some(sum) => sum + report.aux_loss,
                    None => report.aux_loss,
                });
                loads.push(report.load);
            }
        }
        Ok(SwinFeatures {
            features: self.pool(x, batch),
            aux_loss: aux_loss.unwrap_or_else(|| Tensor::zeros([1], &device)),
            loads,
        })
    }

    /// The first part of [`SwinMoe::features`]: images become tokens.
    ///
    /// # Shapes
    /// - `images`: `[batch, channels, size, size]`
    /// - result: `[batch · patches, embed_dim]`
    ///
    /// # Errors
    /// [`ModelError::Images`] if the images are of another shape.
    pub fn embed(&self, images: Tensor<B, 4>) -> Result<Tensor<B, 2>> {
        self.check_images(&images)?;
        self.patch_embed.forward(images)
    }

    /// Its second part: what tokens pass through, one after the other.
    pub fn segments(&self) -> impl Iterator<Item = Segment<'_, B>> {
        self.layers.iter().flat_map(|stage| {
            let blocks = stage.blocks.iter().map(Segment::Block);
            blocks.chain(stage.downsample.iter().map(Segment::Merge))
        })
    }

    /// Its last part: an image's features out of the last segment's tokens.
    ///
    /// # Shapes
    /// - `x`: `[batch · tokens, dim]`
    /// - result: `[batch, dim]`
    pub fn pool(&self, x: Tensor<B, 2>, batch: usize) -> Tensor<B, 2> {
        let x = self.norm.forward(x);
        let [tokens, dim] = x.dims();
        x.reshape([batch, tokens / batch, dim])
            .mean_dim(1)
            .reshape([batch, dim])
    }

    /// What [`SwinMoe::forward`] does on a rank that has no images: its part in the other ranks'
    /// Mixture-of-Experts layers, and nothing else.
    ///
    /// # Errors
    /// If a rank fails.
    pub fn forward_without_images(&self, device: &B::Device) -> Result<SwinOutput<B>> {
        let mut x = Tensor::<B, 2>::empty([0, self.config.stage_dim(0)], device).require_grad();
        let mut aux_loss = Tensor::<B, 1>::zeros([1], device);
        let mut loads = Vec::new();
        let blocks = self.layers.iter().flat_map(|stage| &stage.blocks);
        for block in blocks {
            if let FeedForward::Moe(moe) = &block.mlp {
                moe.prefetch()?;
                // Each layer's input is the output of the one before, so that the backward pass
                // comes to the layers in the same order as on the other ranks.
                let out = moe.try_forward(x.reshape([0, moe.d_model]))?;
                x = out.output;
                aux_loss = aux_loss + out.aux_loss;
                loads.push(out.load);
            }
        }
        Ok(SwinOutput {
            logits: Tensor::empty([0, self.config.num_classes], device),
            aux_loss,
            loads,
        })
    }

    /// Replaces every Mixture-of-Experts layer by what `map` makes of it and of its number.
    ///
    /// # Errors
    /// The first one of `map`.
    pub fn map_moe<E>(
        mut self,
        mut map: impl FnMut(usize, Moe<B>) -> std::result::Result<Moe<B>, E>,
    ) -> std::result::Result<Self, E> {
        let mut number = 0;
        for stage in &mut self.layers {
            for block in &mut stage.blocks {
                if let FeedForward::Moe(moe) = &block.mlp {
                    block.mlp = FeedForward::Moe(map(number, moe.clone())?);
                    number += 1;
                }
            }
        }
        Ok(self)
    }

    /// The Mixture-of-Experts layers, first to last.
    pub fn moe_layers(&self) -> impl Iterator<Item = &Moe<B>> {
        let blocks = self.layers.iter().flat_map(|stage| &stage.blocks);
        blocks.filter_map(|block| match &block.mlp {
            FeedForward::Moe(moe) => Some(moe),
            FeedForward::Dense(_) => None,
        })
    }

    fn check_images(&self, images: &Tensor<B, 4>) -> Result<()> {
        let [batch, chans, height, width] = images.dims();
        let (channels, size) = (self.config.in_chans, self.config.image_size);
        if batch > 0 && (chans, height, width) == (channels, size, size) {
            return Ok(());
        }
        Err(ModelError::Images {
            got: images.dims().to_vec(),
            channels,
            size,
            remedy: "resize the images, or build the model for their size (image_size, in_chans)",
        })
    }
}

/// Draws the parameters that are still lazy, so that the weights follow from the generator's
/// seed at the time of building, whatever is drawn from it later.
struct DrawAll;

impl<B: Backend> ModuleVisitor<B> for DrawAll {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        param.val();
    }
}
