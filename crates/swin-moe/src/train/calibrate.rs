//! Measuring the processes that `mpirun` has started.

use hexa_moe::parallel::ParallelContext;
use hexa_moe::parallel::comm::local;
use hexa_moe::parallel::fleet::{Fleet, FleetError};
use hexa_ops::TrainingBackend;

use super::error::Result;
use super::faults::DeviceFaults;
use super::ranks::{RankJob, Seat, launch};
use crate::backend::BackendKind;
use crate::config::ParallelConfig;
use crate::fleet::{FleetJobError, RankSetting, measure_rank};
use crate::model::SwinMoeConfig;

/// What is measured, and as which process of an MPI job.
#[derive(Debug, Clone)]
pub struct CalibrateProcessRequest {
    /// The model.
    pub model: SwinMoeConfig,
    /// Samples of a step, all ranks together.
    pub batch: usize,
    /// This process' back-end; others may have another.
    pub backend: BackendKind,
    /// The job, with the engine `mpi`.
    pub parallel: ParallelConfig,
    /// Bytes that this process may use; without it, on the CPU, the machine's in equal parts.
    pub memory_bytes: Option<u64>,
    /// Seconds for each measurement.
    pub seconds: f64,
    /// What the device's thread has reported.
    pub faults: DeviceFaults,
}

/// Measures all processes of a job, each on its own device; `None` on all but rank 0.
///
/// # Errors
/// [`super::TrainError`] if this process or another fails, or the program has no MPI.
pub fn calibrate_process(request: CalibrateProcessRequest) -> Result<Option<Fleet>> {
    let parallel = request.parallel.clone();
    launch(request.backend, &parallel, Calibrate { request })
}

#[derive(Clone)]
struct Calibrate {
    request: CalibrateProcessRequest,
}

impl RankJob for Calibrate {
    type Output = Option<Fleet>;

    fn run<B: TrainingBackend>(self, device: &B::Device, seat: Seat) -> Result<Option<Fleet>> {
        let request = self.request;
        let (rank, ranks_here) = (seat.place().0, seat.ranks_here);
        let setting = RankSetting {
            model: &request.model,
            batch: request.batch,
            backend: request.backend,
            engine: "mpi",
            memory_bytes: request.memory_bytes,
            ranks_here,
            seconds: request.seconds,
        };
        let fleet = match &seat.context {
            Some(context) => measure_rank::<B>(context, device, &setting),
            // A process alone exchanges with itself.
            None => {
                let nobody = FleetError::Ranks {
                    fleet: 0,
                    wanted: 1,
                };
                let comm = local::world(1).into_iter().next();
                let comm = comm.ok_or(FleetJobError::Fleet(nobody))?;
                measure_rank::<B>(&ParallelContext::new(comm), device, &setting)
            }
        }?;
        request.faults.check("while ranks were measured")?;
        Ok((rank == 0).then_some(fleet))
    }
}
