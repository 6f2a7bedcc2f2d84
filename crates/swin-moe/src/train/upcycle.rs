//! A run whose experts start as copies of a dense model's MLPs.

use std::path::PathBuf;

use hexa_moe::ExpertNoise;
use hexa_ops::TrainingBackend;

use super::error::{Result, TrainError};
use super::faults::DeviceFaults;
use super::inference::{Trained, save_new_run};
use super::random::init_seed;
use crate::backend::{BackendKind, Job, dispatch};
use crate::config::Config;
use crate::memory::{Held, check_fits};
use crate::settings::model_config;
use crate::weights::{ImportReport, published_tensors, read_file, upcycle_tensors};

/// Where dense weights come from.
#[derive(Debug, Clone)]
pub enum DenseSource {
    /// A `.pth` or `.safetensors` file in the published names.
    File(PathBuf),
    /// A run of ours or one of its checkpoints.
    Trained(Box<Trained>),
}

/// A dense model, to be made a run with experts.
#[derive(Debug, Clone)]
pub struct UpcycleRequest {
    /// The dense weights.
    pub source: DenseSource,
    /// The settings of the model with experts.
    pub config: Config,
    /// The name of the run.
    pub name: String,
    /// The run's directory: new, or empty.
    pub output: PathBuf,
    /// Where to compute.
    pub backend: BackendKind,
    /// Relative standard deviation of the noise on the experts' weights; 0 for copies. Drawn, as
    /// the routers are, from the seed of the settings.
    pub noise: f64,
    /// What the device's thread has reported.
    pub faults: DeviceFaults,
}

/// What became of a dense model.
#[derive(Debug, Clone)]
pub struct Upcycled {
    /// The dense model's tensors.
    pub report: ImportReport,
    /// Whether the model computes what the dense one did, for which gate weights must sum to one
    /// and there must be no noise.
    pub equals_dense: bool,
}

/// Makes a run directory out of a dense model, to be evaluated or trained further.
///
/// # Errors
/// [`TrainError`] if the weights are not those of the dense model that the settings describe
/// without their Mixture-of-Experts blocks.
pub fn upcycle(request: UpcycleRequest) -> Result<Upcycled> {
    dispatch(request.backend, Upcycle { request })?
}

struct Upcycle {
    request: UpcycleRequest,
}

impl Job for Upcycle {
    type Output = Result<Upcycled>;

    fn run<B: TrainingBackend>(self, device: &B::Device) -> Self::Output {
        let request = self.request;
        let config = request.config;
        let (tensors, path, class_names) = match request.source {
            DenseSource::File(path) => {
                let num_classes = config.model.num_classes.ok_or_else(|| {
                    TrainError::Request(
                        "the number of classes is not set, and weights do not come with data to \
                         count them in; give it with --set model.num_classes=N"
                            .to_owned(),
                    )
                })?;
                let names = (0..num_classes).map(|class| class.to_string()).collect();
                (read_file(&path)?, path, names)
            }
            DenseSource::Trained(trained) => {
                let path = trained.path().to_path_buf();
                let (model, state, _) = trained.model::<B>(device)?;
                (published_tensors(&model)?, path, state.class_names)
            }
        };
        let model = model_config(&config, class_names.len())?;
        check_fits(&model, Held::Parameters, 1)?;
        B::seed(device, init_seed(config.train.seed));
        let noise = (request.noise != 0.0).then_some(ExpertNoise {
            std: request.noise,
            seed: config.train.seed,
        });
        let (upcycled, report) =
            upcycle_tensors::<B::InnerBackend>(&model, tensors, noise, &path, device)?;
        save_new_run(
            &upcycled,
            &config,
            class_names,
            &request.name,
            &request.output,
            request.backend,
            &request.faults,
        )?;
        let moe = &model.moe;
        Ok(Upcycled {
            report,
            equals_dense: noise.is_none() && (moe.normalize_gate || moe.top_k == moe.num_experts),
        })
    }
}
