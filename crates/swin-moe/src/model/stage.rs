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

    /// Appends a report per Mixture-of-Experts layer to `reports`.
    ///
    /// # Shapes
    /// - `x`: `[batch · grid · grid, dim]`
    /// - result: `[batch · grid/2 · grid/2, 2 · dim]`, or like `x` in the last stage
    ///
    /// # Errors
    /// If the number of channels is another.
    pub fn forward(
        &self,
        mut x: Tensor<B, 2>,
        reports: &mut Vec<MoeReport<B>>,
    ) -> Result<Tensor<B, 2>> {
        for block in &self.blocks {
            let (y, report) = block.forward(x)?;
            reports.extend(report);
            x = y;
        }
        match &self.downsample {
            Some(merge) => merge.forward(x),
            None => Ok(x),
        }
    }
}
