//! The model as the published one would save it.

use std::path::Path;

use hexa_ops::ExpertOps;

use super::error::WeightsError;
use super::names::{MOE_LAYER, Names};
use super::params::parameter_values;
use super::tensors::{HostTensor, TensorMap, write_safetensors};
use crate::model::position_bias::{relative_coords_table, relative_position_index};
use crate::model::window::attention_mask;
use crate::model::{SwinMoe, SwinMoeConfig};

/// Writes all parameters and buffers in the published names and layout, so that the published
/// model loads the file strictly.
///
/// # Errors
/// [`WeightsError`] if the file cannot be written or the device fails.
pub fn export_safetensors<B: ExpertOps>(
    model: &SwinMoe<B>,
    path: &Path,
) -> Result<(), WeightsError> {
    write_safetensors(path, &published_tensors(model)?)
}

/// The published state dictionary: parameters and buffers.
///
/// # Errors
/// [`WeightsError`] if the device fails.
pub fn published_tensors<B: ExpertOps>(model: &SwinMoe<B>) -> Result<TensorMap, WeightsError> {
    let mut tensors = parameter_values(model, Names::new(model.config()))?;
    add_buffers(model.config(), &mut tensors)?;
    Ok(tensors)
}

fn add_buffers(config: &SwinMoeConfig, tensors: &mut TensorMap) -> Result<(), WeightsError> {
    for (s, stage) in config.geometry()?.stages.iter().enumerate() {
        for (b, block) in stage.blocks.iter().enumerate() {
            let prefix = format!("layers.{s}.blocks.{b}");
            let (window, layout) = (block.layout.window, block.layout);
            let (side, n) = (2 * window - 1, layout.window_tokens());
            tensors.insert(
                format!("{prefix}.attn.relative_coords_table"),
                HostTensor::float(
                    [1, side, side, 2],
                    relative_coords_table(window, block.pretrained_window),
                ),
            );
            tensors.insert(
                format!("{prefix}.attn.relative_position_index"),
                HostTensor::int([n, n], relative_position_index(window)),
            );
            if let Some(mask) = attention_mask(layout) {
                tensors.insert(
                    format!("{prefix}.attn_mask"),
                    HostTensor::float([layout.num_windows(), n, n], mask),
                );
            }
            if block.is_moe {
                tensors.insert(
                    format!("{prefix}.mlp.{MOE_LAYER}._num_global_experts"),
                    HostTensor::int([], vec![config.moe.num_experts as i64]),
                );
            }
        }
    }
    Ok(())
}
