//! Fine-tuning: a new run that starts with another model's weights, at its own image size, window
//! size and number of classes.
//!
//! No parameter's shape depends on the sizes of images and windows: the position bias is an MLP of
//! coordinates, and these are computed from the window that the weights were trained with
//! (`model.pretrained_window_sizes`), so that an offset of one token stays what it was.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use burn::module::{AutodiffModule, Module};
use burn::tensor::Tensor;
use hexa_ops::TrainingBackend;

use super::error::{Result, TrainError};
use super::inference::Trained;
use super::params::{HostTensors, read_tensor, write_params};
use super::run_dir::RunDir;
use crate::config::{Config, Freeze, InitSource};
use crate::model::geometry::StageGeometry;
use crate::model::{SwinMoe, SwinOutput};
use crate::settings::model_config;
use crate::weights::{HostTensor, ImportReport, TensorMap, import_tensors, read_file};
use hexa_moe::LoadStats;

const REMEDY: &str = "give [model] and [moe] the settings that these weights were trained with; \
                      image_size, window_size and the number of classes alone may differ";

/// Parameters of the head, in our names and in the published ones.
const HEAD: [&str; 2] = ["head.weight", "head.bias"];

/// Another model's weights, on the host.
#[derive(Debug, Clone)]
pub(super) struct Origin {
    /// The checkpoint or the file.
    path: PathBuf,
    weights: Weights,
    /// Window that each stage's position bias is scaled to, where it is known.
    windows: Vec<Option<usize>>,
    /// What was made of them, for the log.
    notes: Vec<String>,
}

#[derive(Debug, Clone)]
enum Weights {
    /// By their path in the model.
    Ours(Arc<HostTensors>),
    /// In the published names and layout.
    Published(Arc<TensorMap>),
}

impl Origin {
    /// Reads the weights that a new run is to start with, and scales its position bias to their
    /// windows where `model.pretrained_window_sizes` leaves that open; none if it is to draw its
    /// own.
    ///
    /// # Errors
    /// [`TrainError`] if they cannot be read.
    pub(super) fn open(config: &mut Config, num_classes: usize) -> Result<Option<Self>> {
        let Some(source) = config.init.source.clone() else {
            return Ok(None);
        };
        let mut origin = match &source {
            InitSource::Run(path) => Self::of_run(path)?,
            InitSource::Weights(path) => Self::of_file(path, config.model.depths.len())?,
        };
        let note = format!("starting with the weights of {source}");
        origin.notes.push(note);
        origin.scale_position_bias(config, num_classes)?;
        Ok(Some(origin))
    }

    fn of_run(path: &Path) -> Result<Self> {
        let trained = if path.join("manifest.jsonl").is_file() {
            Trained::load(path)?
        } else {
            Trained::load_best(&RunDir::open(path)?)?
        };
        let classes = trained.state().class_names.len();
        let geometry = model_config(trained.config(), classes)?.geometry()?;
        Ok(Origin {
            path: trained.path().to_path_buf(),
            windows: geometry.stages.iter().map(scaled_to).collect(),
            weights: Weights::Ours(Arc::new(trained.into_weights())),
            notes: Vec::new(),
        })
    }

    fn of_file(path: &Path, stages: usize) -> Result<Self> {
        let tensors = read_file(path)?;
        let table = |stage| format!("layers.{stage}.blocks.0.attn.relative_coords_table");
        Ok(Origin {
            path: path.to_path_buf(),
            windows: (0..stages)
                .map(|stage| scale_of_table(tensors.get(&table(stage))?))
                .collect(),
            weights: Weights::Published(Arc::new(tensors)),
            notes: Vec::new(),
        })
    }

    fn scale_position_bias(&mut self, config: &mut Config, num_classes: usize) -> Result<()> {
        let geometry = model_config(config, num_classes)?.geometry()?;
        let sizes = &mut config.model.pretrained_window_sizes;
        let before = sizes.clone();
        for ((size, own), origin) in sizes.iter_mut().zip(&geometry.stages).zip(&self.windows) {
            if let Some(window) = *origin
                && *size == 0
                && scaled_to(own) != *origin
            {
                // Of windows of one and of two tokens, the greatest offset counts as one.
                *size = window.max(2);
            }
        }
        if *sizes != before {
            self.notes.push(format!(
                "the position bias is scaled to the windows of these weights: \
                 model.pretrained_window_sizes = {sizes:?}"
            ));
        }
        Ok(())
    }

