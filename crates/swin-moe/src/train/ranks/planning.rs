//! The plan of a job's ranks: what an earlier run had, what a fleet's measurements say, or what the
//! settings ask for.

use hexa_moe::parallel::fleet::{Fleet, FleetError, Workload, predict};
use hexa_moe::parallel::{Mode, ParallelPlan};
use hexa_ops::TrainingBackend;

use super::Seat;
use crate::backend::{BackendKind, check_precision};
use crate::config::{self, Config, Engine};
use crate::fleet::{FleetJobError, RankSetting, measure_rank, plan};
use crate::settings::model_config;
use crate::train::error::Result;
use crate::train::progress::Verbosity;

/// Seconds for each measurement in front of a run: short, as somebody waits for its first step.
const SECONDS: f64 = 0.05;

/// Who does what, and what the ranks were measured at.
#[derive(Debug, Clone, Default)]
pub(in crate::train) struct Planned {
    /// What the settings ask for if `None`.
    pub plan: Option<ParallelPlan>,
    /// What the plan was chosen by, or is compared with.
    pub fleet: Option<Fleet>,
}

impl Planned {
    /// A plan that is to be chosen by a fleet's measurements, if there is one.
    pub(in crate::train) fn by(fleet: Option<Fleet>) -> Self {
        Planned { plan: None, fleet }
    }
}

/// What a rank's measurement and plan are for.
pub(in crate::train) struct PlanFor<'a> {
    pub config: &'a Config,
    pub num_classes: usize,
    pub backend: BackendKind,
    pub verbosity: Verbosity,
}

impl Seat {
    /// Completes a plan, the same on all ranks, which call it together: chooses by the fleet that
    /// is given or, in the mode `auto`, by measuring the ranks.
    ///
    /// # Errors
    /// [`TrainError::Fleet`](crate::train::TrainError::Fleet) if the fleet is of another model or
    /// number of ranks, or measuring fails.
    pub(in crate::train) fn plan<B: TrainingBackend>(
        &self,
        given: Planned,
        job: &PlanFor,
        device: &B::Device,
    ) -> Result<Planned> {
        let (rank, world_size) = self.place();
        let parallel = &job.config.parallel;
        let fleet = match given {
            Planned {
                plan: Some(plan),
                fleet,
            } => {
                if plan.world_size() == world_size {
                    let plan = Some(plan);
                    return Ok(Planned { plan, fleet });
                }
                if rank == 0 {
                    log::warn!(
                        "the run had shares for {} ranks, this job has {world_size}: they are \
                         chosen anew",
                        plan.world_size()
                    );
                }
                None
            }
            Planned { plan: None, fleet } => fleet,
        };
        let model = model_config(job.config, job.num_classes)?;
        let batch = job.config.train.batch_size;
        let fleet = match (fleet, &self.context) {
            (Some(fleet), _) if fleet.world_size() != world_size => {
                let error = FleetError::Ranks {
                    fleet: fleet.world_size(),
                    wanted: world_size,
                };
                return Err(FleetJobError::Fleet(error).into());
            }
            (Some(fleet), _) => fleet,
            (None, Some(context)) if parallel.mode == config::Mode::Auto => {
                if rank == 0 && job.verbosity == Verbosity::Normal {
                    eprintln!(
                        "measuring {world_size} ranks and the links between them; a fleet file \
                         (swin-moe calibrate, --fleet FILE) does without"
                    );
                }
                check_precision::<B>(device, job.config.train.precision)?;
                let setting = RankSetting {
                    model: &model,
                    batch,
                    backend: job.backend,
                    engine: match parallel.engine {
                        Engine::Local => "local",
                        Engine::Mpi => "mpi",
                    },
                    memory_bytes: None,
                    ranks_here: self.ranks_here,
                    seconds: SECONDS,
                };
                measure_rank::<B>(context, device, &setting)?
            }
            (None, _) => return Ok(Planned::default()),
        };
        let mode = match parallel.mode {
            config::Mode::Data => Some(Mode::DataCentric),
            config::Mode::Model => Some(Mode::ModelCentric),
            config::Mode::Auto => None,
        };
        let chosen = plan(&model, batch, &fleet, mode)?;
        Ok(Planned {
            plan: Some(chosen.plan),
            fleet: Some(fleet),
        })
    }
}

/// A fleet's measurements and the model that they are for.
#[derive(Debug)]
pub(super) struct Measured {
    pub fleet: Fleet,
    pub workload: Workload,
}

impl Measured {
    /// `None` if nothing can be predicted of this plan: the file in the run's directory is of
    /// another job.
    pub(super) fn new(fleet: Fleet, workload: Workload, plan: &ParallelPlan) -> Option<Self> {
        predict(&fleet, &workload, plan)
            .is_ok()
            .then_some(Self { fleet, workload })
    }

    /// Predicted seconds of a step.
    pub(super) fn step_s(&self, plan: &ParallelPlan) -> Option<f64> {
        let prediction = predict(&self.fleet, &self.workload, plan).ok()?;
        Some(prediction.step_s)
    }
}
