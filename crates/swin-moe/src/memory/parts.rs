//! What each part of the model keeps between forward and backward pass, operation by operation.
//!
//! A tensor is kept if an operation's gradient reads it. Burn's operations read: a product of
//! elements its other factor, a quotient both terms, `exp`, `sqrt`, `log` and `erf` their argument;
//! sums, differences, permutations and casts nothing. This project's nodes read: a dense product
//! its rounded operands, GELU its argument, the fused expert FFN its tokens, gate weights, weights
//! and pre-activation.

use hexa_moe::RouterConfig;

use super::layout::{F32, Layout};
use crate::model::SwinMoeConfig;
use crate::model::geometry::{BlockGeometry, StageGeometry};
use crate::model::position_bias::HIDDEN;

/// Bytes of one part of the model in one pass over a batch.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Part {
    /// Published name of the module.
    pub name: String,
    /// Tables that are there as long as the model.
    pub constants: u64,
    /// Kept for the backward pass.
    pub kept: u64,
    /// Kept as well, whatever the number of images.
    pub kept_once: u64,
    /// Weights rounded to half precision, kept as well.
    pub copies: u64,
    /// The tokens that come in, where a segment of the model begins; they are kept instead of all
    /// that follows where activations are computed again.
    pub input: u64,
    /// Only there while the forward pass is in this part.
    pub forward: u64,
    /// Only there while the backward pass is in this part.
    pub backward: u64,
    /// Gradients of its parameters, as the backward pass leaves them.
    pub gradients: u64,
}

impl Part {
    /// All that is kept.
    pub fn left(&self) -> u64 {
        self.kept + self.kept_once + self.copies
    }
}

/// A layer norm: the centred and the normalised values, variance and deviation of each row.
fn norm(layout: Layout, rows: u64, channels: u64) -> u64 {
    2 * layout.f32(rows, channels) + 2 * rows * F32
}

pub(super) fn patch_embed(
    config: &SwinMoeConfig,
    layout: Layout,
    images: u64,
    patches: usize,
) -> Part {
    let rows = images * (patches * patches) as u64;
    let pixels = (config.in_chans * config.patch_size * config.patch_size) as u64;
    let dim = config.embed_dim as u64;
    // The product's f32 result is centred in place.
    let centred = if layout.is_half() {
        layout.f32(rows, dim)
    } else {
        layout.packed(rows, dim)
    };
    let norm = match config.patch_norm {
        true => centred + layout.f32(rows, dim) + 2 * rows * F32,
        false => 0,
    };
    Part {
        name: "patch_embed".into(),
        kept: layout.operands(rows, pixels) + norm,
        forward: layout.f32(rows, pixels) + 2 * layout.f32(rows, dim),
        backward: 3 * layout.f32(rows, dim),
        gradients: F32 * (pixels * dim + 3 * dim),
        ..Part::default()
    }
}

/// `norm1` and `attn`.
pub(super) fn attention(name: &str, layout: Layout, images: u64, block: &BlockGeometry) -> Part {
    let grid = (block.layout.grid * block.layout.grid) as u64;
    let rows = images * grid;
    let n = block.layout.window_tokens() as u64;
    let (dim, heads) = (block.dim as u64, block.num_heads as u64);
    let head_dim = dim / heads;

    // Query scaled, and queries, keys and values in one tensor where parts of it need no copies.
    let per_part = layout.operands(heads * rows, head_dim);
    let qkv = if per_part.is_multiple_of(layout.rows.alignment()) {
        4 * per_part
    } else {
        3 * per_part
    };
    // Softmax: the argument of `exp` in place of the product's result, `exp`, its sums, and the
    // weights as the next product reads them.
    let score_rows = heads * rows;
    let packed_scores = F32 * score_rows * n;
    let exps = layout.f32(score_rows, n);
    let weights = layout.operands(score_rows, n);
    let softmax = packed_scores + exps + score_rows * F32 + weights;
    let side = (2 * block.layout.window - 1) as u64;
    let position_bias = 2 * F32 * side * side * HIDDEN as u64;
    let mask = match block.layout.shift {
        0 => 0,
        _ => layout.f32(block.layout.num_windows() as u64 * n, n),
    };
    let stream = layout.f32(rows, dim);
    let params = 2 * dim + 3 * dim * (dim + 1) + dim * (dim + 1);
    let hidden = HIDDEN as u64;
    Part {
        name: format!("{name}.attn"),
        input: stream,
        constants: mask + layout.f32(side * side, 2) + layout.f32(n, side),
        kept: norm(layout, rows, dim) + 2 * layout.operands(rows, dim) + qkv + softmax,
        kept_once: position_bias,
        copies: layout.copy(dim, 3 * dim) + layout.copy(dim, dim),
        forward: stream
            + layout
                .packed(rows, 3 * dim)
                .max(if layout.is_half() { exps } else { 0 }),
        backward: 2 * stream + (packed_scores + exps).saturating_sub(weights),
        gradients: F32 * (params + 3 * hidden + hidden * heads),
    }
}

/// `norm2` and a dense `mlp`.
pub(super) fn dense_mlp(
    name: &str,
    config: &SwinMoeConfig,
    layout: Layout,
    images: u64,
    block: &BlockGeometry,
) -> Part {
    let rows = images * (block.layout.grid * block.layout.grid) as u64;
    let (dim, hidden) = (block.dim as u64, block.hidden as u64);
    let activations = layout.packed(rows, hidden);
    let stream = layout.f32(rows, dim);
    let bias = if config.fc2_bias { dim } else { 0 };
    Part {
        name: format!("{name}.mlp"),
        kept: norm(layout, rows, dim) + layout.operands(rows, dim) + 2 * activations,
        copies: layout.copy(dim, hidden) + layout.copy(hidden, dim),
        forward: 2 * stream,
        backward: 2 * stream + activations,
        gradients: F32 * (2 * dim + 2 * dim * hidden + hidden + bias),
        ..Part::default()
    }
}

