//! What can be done with a trained model: evaluate, predict, export; and importing one.

use std::fs;
use std::path::{Path, PathBuf};

use burn::tensor::{Tensor, TensorData};
use hexa_ops::{ExpertOps, TrainingBackend};

use super::checkpoint::{Checkpoint, RunState};
use super::device::read;
use super::error::{Result, TrainError};
use super::evaluate::{Evaluation, evaluate_together};
use super::faults::DeviceFaults;
use super::images::{TestImages, prepare_file};
use super::optimizer::averages;
use super::params::{HostTensors, read_params, write_params};
use super::ranks::{Planned, RankJob, Ranks, Seat, Snapshot, launch};
use super::request::ParallelOverrides;
use super::run_dir::RunDir;
use super::setup::check_classes;
use super::tally::softmax;
use crate::backend::{BackendKind, Job, check_precision, dispatch};
use crate::config::{Config, DataSource, Precision};
use crate::memory::{Held, check_fits};
use crate::model::SwinMoe;
use crate::settings::model_config;
use crate::weights::{
    HostTensor, ImportOptions, ImportReport, TensorMap, import_file, published_tensors,
    write_safetensors,
};

/// Images per step when predicting.
pub(super) const PREDICT_BATCH: usize = 32;

/// A checkpoint that has been read and whose settings have been checked.
#[derive(Debug, Clone)]
pub struct Trained {
    path: PathBuf,
    checkpoint: Checkpoint,
    config: Config,
    faults: DeviceFaults,
}

impl Trained {
    /// Reads a checkpoint's directory.
    ///
    /// # Errors
    /// [`TrainError`] if it is missing, damaged or of another version.
    pub fn load(path: &Path) -> Result<Self> {
        Self::of(Checkpoint::load(path)?, path)
    }

    /// Reads a run's best checkpoint, or the latest if there is no best one.
    ///
    /// # Errors
    /// As [`Trained::load`], if no checkpoint of the run is whole.
    pub fn load_best(run: &RunDir) -> Result<Self> {
        let (checkpoint, path) = run.load_best()?;
        Self::of(checkpoint, &path)
    }

    fn of(checkpoint: Checkpoint, path: &Path) -> Result<Self> {
        let origin = "the checkpoint's configuration";
        let config = Config::from_toml::<&str>(&checkpoint.state.config, origin, &[])?;
        Ok(Trained {
            path: path.to_path_buf(),
            checkpoint,
            config,
            faults: DeviceFaults::default(),
        })
    }

    /// Has every result checked against what `faults` has heard of the device.
    pub fn with_faults(mut self, faults: DeviceFaults) -> Self {
        self.faults = faults;
        self
    }

    /// What the device's thread has reported.
    pub(super) fn faults(&self) -> &DeviceFaults {
        &self.faults
    }

    /// With these settings of ranks, for [`Trained::evaluate`], and so many images per step. The
    /// run's own ranks are not those of an evaluation.
    ///
    /// # Errors
    /// [`TrainError::Config`] if they do not fit together.
    pub fn with_parallel(
        mut self,
        overrides: &ParallelOverrides,
        batch_size: Option<usize>,
    ) -> Result<Self> {
        let mut raw = self.config.to_raw();
        raw.parallel = Default::default();
        if let Some(batch_size) = batch_size {
            raw.train.eval_batch_size = batch_size;
        }
        self.config = overrides.apply(&raw.validate()?)?;
        Ok(self)
    }

    /// Has the model computed in another arithmetic than it was trained in.
    pub fn with_precision(mut self, precision: Precision) -> Self {
        self.config.train.precision = precision;
        self
    }

    /// The checkpoint's directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where the run stood.
    pub fn state(&self) -> &RunState {
        &self.checkpoint.state
    }

    /// The run's settings.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Accuracy, loss and load on the test images, of `folder` if given; `None` on processes that
    /// do not speak for their MPI job.
    ///
    /// # Errors
    /// [`TrainError`] if the images do not fit the model or cannot be read.
    pub fn evaluate(
        mut self,
        backend: BackendKind,
        folder: Option<PathBuf>,
    ) -> Result<Option<Evaluation>> {
        if let Some(folder) = folder {
            self.config.data.source = DataSource::Folder(folder);
        }
        let images = TestImages::open(&self.config)?;
        check_classes(&self.checkpoint.state, images.class_names(), &self.path)?;
        let parallel = self.config.parallel.clone();
        let trained = self;
        launch(backend, &parallel, Evaluate { trained, images })
    }

    /// The five likeliest classes of each image file, in order.
    ///
    /// # Errors
    /// [`TrainError`] for the first file that cannot be read.
    pub fn predict(self, backend: BackendKind, files: &[PathBuf]) -> Result<Vec<Prediction>> {
        Ok(self.score(backend, files)?.predictions())
    }

