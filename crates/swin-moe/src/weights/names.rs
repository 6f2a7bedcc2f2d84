//! From a parameter's place in our module tree to its published name and layout.

use crate::model::SwinMoeConfig;

/// How a published tensor relates to ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// The same.
    Same,
    /// The last two dimensions are swapped: PyTorch stores linear weights `[out, in]`.
    Transposed,
    /// A convolution `[out, chans, patch, patch]`; ours is `[chans · patch · patch, out]`.
    Convolution {
        /// Input channels.
        chans: usize,
        /// Height and width of the kernel.
        patch: usize,
    },
}

/// A parameter as the published model has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Published {
    /// Its name in the state dictionary.
    pub name: String,
    /// Its layout.
    pub layout: Layout,
}

/// The naming of one model.
#[derive(Debug, Clone, Copy)]
pub struct Names {
    chans: usize,
    patch: usize,
}

/// Prefix of everything inside a published Mixture-of-Experts block's `mlp`.
pub(super) const MOE_LAYER: &str = "_moe_layer";

/// Endings of tensors of the published state dictionary that follow from the configuration.
const BUFFERS: [&str; 4] = [
    ".relative_coords_table",
    ".relative_position_index",
    ".attn_mask",
    "._num_global_experts",
];

/// Whether this is a table of the published model rather than a parameter.
pub fn is_buffer(name: &str) -> bool {
    BUFFERS.iter().any(|end| name.ends_with(end))
}

impl Names {
    /// The naming of a model of this configuration.
    pub fn new(config: &SwinMoeConfig) -> Self {
        Self {
            chans: config.in_chans,
            patch: config.patch_size,
        }
    }

    /// Translates a path of field names and indices, enum variants left out.
    pub fn published(&self, path: &[String]) -> Published {
        let segments: Vec<&str> = path.iter().map(String::as_str).collect();
        let (name, layout) = match segments.as_slice() {
            ["patch_embed", "proj", "weight"] => (
                segments.join("."),
                Layout::Convolution {
                    chans: self.chans,
                    patch: self.patch,
                },
            ),
            [block @ .., "cpb_mlp", layer @ ("fc1" | "fc2"), leaf] => {
                let index = if *layer == "fc1" { 0 } else { 2 };
                (
                    format!("{}.cpb_mlp.{index}.{leaf}", block.join(".")),
                    linear_layout(leaf, true),
                )
            }
            [block @ .., "mlp", "router", "scorer", leaf] => {
                let (leaf, layout) = match *leaf {
                    "weight" => ("wg.weight", Layout::Transposed),
                    other => (other, Layout::Same),
                };
                (gate_name(block, leaf), layout)
            }
            [block @ .., "mlp", "router", "scorer", module, leaf] => (
                gate_name(block, &format!("{module}.{leaf}")),
                linear_layout(leaf, true),
            ),
            [block @ .., "mlp", part @ ("experts" | "shared"), leaf] => {
                let (leaf, layout) = experts_name(leaf);
                (
                    format!("{}.mlp.{MOE_LAYER}.{part}.{leaf}", block.join(".")),
                    layout,
                )
            }
            [.., module, leaf] => (
                segments.join("."),
                linear_layout(leaf, !module.starts_with("norm")),
            ),
            _ => (segments.join("."), Layout::Same),
        };
        Published { name, layout }
    }
}

fn linear_layout(leaf: &str, is_linear: bool) -> Layout {
    if is_linear && leaf == "weight" {
        Layout::Transposed
    } else {
        Layout::Same
    }
}

/// The published router is a list of one gate.
fn gate_name(block: &[&str], tail: &str) -> String {
    format!("{}.mlp.{MOE_LAYER}.gates.0.{tail}", block.join("."))
}

/// The published layer has no shared experts; theirs are named like the routed ones.
fn experts_name(leaf: &str) -> (&str, Layout) {
    match leaf {
        "w1" => ("batched_fc1_w", Layout::Transposed),
        "b1" => ("batched_fc1_bias", Layout::Same),
        "w2" => ("batched_fc2_w", Layout::Same),
        "b2" => ("batched_fc2_bias", Layout::Same),
        _ => (leaf, Layout::Same),
    }
}

impl Layout {
    /// Our shape in the published layout.
    pub fn published_shape(&self, ours: &[usize]) -> Vec<usize> {
        match (*self, ours) {
            (Layout::Transposed, [batch @ .., rows, cols]) => [batch, &[*cols, *rows]].concat(),
            (Layout::Convolution { chans, patch }, [_, out]) => vec![*out, chans, patch, patch],
            _ => ours.to_vec(),
        }
    }

    /// Values of a tensor of our shape, reordered into the published layout.
    pub fn to_published(&self, ours: &[usize], values: Vec<f32>) -> Vec<f32> {
        match (self, ours) {
            (Layout::Same, _) => values,
            (_, [.., rows, cols]) => transpose(&values, *rows, *cols),
            _ => values,
        }
    }

    /// Published values, reordered for a tensor of our shape.
    pub fn to_ours(&self, ours: &[usize], values: Vec<f32>) -> Vec<f32> {
        match (self, ours) {
            (Layout::Same, _) => values,
            (_, [.., rows, cols]) => transpose(&values, *cols, *rows),
            _ => values,
        }
    }
}

/// Transposes each `[rows, cols]` matrix of a batch.
fn transpose(values: &[f32], rows: usize, cols: usize) -> Vec<f32> {
    let size = rows * cols;
    let mut out = Vec::with_capacity(values.len());
    for matrix in values.chunks_exact(size.max(1)) {
        for col in 0..cols {
            out.extend((0..rows).map(|row| matrix[row * cols + col]));
        }
    }
    out
}