/// `norm2` and a Mixture-of-Experts `mlp`.
pub(super) fn moe(
    name: &str,
    config: &SwinMoeConfig,
    layout: Layout,
    images: u64,
    block: &BlockGeometry,
) -> Part {
    let moe = &config.moe;
    let rows = images * (block.layout.grid * block.layout.grid) as u64;
    let (dim, experts) = (block.dim as u64, moe.num_experts as u64);
    let slots = rows * moe.top_k as u64;
    let width = |hidden: usize| moe.activation.hidden_width(hidden) as u64;

    let stream = layout.f32(rows, dim);
    // The router reads f32.
    let tokens = stream
        + if layout.is_half() {
            layout.operands(rows, dim)
        } else {
            0
        };
    let routed = Ffn::of(
        layout,
        experts,
        dim,
        block.hidden as u64,
        width(block.hidden),
    );
    let shared = match moe.shared_d_ff {
        0 => Ffn::default(),
        hidden => Ffn::of(layout, 1, dim, hidden as u64, width(hidden)),
    };
    // Gate weights (and rounded), ids, and both directions of the index.
    let choices = |slots| slots * (2 * F32 + 2 * F32) + layout.copy(slots, 1);
    let shared_kept = match moe.shared_d_ff {
        0 => 0,
        hidden => choices(rows) + layout.packed(rows, width(hidden)),
    };
    let pre_activation = layout.packed(slots, width(block.hidden));
    let (routing, router_params) = router(config, layout, rows, dim);
    Part {
        name: format!("{name}.mlp (experts)"),
        kept: norm(layout, rows, dim)
            + tokens
            + routing
            + choices(slots)
            + pre_activation
            + shared_kept,
        copies: routed.copies + shared.copies,
        forward: 2 * stream + layout.packed(slots, block.hidden as u64 + dim),
        backward: 2 * stream + 2 * pre_activation + layout.packed(slots, block.hidden as u64),
        gradients: F32 * (2 * dim + router_params) + routed.gradients + shared.gradients,
        ..Part::default()
    }
}

/// Weights of expert networks.
#[derive(Default)]
struct Ffn {
    copies: u64,
    /// In the type of the product until the backward pass has come to the weights themselves.
    gradients: u64,
}

impl Ffn {
    fn of(layout: Layout, experts: u64, dim: u64, hidden: u64, width: u64) -> Self {
        let biases = layout.copy(experts, width) + layout.copy(experts, dim);
        Self {
            copies: layout.copy(experts * dim, width) + layout.copy(experts * hidden, dim) + biases,
            gradients: layout.operand * experts * (dim * width + hidden * dim + width + dim),
        }
    }
}

/// What scores and balance losses keep, and the router's parameters.
fn router(config: &SwinMoeConfig, layout: Layout, rows: u64, dim: u64) -> (u64, u64) {
    let moe = &config.moe;
    let experts = moe.num_experts as u64;
    let scores = layout.f32(rows, experts);
    let (scorer, params) = match moe.router {
        RouterConfig::Linear => (0, dim * experts),
        // The projection and its squares' roots, unit vectors, cosines.
        RouterConfig::Cosine { dim: width, .. } => {
            let width = width as u64;
            (
                F32 * rows * (width + experts + 3) + layout.f32(rows, width),
                dim * width + width + width * experts + 1,
            )
        }
    };
    let mut kept = F32 * rows * experts + scorer;
    if moe.balance.load_importance > 0.0 {
        // Softmax, the last choice and the argument of the error function.
        kept += 4 * scores + F32 * rows;
    }
    if moe.balance.z_loss > 0.0 {
        kept += scores + 2 * F32 * rows;
    }
    (kept, params)
}

pub(super) fn downsample(index: usize, layout: Layout, images: u64, stage: &StageGeometry) -> Part {
    let dim = stage.dim as u64;
    let rows = images * (stage.grid * stage.grid / 4) as u64;
    let merged = layout.f32(rows, 4 * dim);
    Part {
        name: format!("layers.{index}.downsample"),
        input: layout.f32(4 * rows, dim),
        kept: norm(layout, rows, 4 * dim) + layout.operands(rows, 4 * dim),
        copies: layout.copy(4 * dim, 2 * dim),
        forward: merged,
        backward: 3 * merged,
        gradients: F32 * (8 * dim + 8 * dim * dim),
        ..Part::default()
    }
}

/// The last norm, the classifier and the loss.
pub(super) fn head(config: &SwinMoeConfig, layout: Layout, images: u64) -> Part {
    let last = config.depths.len() - 1;
    let dim = config.stage_dim(last) as u64;
    let classes = config.num_classes as u64;
    let grid = (config.image_size / config.patch_size) >> last;
    let rows = images * (grid * grid) as u64;
    let logits = layout.f32(images, classes);
    Part {
        name: "norm, head, loss".into(),
        input: layout.f32(rows, dim),
        kept: norm(layout, rows, dim) + layout.operands(images, dim) + logits,
        copies: layout.copy(dim, classes),
        forward: layout.f32(rows, dim) + 3 * logits,
        backward: 2 * layout.f32(rows, dim) + 3 * logits,
        gradients: F32 * (2 * dim + (dim + 1) * classes),
        ..Part::default()
    }
}
