//! Comparison with reference numbers of the published model.
//!
//! A case is a folder with the model's constructor arguments (`config.json`), its weights
//! (`weights.safetensors`, `checkpoint.pth` or both), and inputs and results
//! (`io.safetensors`): `input`, `labels`, `logits`, `aux_loss`, `ce_loss`, `grad_input`,
//! `grad.<name>` of `ce_loss + aux_loss`, and `tokens_per_expert`. Noise and dropout are off.

use core::fmt;
use std::path::{Path, PathBuf};

use burn::tensor::activation::log_softmax;
use burn::tensor::{Tensor, TensorData};
use hexa_moe::MoeError;
use hexa_ops::TrainingBackend;
use serde::Serialize;

use crate::memory::{Held, check_fits};
use crate::model::{ModelError, SwinMoe, SwinMoeConfig};
use crate::weights::{
    HostTensor, ImportOptions, Names, PublishedConfig, TensorMap, Values, WeightsError,
    import_file, named_gradients, published_tensors, read_device, read_file, read_safetensors,
};

/// Why a comparison could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ParityError {
    /// A file cannot be read, or does not fit the model.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// The configuration does not describe a model.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// A Mixture-of-Experts layer failed.
    #[error(transparent)]
    Moe(#[from] MoeError),
    /// The folder lacks something.
    #[error("{}: {what}; a case has config.json, io.safetensors and weights", path.display())]
    Case {
        /// The file or folder.
        path: PathBuf,
        /// What is missing or wrong.
        what: String,
    },
}

/// Difference of one tensor from its reference.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ParityRow {
    /// The tensor's name in the reference.
    pub name: String,
    /// `‖a − b‖ / ‖b‖`; `‖a‖` if the reference is zero; infinite if one of the two is missing.
    pub relative_error: f64,
    /// Norm of the reference.
    pub reference_norm: f64,
}

/// All differences of one case.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ParityReport {
    /// The case's folder.
    pub case: PathBuf,
    /// Largest relative error that passes.
    pub tolerance: f64,
    /// Every compared tensor.
    pub rows: Vec<ParityRow>,
    /// Slots of each expert, by layer: ours.
    pub tokens_per_expert: Vec<Vec<i64>>,
    /// Slots of each expert, by layer: the reference.
    pub reference_tokens_per_expert: Vec<Vec<i64>>,
    /// Names of the weight files, all of which hold the same model.
    pub weight_files: Vec<String>,
}

impl ParityReport {
    /// The largest relative error.
    pub fn worst(&self) -> f64 {
        self.rows
            .iter()
            .map(|row| row.relative_error)
            .fold(0.0, |a, b| if b > a || b.is_nan() { b } else { a })
    }

    /// Whether everything is within the tolerance and every token went to the same experts.
    pub fn passed(&self) -> bool {
        // Written so that NaN fails.
        self.rows
            .iter()
            .all(|row| row.relative_error <= self.tolerance)
            && self.tokens_per_expert == self.reference_tokens_per_expert
    }
}

impl fmt::Display for ParityReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{} ({})",
            self.case.display(),
            self.weight_files.join(", ")
        )?;
        for row in &self.rows {
            let verdict = if row.relative_error <= self.tolerance {
                "ok"
            } else {
                "FAILED"
            };
            writeln!(
                f,
                "  {:<72} {:>10.2e}  {verdict}",
                row.name, row.relative_error
            )?;
        }
        let verdict = if self.tokens_per_expert == self.reference_tokens_per_expert {
            "ok".to_string()
        } else {
            format!(
                "FAILED: {:?}, expected {:?}",
                self.tokens_per_expert, self.reference_tokens_per_expert
            )
        };
        writeln!(
            f,
            "  {:<72} {:>10}  {verdict}",
            "tokens_per_expert", "equal"
        )?;
        write!(
            f,
            "  {}: largest relative error {:.2e}, tolerance {:.0e}",
            if self.passed() { "passed" } else { "FAILED" },
            self.worst(),
            self.tolerance
        )
    }
}