    /// The scores of image files, and what the model saw of them.
    ///
    /// # Errors
    /// [`TrainError`] for the first file that cannot be read.
    pub fn score(self, backend: BackendKind, files: &[PathBuf]) -> Result<Scores> {
        let job = Score {
            trained: self,
            files: files.to_vec(),
        };
        dispatch(backend, job)?
    }

    /// Writes the model in the published names and layout.
    ///
    /// # Errors
    /// [`TrainError`] if the file cannot be written.
    pub fn export(self, backend: BackendKind, output: &Path) -> Result<()> {
        let job = Export {
            trained: self,
            output: output.to_path_buf(),
        };
        dispatch(backend, job)?
    }

    /// What was evaluated in training.
    pub(super) fn into_weights(self) -> HostTensors {
        evaluated(self.checkpoint)
    }

    /// The model on a device that computes in its arithmetic, without autodiff.
    pub(super) fn model_to_run<B: TrainingBackend>(
        self,
        device: &B::Device,
    ) -> Result<(SwinMoe<B::InnerBackend>, RunState, Config)> {
        check_precision::<B>(device, self.config.train.precision)?;
        self.model::<B>(device)
    }

    /// The model on a device, without autodiff.
    pub(super) fn model<B: TrainingBackend>(
        self,
        device: &B::Device,
    ) -> Result<(SwinMoe<B::InnerBackend>, RunState, Config)> {
        let state = self.checkpoint.state.clone();
        let config = model_config(&self.config, state.class_names.len())?;
        check_fits(&config, Held::Parameters, 1)?;
        let model = config.init::<B::InnerBackend>(device)?;
        let params = evaluated(self.checkpoint);
        let model = write_params(model, params).map_err(|reason| TrainError::Checkpoint {
            path: self.path,
            reason,
            remedy: "it was written by another version of this program",
        })?;
        Ok((model, state, self.config))
    }
}

/// The weights, or their moving averages where there are any.
fn evaluated(checkpoint: Checkpoint) -> HostTensors {
    let mut params = checkpoint.model;
    params.extend(averages(&checkpoint.optimizer));
    params
}

#[derive(Clone)]
struct Evaluate {
    trained: Trained,
    images: TestImages,
}

impl RankJob for Evaluate {
    type Output = Option<Evaluation>;

    fn run<B: TrainingBackend>(self, device: &B::Device, seat: Seat) -> Result<Self::Output> {
        let faults = self.trained.faults.clone();
        let (model, _, config) = self.trained.model_to_run::<B>(device)?;
        let batch_size = config.train.eval_batch_size;
        let (ranks, model) = Ranks::join(&seat, &config, Planned::default(), model)?;
        let result = evaluate_together(&ranks, &model, &self.images, batch_size, device)?;
        faults.check("while images were evaluated")?;
        Ok(ranks.is_lead().then_some(result))
    }
}

/// What the model takes an image for.
#[derive(Debug, Clone, PartialEq)]
pub struct Prediction {
    /// The image file.
    pub file: PathBuf,
    /// Class names and probabilities, likeliest first; five, or as many as there are.
    pub classes: Vec<(String, f64)>,
}

/// Images as the model saw them, and what it made of them.
#[derive(Debug, Clone, PartialEq)]
pub struct Scores {
    files: Vec<PathBuf>,
    class_names: Vec<String>,
    /// Channels, height and width.
    image_shape: [usize; 3],
    images: Vec<f32>,
    logits: Vec<f32>,
}

impl Scores {
    /// The five likeliest classes of each file, in order.
    pub fn predictions(&self) -> Vec<Prediction> {
        let rows = self.logits.chunks_exact(self.class_names.len().max(1));
        let files = self.files.iter().zip(rows);
        files
            .map(|(file, row)| Prediction {
                file: file.clone(),
                classes: likeliest(row, &self.class_names),
            })
            .collect()
    }

    /// Writes `images` (`[files, channels, height, width]`, normalised) and `logits`
    /// (`[files, classes]`), f32, as safetensors.
    ///
    /// # Errors
    /// [`TrainError::Weights`] if the file cannot be written.
    pub fn write(&self, output: &Path) -> Result<()> {
        let files = self.files.len();
        let [channels, height, width] = self.image_shape;
        let images = HostTensor::float([files, channels, height, width], self.images.clone());
        let logits = HostTensor::float([files, self.class_names.len()], self.logits.clone());
        let tensors = [("images", images), ("logits", logits)];
        let tensors = tensors.map(|(name, tensor)| (name.to_owned(), tensor));
        Ok(write_safetensors(output, &TensorMap::from(tensors))?)
    }
}

struct Score {
    trained: Trained,
    files: Vec<PathBuf>,
}

impl Job for Score {
    type Output = Result<Scores>;

