//! Blocks on one grid, and the patch merging that ends it.

use burn::module::Module;
use burn::tensor::Tensor;
use burn::tensor::backend::Backend;
use hexa_ops::ExpertOps;

use super::block::{MoeReport, SwinBlock};
use super::config::SwinMoeConfig;
use super::error::Result;
use super::geometry::StageGeometry;
use super::patch::PatchMerging;

/// A stage of the model.
#[derive(Module, Debug)]
pub struct Stage<B: Backend> {
    /// The blocks, every second one with shifted windows.
    pub blocks: Vec<SwinBlock<B>>,
    /// Patch merging, in all stages but the last.
    pub downsample: Option<PatchMerging<B>>,
}

impl<B: ExpertOps> Stage<B> {
    /// The stage with these sizes.
    ///
    /// # Errors
    /// If a Mixture-of-Experts layer refuses its settings.
    pub fn new(config: &SwinMoeConfig, stage: &StageGeometry, device: &B::Device) -> Result<Self> {
        let blocks = stage
            .blocks
            .iter()
            .map(|block| SwinBlock::new(config, block, device))
            .collect::<Result<_>>()?;
        let downsample = stage.merges.then(|| {
            PatchMerging::new(
                stage.dim,
                stage.grid,
                config.init_std,
                config.precision,
                device,
            )
        });
        Ok(Self { blocks, downsample })
    }

    /// Switches noise, dropout and stochastic depth off for good.
    pub fn without_noise(mut self) -> Self {
        self.blocks = self
            .blocks
            .into_iter()
            .map(SwinBlock::without_noise)
            .collect();
        self
    }
}

/// What tokens pass through as a whole.
#[derive(Debug, Clone, Copy)]
pub enum Segment<'a, B: Backend> {
    /// A block.
    Block(&'a SwinBlock<B>),
    /// The patch merging that ends a stage.
    Merge(&'a PatchMerging<B>),
}

impl<B: ExpertOps> Segment<'_, B> {
    /// Applies it; a Mixture-of-Experts block reports.
    ///
    /// # Shapes
    /// - `x`: `[batch · grid · grid, dim]`
    /// - result: like `x`; `[batch · grid/2 · grid/2, 2 · dim]` of a merging
    ///
    /// # Errors
    /// If the number of channels is another.
    pub fn forward(&self, x: Tensor<B, 2>) -> Result<(Tensor<B, 2>, Option<MoeReport<B>>)> {
        match self {
            Segment::Block(block) => block.forward(x),
            Segment::Merge(merge) => Ok((merge.forward(x)?, None)),
        }
    }
}
