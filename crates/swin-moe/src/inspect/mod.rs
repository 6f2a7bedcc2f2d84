//! Which expert took which patch of an image: the choices, pictures of them, and a page.

mod glyphs;
mod page;
mod palette;
mod picture;

use burn::tensor::Transaction;
use burn::tensor::backend::Backend;

use crate::model::SwinOutput;
use crate::model::geometry::Geometry;

pub use page::{Entry, Figure, render};
pub use palette::expert_color;
pub use picture::{expert_picture, input_picture, png};

/// The experts that one Mixture-of-Experts layer chose first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerChoices {
    /// The layer's stage, from zero.
    pub stage: usize,
    /// Its block in the stage, from zero.
    pub block: usize,
    /// Patches a side.
    pub grid: usize,
    /// Experts there are.
    pub num_experts: usize,
    /// First choice of each patch: `[batch, grid, grid]`, by image, row, column.
    pub experts: Vec<usize>,
}

impl LayerChoices {
    /// The layer's choices for one image of the batch: `[grid, grid]`.
    pub fn image(&self, index: usize) -> &[usize] {
        let patches = self.grid * self.grid;
        let start = index * patches;
        self.experts.get(start..start + patches).unwrap_or_default()
    }
}

/// Reads the first choices of all layers of a model with this geometry. This waits for the device,
/// once.
///
/// # Errors
/// The device's words, if it failed.
pub fn layer_choices<B: Backend>(
    output: &SwinOutput<B>,
    geometry: &Geometry,
) -> Result<Vec<LayerChoices>, String> {
    let places = geometry.stages.iter().enumerate().flat_map(|(stage, s)| {
        let blocks = s.blocks.iter().enumerate();
        blocks
            .filter(|(_, block)| block.is_moe)
            .map(move |(index, block)| (stage, index, block.layout.grid))
    });
    let mut transaction = Transaction::<B>::default();
    let mut layers = Vec::new();
    for ((stage, block, grid), load) in places.zip(&output.loads) {
        let Some(routing) = &load.routing else {
            continue;
        };
        // Blocks keep tokens by image, row and column; only their attention sorts them by window.
        transaction = transaction.register(routing.gating.expert_ids.clone().narrow(1, 0, 1));
        layers.push(LayerChoices {
            stage,
            block,
            grid,
            num_experts: routing.logits.dims()[1],
            experts: Vec::new(),
        });
    }
    if layers.is_empty() {
        return Ok(layers);
    }
    let data = transaction.try_execute().map_err(|e| e.to_string())?;
    for (layer, ids) in layers.iter_mut().zip(data) {
        layer.experts = ids.iter::<i64>().map(|id| id.max(0) as usize).collect();
    }
    Ok(layers)
}