    /// The model with these weights, and what there is to say about it. Its head is as it was if
    /// theirs has another number of classes.
    ///
    /// # Errors
    /// [`TrainError::Checkpoint`] with every tensor besides the head that is missing, unexpected or
    /// of another shape.
    pub(super) fn apply<B: TrainingBackend>(
        &self,
        model: SwinMoe<B>,
    ) -> Result<(SwinMoe<B>, Vec<String>)> {
        let unfit = |reason| TrainError::Checkpoint {
            path: self.path.clone(),
            reason,
            remedy: REMEDY,
        };
        let [width, classes] = model.head.weight.dims();
        let (model, theirs) = match &self.weights {
            Weights::Ours(tensors) => {
                let mut tensors = HostTensors::clone(tensors);
                let theirs = match tensors.get(HEAD[0]).map(|head| head.shape.as_slice()) {
                    Some(&[of, theirs]) if of == width && theirs != classes => {
                        keep_head(&model, &mut tensors)?;
                        Some(theirs)
                    }
                    _ => None,
                };
                (write_params(model, tensors).map_err(unfit)?, theirs)
            }
            Weights::Published(tensors) => {
                let (model, mut report) = import_tensors(model, TensorMap::clone(tensors));
                let theirs = take_head(&mut report, width);
                if !report.is_exact() {
                    return Err(unfit(report.to_string()));
                }
                (model, theirs)
            }
        };
        let mut notes = self.notes.clone();
        notes.push(match theirs {
            Some(theirs) => {
                format!("the head is fresh: the weights know {theirs} classes, the data {classes}")
            }
            None => format!("the head is theirs, too: {classes} classes"),
        });
        Ok((model, notes))
    }
}

/// Window that a stage's position bias is scaled to.
fn scaled_to(stage: &StageGeometry) -> Option<usize> {
    let block = stage.blocks.first()?;
    Some(match block.pretrained_window {
        0 => block.layout.window,
        window => window,
    })
}

/// The same from the published table of coordinates, `[1, side, side, 2]`: that of an offset of one
/// is `log2(8 / (window − 1) + 1) / 3`.
fn scale_of_table(table: &HostTensor) -> Option<usize> {
    let &[1, side, other, 2] = table.shape.as_slice() else {
        return None;
    };
    if side != other || side % 2 == 0 || side < 3 {
        return None;
    }
    // The middle is the offset zero; the column's coordinate is the second one.
    let middle = side / 2;
    let one = *table
        .as_floats()?
        .get(2 * (middle * side + middle + 1) + 1)?;
    let window = (8.0 / ((3.0 * one).exp2() - 1.0)).round() + 1.0;
    (2.0..=256.0).contains(&window).then_some(window as usize)
}

/// Puts the model's own head in the place of theirs.
fn keep_head<B: TrainingBackend>(model: &SwinMoe<B>, tensors: &mut HostTensors) -> Result<()> {
    let failed = || TrainError::device("while the head was read");
    let weight = read_tensor(model.head.weight.val()).map_err(failed())?;
    tensors.insert(HEAD[0].to_owned(), weight);
    if let Some(bias) = &model.head.bias {
        let bias = read_tensor(bias.val()).map_err(failed())?;
        tensors.insert(HEAD[1].to_owned(), bias);
    }
    Ok(())
}

/// Takes a head of another number of classes out of what does not fit, and gives that number.
fn take_head(report: &mut ImportReport, width: usize) -> Option<usize> {
    let shape = |name: &str| {
        let found = report.mismatched.iter().find(|found| found.name == name)?;
        found.dtype.is_none().then(|| found.got.clone())
    };
    let [weight, bias] = HEAD.map(shape);
    let classes = match (weight?.as_slice(), bias?.as_slice()) {
        (&[classes, of], &[biases]) if of == width && classes == biases => classes,
        _ => return None,
    };
    let is_head = |name: &str| HEAD.contains(&name);
    report.mismatched.retain(|found| !is_head(&found.name));
    Some(classes)
}

