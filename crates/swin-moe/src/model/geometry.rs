//! Sizes of stages and blocks, as plain numbers: for the model, its buffers and its description.

use super::config::SwinMoeConfig;

/// Tokens a side in a stage of a model with `patches` patches a side, if the stages divide it.
pub fn grid_of_stage(patches: usize, stage: usize) -> Option<usize> {
    patches
        .is_multiple_of(1 << stage)
        .then_some(patches >> stage)
        .filter(|&grid| grid > 0)
}

/// Sizes of the whole model.
#[derive(Debug, Clone, PartialEq)]
pub struct Geometry {
    /// Tokens a side after the patch embedding.
    pub patches: usize,
    /// The stages, first to last.
    pub stages: Vec<StageGeometry>,
}

/// Sizes of one stage.
#[derive(Debug, Clone, PartialEq)]
pub struct StageGeometry {
    /// Channels.
    pub dim: usize,
    /// Tokens a side.
    pub grid: usize,
    /// Attention heads.
    pub num_heads: usize,
    /// Hidden width of the MLPs.
    pub hidden: usize,
    /// Window that the position bias is scaled to; 0 for the block's own.
    pub pretrained_window: usize,
    /// Whether the stage ends with a patch merging.
    pub merges: bool,
    /// The blocks, first to last.
    pub blocks: Vec<BlockGeometry>,
}

/// Sizes of one block.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BlockGeometry {
    /// Channels.
    pub dim: usize,
    /// Attention heads.
    pub num_heads: usize,
    /// Hidden width of the MLP.
    pub hidden: usize,
    /// Window that the position bias is scaled to; 0 for `window`.
    pub pretrained_window: usize,
    /// Windows and shift.
    pub layout: WindowLayout,
    /// Whether the MLP is a Mixture-of-Experts layer.
    pub is_moe: bool,
    /// Probability that a sample skips a branch.
    pub drop_path: f64,
}

/// How a grid of tokens is cut into windows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WindowLayout {
    /// Tokens a side.
    pub grid: usize,
    /// Tokens a side of a window.
    pub window: usize,
    /// Cyclic shift before the cut, in tokens.
    pub shift: usize,
}

impl WindowLayout {
    /// A window as large as the grid or larger is clamped to it, and then nothing is shifted.
    pub fn new(grid: usize, window: usize, shifted: bool) -> Self {
        if grid <= window {
            Self {
                grid,
                window: grid,
                shift: 0,
            }
        } else {
            Self {
                grid,
                window,
                shift: if shifted { window / 2 } else { 0 },
            }
        }
    }

    /// Windows in the grid.
    pub fn num_windows(&self) -> usize {
        (self.grid / self.window).pow(2)
    }

    /// Tokens in a window.
    pub fn window_tokens(&self) -> usize {
        self.window * self.window
    }
}

impl Geometry {
    /// Sizes of a validated configuration.
    pub(super) fn new(config: &SwinMoeConfig) -> Self {
        let patches = config.image_size / config.patch_size;
        let num_blocks: usize = config.depths.iter().sum();
        let mut index = 0;
        let stages = (0..config.depths.len())
            .map(|stage| {
                let dim = config.stage_dim(stage);
                let grid = patches >> stage;
                let blocks = (0..config.depths[stage])
                    .map(|block| {
                        let drop_path = match num_blocks {
                            1 => 0.0,
                            n => config.drop_path * index as f64 / (n - 1) as f64,
                        };
                        index += 1;
                        BlockGeometry {
                            dim,
                            num_heads: config.num_heads[stage],
                            hidden: config.hidden_dim(stage),
                            pretrained_window: config.pretrained_window_sizes[stage],
                            layout: WindowLayout::new(grid, config.window_size, block % 2 == 1),
                            is_moe: config.is_moe(stage, block),
                            drop_path,
                        }
                    })
                    .collect();
                StageGeometry {
                    dim,
                    grid,
                    num_heads: config.num_heads[stage],
                    hidden: config.hidden_dim(stage),
                    pretrained_window: config.pretrained_window_sizes[stage],
                    merges: stage + 1 < config.depths.len(),
                    blocks,
                }
            })
            .collect();
        Self { patches, stages }
    }

    /// All blocks, first to last.
    pub fn blocks(&self) -> impl Iterator<Item = &BlockGeometry> {
        self.stages.iter().flat_map(|stage| &stage.blocks)
    }
}
