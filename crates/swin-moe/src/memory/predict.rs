//! Peak memory of a training step, before anything is allocated.
//!
//! A step is walked through part by part: forwards, backwards, and the optimizer's update. Each
//! moment's bytes are the sum of what is there then; the largest sum is the peak.

use core::fmt;

use serde::{Deserialize, Serialize};

use super::layout::{F32, Layout, Rows};
use super::parts::{self, Part};
use crate::info::{ModelInfo, binary};
use crate::model::{Result, SwinMoeConfig};

/// How a model is trained, as far as memory depends on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepShape {
    /// Images of one pass: the batch, or one of its `train.accumulation_steps` parts.
    pub images: usize,
    /// Whether gradients of several passes are summed.
    pub accumulates: bool,
    /// Whether activations are computed a second time (`train.activation_checkpointing`).
    pub checkpoints: bool,
    /// Whether there is a moving average of the parameters (`train.ema_decay`).
    pub averages: bool,
    /// The device's rows.
    pub rows: Rows,
}

/// When most is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Moment {
    /// In the forward pass.
    Forward,
    /// In the backward pass.
    Backward,
    /// While the optimizer updates the parameters.
    Update,
}

/// Predicted bytes at the moment at which most is held.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeakMemory {
    /// When that is.
    pub moment: Moment,
    /// The model's part that is computed then.
    pub part: String,
    /// Parameters in f32 and the model's tables; twice the parameters during an update.
    pub params_bytes: u64,
    /// AdamW's two moments and the moving average.
    pub optimizer_bytes: u64,
    /// Gradients that are there then.
    pub gradients_bytes: u64,
    /// What is kept for the backward pass.
    pub activation_bytes: u64,
    /// Weights rounded to half precision, kept for the backward pass.
    pub rounded_weights_bytes: u64,
    /// What only the part that is computed holds.
    pub transient_bytes: u64,
}

impl PeakMemory {
    /// All of it.
    pub fn total_bytes(&self) -> u64 {
        [
            self.params_bytes,
            self.optimizer_bytes,
            self.gradients_bytes,
            self.activation_bytes,
            self.rounded_weights_bytes,
            self.transient_bytes,
        ]
        .into_iter()
        .fold(0, u64::saturating_add)
    }
}

/// A training step's memory.
#[derive(Debug, Clone)]
pub struct TrainingMemory {
    parts: Vec<Part>,
    /// Bytes of all parameters, and of those that are trained.
    params: u64,
    trained: u64,
    largest_param: u64,
    shape: StepShape,
}

impl TrainingMemory {
    /// Predicts for the model of a configuration.
    ///
    /// # Errors
    /// If the configuration is not valid.
    pub fn new(config: &SwinMoeConfig, shape: StepShape) -> Result<Self> {
        let layout = Layout {
            rows: shape.rows,
            operand: config
                .precision
                .operand_dtype(burn::tensor::DType::F32)
                .size() as u64,
        };
        let info = ModelInfo::new(config, 1)?;
        let state = info.memory();
        Ok(Self {
            parts: parts_of(config, layout, shape.images as u64)?,
            params: state.params_bytes,
            trained: state.gradients_bytes,
            largest_param: largest_param(config)?,
            shape,
        })
    }

    /// Bytes that the forward pass leaves for the backward pass, rounded weights included.
    pub fn kept_bytes(&self) -> u64 {
        if !self.shape.checkpoints {
            return self.sum(Part::left);
        }
        let ends = self.parts.first().into_iter().chain(self.parts.last());
        let ends = ends.map(Part::left).fold(0, u64::saturating_add);
        ends.saturating_add(self.sum(|part| part.input))
    }

    /// The moment at which most is held.
    pub fn peak(&self) -> PeakMemory {
        let first = self.update();
        let passes = if self.shape.checkpoints {
            self.passes_by_segments()
        } else {
            self.passes()
        };
        passes.into_iter().fold(first, |most, moment| {
            if moment.total_bytes() > most.total_bytes() {
                moment
            } else {
                most
            }
        })
    }

    fn sum(&self, field: impl Fn(&Part) -> u64) -> u64 {
        self.parts.iter().map(field).fold(0, u64::saturating_add)
    }

    fn optimizer(&self) -> u64 {
        (2 + u64::from(self.shape.averages)) * self.trained
    }

    /// Before a pass: parameters, optimizer, and the sum of earlier passes' gradients.
    fn at_rest(&self, moment: Moment, part: &str) -> PeakMemory {
        PeakMemory {
            moment,
            part: part.to_owned(),
            params_bytes: self.params + self.sum(|part| part.constants),
            optimizer_bytes: self.optimizer(),
            gradients_bytes: if self.shape.accumulates {
                self.trained
            } else {
                0
            },
            activation_bytes: 0,
            rounded_weights_bytes: 0,
            transient_bytes: 0,
        }
    }

    /// Each part, forwards and backwards.
    fn passes(&self) -> Vec<PeakMemory> {
        let mut moments = Vec::with_capacity(2 * self.parts.len());
        let (mut kept, mut copies) = (0u64, 0u64);
        for part in &self.parts {
            kept = kept.saturating_add(part.kept + part.kept_once);
            copies = copies.saturating_add(part.copies);
            moments.push(PeakMemory {
                activation_bytes: kept,
                rounded_weights_bytes: copies,
                transient_bytes: part.forward,
                ..self.at_rest(Moment::Forward, &part.name)
            });
        }
        let mut gradients = 0;
        for part in self.parts.iter().rev() {
            gradients += part.gradients;
            let rest = self.at_rest(Moment::Backward, &part.name);
            moments.push(PeakMemory {
                gradients_bytes: rest.gradients_bytes + gradients,
                activation_bytes: kept,
                rounded_weights_bytes: copies,
                transient_bytes: part.backward,
                ..rest
            });
            kept -= part.kept + part.kept_once;
            copies -= part.copies;
        }
        moments
    }