/// Runs one case on a back-end.
///
/// # Errors
/// [`ParityError`] if the comparison cannot be made; a difference is not an error, but a report
/// that has not [`ParityReport::passed`].
pub fn run_parity<B: TrainingBackend>(
    dir: &Path,
    device: &B::Device,
    tolerance: f64,
) -> Result<ParityReport, ParityError> {
    let config = PublishedConfig::read(&dir.join("config.json"))?.to_model()?;
    check_fits(&config, Held::Parameters, 1)?;
    let (model, weight_files) = load_weights::<B>(&config, dir, device)?;
    let case = Case::read(dir, &config)?;

    let images = Tensor::<B, 4>::from_data(case.images, device).require_grad();
    let output = model.forward(images.clone())?;
    let one_hot = Tensor::<B, 2>::from_data(case.one_hot, device);
    let batch = one_hot.dims()[0] as f64;
    let ce_loss = (log_softmax(output.logits.clone(), 1) * one_hot)
        .sum()
        .div_scalar(-batch);
    let gradients = (ce_loss.clone() + output.aux_loss.clone()).backward();

    let mut ours = TensorMap::new();
    for (layer_gradient, tensor) in named_gradients(&model, &gradients, Names::new(&config))? {
        ours.insert(format!("grad.{layer_gradient}"), tensor);
    }
    ours.insert("logits".into(), read_device("logits", &output.logits)?);
    ours.insert(
        "aux_loss".into(),
        read_device("aux_loss", &output.aux_loss)?,
    );
    ours.insert("ce_loss".into(), read_device("ce_loss", &ce_loss)?);
    if let Some(grad) = images.grad(&gradients) {
        ours.insert("grad_input".into(), read_device("grad_input", &grad)?);
    }

    let mut tokens_per_expert = Vec::new();
    for load in &output.loads {
        let counts = load.read()?.tokens_per_expert;
        tokens_per_expert.push(counts.into_iter().map(|c| c as i64).collect());
    }
    Ok(ParityReport {
        case: dir.to_path_buf(),
        tolerance,
        rows: compare(&ours, &case.expected),
        tokens_per_expert,
        reference_tokens_per_expert: case.tokens_per_expert,
        weight_files,
    })
}

/// The inputs and reference numbers of a case.
struct Case {
    images: TensorData,
    one_hot: TensorData,
    expected: TensorMap,
    tokens_per_expert: Vec<Vec<i64>>,
}

impl Case {
    fn read(dir: &Path, config: &SwinMoeConfig) -> Result<Self, ParityError> {
        let path = dir.join("io.safetensors");
        let mut tensors = read_safetensors(&path)?;
        let mut take = |name: &str| {
            tensors.remove(name).ok_or_else(|| ParityError::Case {
                path: path.clone(),
                what: format!("tensor {name} is missing"),
            })
        };
        let wrong = |what: &str| ParityError::Case {
            path: path.clone(),
            what: what.to_string(),
        };

        let input = take("input")?;
        let labels = take("labels")?;
        let counts = take("tokens_per_expert")?;
        let Values::Float(pixels) = input.values else {
            return Err(wrong("input is not of floats"));
        };
        if input.shape.len() != 4 {
            return Err(wrong("input is not of shape [batch, chans, size, size]"));
        }
        let labels = labels
            .as_ints()
            .ok_or_else(|| wrong("labels are not integers"))?;
        if labels.is_empty() {
            return Err(wrong("there is no image in it"));
        }
        if labels.len() != input.shape[0] {
            return Err(wrong("labels and input differ in number"));
        }
        let classes = config.num_classes;
        let mut one_hot = vec![0f32; labels.len() * classes];
        for (row, &label) in labels.iter().enumerate() {
            let label = usize::try_from(label)
                .ok()
                .filter(|&label| label < classes)
                .ok_or_else(|| wrong("a label is not in 0..num_classes"))?;
            one_hot[row * classes + label] = 1.0;
        }
        let num_experts = config.moe.num_experts;
        let tokens_per_expert = counts
            .as_ints()
            .ok_or_else(|| wrong("tokens_per_expert are not integers"))?
            .chunks(num_experts.max(1))
            .map(<[i64]>::to_vec)
            .collect();
        Ok(Self {
            one_hot: TensorData::new(one_hot, [labels.len(), classes]),
            images: TensorData::new(pixels, input.shape),
            expected: tensors,
            tokens_per_expert,
        })
    }
}

