//! Bounds on products of sizes.

use super::config::{SwinMoeConfig, refuse};
use super::error::Result;

/// Weights of one stage.
const MAX_WEIGHTS: u128 = 1 << 36;

/// Elements of the largest tensor that one image becomes.
const MAX_VALUES_PER_IMAGE: u128 = 1 << 40;

/// Bounds products of sizes that are valid alone, so that no count of elements, bytes or
/// operations overflows.
pub(super) fn validate_extent(config: &SwinMoeConfig) -> Result<()> {
    for (stage, &depth) in config.depths.iter().enumerate() {
        let extent = Extent::of(config, stage);
        let weights = depth as u128 * extent.weights_per_block;
        let values = extent.values_per_image;
        if weights > MAX_WEIGHTS || values > MAX_VALUES_PER_IMAGE {
            return refuse(
                "embed_dim",
                format!(
                    "{}, by which stage {stage} has {weights} weights and {values} values per image",
                    config.embed_dim
                ),
                format!("at most {MAX_WEIGHTS} weights and {MAX_VALUES_PER_IMAGE} values"),
                "lower embed_dim, depths, mlp_ratio, num_experts or image_size",
            );
        }
    }
    Ok(())
}

/// Upper bounds for a block with both kinds of MLP.
struct Extent {
    weights_per_block: u128,
    values_per_image: u128,
}

impl Extent {
    fn of(config: &SwinMoeConfig, stage: usize) -> Self {
        let dim = config.stage_dim(stage) as u128;
        let hidden = config.hidden_dim(stage) as u128;
        // Without experts their settings are not used, and not checked.
        let (experts, top_k, shared) = match config.has_moe() {
            true => (
                config.moe.num_experts as u128,
                config.moe.top_k as u128,
                config.moe.shared_d_ff as u128,
            ),
            false => (0, 1, 0),
        };
        let fc1_width = config.moe.activation.hidden_width(1) as u128;
        let ffn_weights = 2 * hidden + (fc1_width + 1) * (experts * hidden + shared);

        let grid = (config.image_size / config.patch_size) >> stage;
        let window = config.window_size.min(grid) as u128;
        let widest = (3 * dim)
            .max(fc1_width * (top_k * hidden + shared))
            .max(config.num_heads[stage] as u128 * window * window);
        Self {
            weights_per_block: dim * (4 * dim + ffn_weights),
            values_per_image: (grid as u128).pow(2) * widest,
        }
    }
}