    /// Each part, forwards and backwards, where a segment's inputs are kept and the rest is computed
    /// again. The first and the last part are computed once.
    fn passes_by_segments(&self) -> Vec<PeakMemory> {
        let (Some(first), Some(last)) = (self.parts.first(), self.parts.last()) else {
            return Vec::new();
        };
        let middle = &self.parts[1..self.parts.len().max(2) - 1];
        let segments: Vec<&[Part]> = middle.chunk_by(|_, next| next.input == 0).collect();
        let mut moments = Vec::with_capacity(3 * self.parts.len());
        let mut inputs = first.left();
        for segment in &segments {
            inputs = inputs.saturating_add(segment[0].input);
            let mut kept = inputs;
            for part in *segment {
                kept = kept.saturating_add(part.left());
                moments.push(PeakMemory {
                    activation_bytes: kept,
                    transient_bytes: part.forward,
                    ..self.at_rest(Moment::Forward, &part.name)
                });
            }
        }
        let mut gradients = last.gradients;
        let mut output = last.input;
        let rest = self.at_rest(Moment::Backward, &last.name);
        moments.push(PeakMemory {
            gradients_bytes: rest.gradients_bytes + gradients,
            activation_bytes: inputs
                .saturating_add(last.input)
                .saturating_add(last.left()),
            transient_bytes: last.backward,
            ..rest
        });
        for segment in segments.iter().rev() {
            let mut kept = segment
                .iter()
                .map(Part::left)
                .fold(inputs, u64::saturating_add);
            for part in segment.iter().rev() {
                gradients += part.gradients;
                let rest = self.at_rest(Moment::Backward, &part.name);
                moments.push(PeakMemory {
                    gradients_bytes: rest.gradients_bytes + gradients,
                    activation_bytes: kept,
                    // The gradient of the output, of which the scalar to start from is made.
                    transient_bytes: part.backward.saturating_add(output),
                    ..rest
                });
                kept -= part.left();
            }
            inputs -= segment[0].input;
            output = segment[0].input;
        }
        moments
    }

    /// Old and new parameters, gradients, and the arithmetic on the largest parameter.
    ///
    /// The session holds the old parameters until all new ones are there; a gradient goes when its
    /// parameter is done, so that there is never more than at the start.
    fn update(&self) -> PeakMemory {
        let rest = self.at_rest(Moment::Update, "AdamW");
        PeakMemory {
            gradients_bytes: self.trained,
            transient_bytes: 3 * self.largest_param,
            ..rest
        }
    }
}

/// Bytes that each part keeps of one image in f32 without padding, in the order of
/// [`ModelInfo::layers`]; what it keeps once for a whole batch is left out.
///
/// # Errors
/// If the configuration is not valid.
pub fn activations_per_image(config: &SwinMoeConfig) -> Result<impl Iterator<Item = u64>> {
    let layout = Layout {
        rows: Rows::Packed,
        operand: F32,
    };
    let parts = parts_of(config, layout, 1)?;
    Ok(parts.into_iter().map(|part| part.kept))
}

/// Bytes of the largest parameter.
fn largest_param(config: &SwinMoeConfig) -> Result<u64> {
    let experts = config.moe.num_experts;
    let blocks = config.geometry()?;
    let largest = blocks.blocks().map(|block| {
        let width = config.moe.activation.hidden_width(block.hidden);
        let factor = if block.is_moe {
            experts * width
        } else {
            block.hidden
        };
        block.dim * factor
    });
    let head = config.stage_dim(config.depths.len() - 1) * config.num_classes;
    Ok(F32 * largest.max().unwrap_or(0).max(head) as u64)
}

fn parts_of(config: &SwinMoeConfig, layout: Layout, images: u64) -> Result<Vec<Part>> {
    let geometry = config.geometry()?;
    let mut parts = vec![parts::patch_embed(config, layout, images, geometry.patches)];
    for (s, stage) in geometry.stages.iter().enumerate() {
        for (b, block) in stage.blocks.iter().enumerate() {
            let name = format!("layers.{s}.blocks.{b}");
            parts.push(parts::attention(&name, layout, images, block));
            parts.push(if block.is_moe {
                parts::moe(&name, config, layout, images, block)
            } else {
                parts::dense_mlp(&name, config, layout, images, block)
            });
        }
        if stage.merges {
            parts.push(parts::downsample(s, layout, images, stage));
        }
    }
    parts.push(parts::head(config, layout, images));
    Ok(parts)
}

impl fmt::Display for PeakMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let moment = match self.moment {
            Moment::Forward => "forward pass",
            Moment::Backward => "backward pass",
            Moment::Update => "update",
        };
        for (what, bytes) in [
            ("parameters and tables", self.params_bytes),
            ("optimizer", self.optimizer_bytes),
            ("gradients", self.gradients_bytes),
            ("activations", self.activation_bytes),
            ("weights in half precision", self.rounded_weights_bytes),
            ("transient", self.transient_bytes),
        ] {
            writeln!(f, "  {what:<26} {:>12}", binary(bytes))?;
        }
        writeln!(
            f,
            "  {:<26} {:>12}  ({moment}, {})",
            "peak",
            binary(self.total_bytes()),
            self.part
        )
    }
}