    fn run<B: TrainingBackend>(self, device: &B::Device) -> Self::Output {
        let faults = self.trained.faults.clone();
        let (model, state, config) = self.trained.model_to_run::<B>(device)?;
        let (channels, size) = (config.model.in_chans, config.model.image_size);
        let (mut images, mut scores) = (Vec::new(), Vec::new());
        for files in self.files.chunks(PREDICT_BATCH) {
            let mut pixels = Vec::new();
            for file in files {
                pixels.extend(prepare_file(&config, file)?.values);
            }
            let shape = [files.len(), channels, size, size];
            images.extend_from_slice(&pixels);
            let batch = Tensor::from_data(TensorData::new(pixels, shape), device);
            scores.extend(read(model.forward(batch)?.logits, "scores")?.values);
        }
        faults.check("while images were scored")?;
        Ok(Scores {
            files: self.files,
            class_names: state.class_names,
            image_shape: [channels, size, size],
            images,
            logits: scores,
        })
    }
}

/// The five likeliest classes and their probabilities, likeliest first.
pub(super) fn likeliest(logits: &[f32], names: &[String]) -> Vec<(String, f64)> {
    let mut classes: Vec<(String, f64)> = names.iter().cloned().zip(softmax(logits)).collect();
    classes.sort_by(|a, b| b.1.total_cmp(&a.1));
    classes.truncate(5);
    classes
}

struct Export {
    trained: Trained,
    output: PathBuf,
}

impl Job for Export {
    type Output = Result<()>;

    fn run<B: TrainingBackend>(self, device: &B::Device) -> Result<()> {
        let faults = self.trained.faults.clone();
        let (model, ..) = self.trained.model::<B>(device)?;
        let tensors = published_tensors(&model)?;
        faults.check("while weights were read")?;
        Ok(write_safetensors(&self.output, &tensors)?)
    }
}

/// Published weights, to be made a run.
#[derive(Debug, Clone)]
pub struct ImportRequest {
    /// A `.pth` or `.safetensors` file in the published names.
    pub weights: PathBuf,
    /// The settings of the model it belongs to.
    pub config: Config,
    /// The name of the run.
    pub name: String,
    /// The run's directory: new, or empty.
    pub output: PathBuf,
    /// Where to compute.
    pub backend: BackendKind,
    /// How much to forgive.
    pub options: ImportOptions,
    /// What the device's thread has reported.
    pub faults: DeviceFaults,
}

/// Makes a run directory out of published weights, to be evaluated or trained further.
///
/// # Errors
/// [`TrainError`] with every missing, unexpected and mis-shaped tensor.
pub fn import(request: ImportRequest) -> Result<ImportReport> {
    dispatch(request.backend, Import { request })?
}

struct Import {
    request: ImportRequest,
}

impl Job for Import {
    type Output = Result<ImportReport>;

    fn run<B: TrainingBackend>(self, device: &B::Device) -> Self::Output {
        let request = self.request;
        let config = request.config;
        let num_classes = config.model.num_classes.ok_or_else(|| {
            TrainError::Request(
                "the number of classes is not set, and weights do not come with data to count \
                 them in; give it with --set model.num_classes=N"
                    .to_owned(),
            )
        })?;
        let model = model_config(&config, num_classes)?;
        check_fits(&model, Held::Parameters, 1)?;
        let model = model.init::<B::InnerBackend>(device)?;
        let (model, report) = import_file(model, &request.weights, request.options)?;
        let class_names = (0..num_classes).map(|class| class.to_string()).collect();
        save_new_run(
            &model,
            &config,
            class_names,
            &request.name,
            &request.output,
            request.backend,
            &request.faults,
        )?;
        Ok(report)
    }
}

/// Makes a run's directory for a model that has not been trained in it: its only checkpoint, which
/// counts as the best one, is at step 0.
pub(super) fn save_new_run<B: ExpertOps>(
    model: &SwinMoe<B>,
    config: &Config,
    class_names: Vec<String>,
    name: &str,
    output: &Path,
    backend: BackendKind,
    faults: &DeviceFaults,
) -> Result<()> {
    let weights = read_params(model).map_err(TrainError::device("while weights were read"))?;
    faults.check("while weights were read")?;
    let snapshot = Snapshot {
        state: RunState {
            name: name.to_owned(),
            step: 0,
            epoch: 0,
            batch: 0,
            ce_sum_bits: 0,
            aux_sum_bits: 0,
            best_top1: None,
            loss_scale: None,
            metrics_bytes: 0,
            backend,
            seed: config.train.seed,
            config: config.to_toml(),
            class_names,
            plan: None,
        },
        model: weights,
        optimizer: Default::default(),
    };
    let run = RunDir::create(output)?;
    for (path, text) in [
        (run.config(), config.to_toml()),
        (run.metrics(), String::new()),
    ] {
        fs::write(&path, text).map_err(TrainError::io("write", path))?;
    }
    Ranks::alone().save(&run, &snapshot, 1, true)
}