/// The model with the parameters that are not to be trained marked as such.
pub(super) fn frozen<B: TrainingBackend>(model: SwinMoe<B>, freeze: Freeze) -> SwinMoe<B> {
    match freeze {
        Freeze::None => model,
        Freeze::Backbone => {
            let head = model.head.clone();
            let mut model = model.no_grad();
            model.head = head;
            model
        }
    }
}

/// The model's forward pass in training.
///
/// A frozen backbone keeps nothing for a backward pass, and does what it does in evaluation; its
/// balance losses, which nothing could lower, are left out.
pub(super) fn forward<B: TrainingBackend>(
    model: &SwinMoe<B>,
    images: Tensor<B, 4>,
    freeze: Freeze,
) -> Result<SwinOutput<B>> {
    match freeze {
        Freeze::None => Ok(model.forward(images)?),
        Freeze::Backbone => {
            let device = images.device();
            let found = model.valid().features(images.inner())?;
            Ok(SwinOutput {
                logits: model.classify(Tensor::from_inner(found.features))?,
                aux_loss: Tensor::zeros([1], &device),
                loads: found.loads.into_iter().map(LoadStats::from_inner).collect(),
            })
        }
    }
}

/// [`SwinMoe::forward_without_images`], likewise. Its losses can be differentiated.
pub(super) fn forward_without_images<B: TrainingBackend>(
    model: &SwinMoe<B>,
    device: &B::Device,
    freeze: Freeze,
) -> Result<SwinOutput<B>> {
    match freeze {
        Freeze::None => Ok(model.forward_without_images(device)?),
        Freeze::Backbone => {
            let found = model.valid().forward_without_images(device)?;
            Ok(SwinOutput {
                logits: Tensor::from_inner(found.logits),
                aux_loss: model.head.weight.val().sum() * 0.0,
                loads: found.loads.into_iter().map(LoadStats::from_inner).collect(),
            })
        }
    }
}

/// What a run with a frozen backbone has to say about it.
pub(super) fn frozen_note<B: TrainingBackend>(
    model: &SwinMoe<B>,
    freeze: Freeze,
) -> Option<String> {
    let (head, all) = (model.head.num_params(), model.num_params());
    (freeze == Freeze::Backbone).then(|| {
        format!(
            "linear probe: {head} of {all} parameters are trained, those of the head; the backbone \
             computes as in evaluation"
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::position_bias::relative_coords_table;

    fn table(window: usize, pretrained: usize) -> HostTensor {
        let side = 2 * window - 1;
        HostTensor::float(
            [1, side, side, 2],
            relative_coords_table(window, pretrained),
        )
    }

    #[test]
    fn a_table_tells_what_it_is_scaled_to() {
        for window in 2..=24 {
            assert_eq!(scale_of_table(&table(window, 0)), Some(window));
            for pretrained in [2, 3, 7, 12, 16, 64, 256] {
                let found = scale_of_table(&table(window, pretrained));
                assert_eq!(found, Some(pretrained), "{window}");
            }
        }
        // One token tells nothing, and neither do numbers of something else.
        assert_eq!(scale_of_table(&table(1, 0)), None);
        for value in [0.0, -1.0, f32::NAN, f32::INFINITY] {
            let other = HostTensor::float([1, 3, 3, 2], vec![value; 18]);
            assert_eq!(scale_of_table(&other), None, "{value}");
        }
        let other = HostTensor::float([1, 3, 5, 2], vec![0.5; 30]);
        assert_eq!(scale_of_table(&other), None);
    }

    /// What scaling is for: in windows of another size, an offset's coordinates are what they were.
    #[test]
    fn offsets_keep_their_coordinates() {
        let (small, large) = (table(4, 0), table(7, 4));
        let (small, large) = (small.as_floats().unwrap(), large.as_floats().unwrap());
        for row in 0..7 {
            for col in 0..7 {
                let [a, b] = [row * 7 + col, (row + 3) * 13 + col + 3];
                assert_eq!(small[2 * a..2 * a + 2], large[2 * b..2 * b + 2]);
            }
        }
    }
}