/// Loads the model from every weight file there is, and makes sure that all hold the same one.
fn load_weights<B: TrainingBackend>(
    config: &SwinMoeConfig,
    dir: &Path,
    device: &B::Device,
) -> Result<(SwinMoe<B>, Vec<String>), ParityError> {
    let mut loaded: Option<(SwinMoe<B>, TensorMap)> = None;
    let mut files = Vec::new();
    for name in ["weights.safetensors", "checkpoint.pth"] {
        let path = dir.join(name);
        if !path.exists() {
            continue;
        }
        let model = config.init::<B>(device)?.without_noise();
        let (model, _) = import_file(model, &path, ImportOptions::default())?;
        let tensors = published_tensors(&model)?;
        if loaded.as_ref().is_some_and(|(_, first)| *first != tensors) {
            return Err(ParityError::Case {
                path,
                what: "its weights differ from those of weights.safetensors".into(),
            });
        }
        check_buffers(&path, &tensors)?;
        loaded = Some((model, tensors));
        files.push(name.to_string());
    }
    match loaded {
        Some((model, _)) => Ok((model, files)),
        None => Err(ParityError::Case {
            path: dir.to_path_buf(),
            what: "neither weights.safetensors nor checkpoint.pth is there".into(),
        }),
    }
}

/// The tables that we derive from the configuration must be those that the file has, or the
/// published model would not load our export.
fn check_buffers(path: &Path, ours: &TensorMap) -> Result<(), ParityError> {
    let theirs = read_file(path)?;
    let same = |a: &HostTensor, b: &HostTensor| match (&a.values, &b.values) {
        (Values::Float(x), Values::Float(y)) => x.iter().zip(y).all(|(x, y)| (x - y).abs() <= 1e-6),
        (x, y) => x == y,
    };
    for (name, tensor) in &theirs {
        let fits = ours
            .get(name)
            .is_some_and(|own| own.shape == tensor.shape && same(own, tensor));
        if !fits {
            return Err(ParityError::Case {
                path: path.to_path_buf(),
                what: format!("an export of the model would have another {name}"),
            });
        }
    }
    if let Some(name) = ours.keys().find(|name| !theirs.contains_key(*name)) {
        return Err(ParityError::Case {
            path: path.to_path_buf(),
            what: format!("an export of the model would have {name}, which is not there"),
        });
    }
    Ok(())
}

/// One row for every name on either side.
fn compare(ours: &TensorMap, expected: &TensorMap) -> Vec<ParityRow> {
    let mut names: Vec<&String> = ours.keys().chain(expected.keys()).collect();
    names.sort();
    names.dedup();
    names
        .into_iter()
        .map(|name| {
            let (relative_error, reference_norm) = match (ours.get(name), expected.get(name)) {
                (Some(a), Some(b)) => relative_error(a, b),
                _ => (f64::INFINITY, 0.0),
            };
            ParityRow {
                name: name.clone(),
                relative_error,
                reference_norm,
            }
        })
        .collect()
}

/// `‖a − b‖ / ‖b‖` and `‖b‖`, in f64; `‖a‖` where `b` is zero.
fn relative_error(a: &HostTensor, b: &HostTensor) -> (f64, f64) {
    let (Some(x), Some(y)) = (a.as_floats(), b.as_floats()) else {
        return (f64::INFINITY, 0.0);
    };
    if a.shape != b.shape {
        return (f64::INFINITY, 0.0);
    }
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    let difference = norm(&mut x.iter().zip(y).map(|(&x, &y)| f64::from(x) - f64::from(y)));
    let reference = norm(&mut y.iter().map(|&y| f64::from(y)));
    let scale = if reference == 0.0 { 1.0 } else { reference };
    (difference / scale, reference)
}
