//! From a request to ranks: threads of this process, or this process' place in an MPI job.

use std::panic::resume_unwind;

use hexa_moe::MoeError;
use hexa_moe::parallel::ParallelContext;
use hexa_moe::parallel::comm::{CommError, local};
use hexa_moe::parallel::comm::{Communicator, Meter, Metered};
use hexa_moe::parallel::fleet::FleetError;
use hexa_ops::TrainingBackend;

use crate::backend::{BackendKind, Job, devices, dispatch};
use crate::config::{Engine, ParallelConfig};
use crate::fleet::FleetJobError;
use crate::train::error::{Result, TrainError};

/// Deep graphs are walked recursively.
const STACK_BYTES: usize = 32 << 20;

/// What each rank does, on its own device.
pub(in crate::train) trait RankJob: Clone + Send {
    /// What comes out of it.
    type Output: Send;

    /// Does this rank's part.
    fn run<B: TrainingBackend>(self, device: &B::Device, seat: Seat) -> Result<Self::Output>;
}

/// A rank's place in a job, before it has a model; none for a run alone.
#[derive(Debug, Clone, Default)]
pub(in crate::train) struct Seat {
    pub(in crate::train) context: Option<ParallelContext>,
    /// Ranks on this machine.
    pub(in crate::train) ranks_here: usize,
    /// What the context's exchanges cost.
    pub(super) meter: Meter,
    /// What a test says that this rank computes in a step, in seconds, instead of what it does.
    #[cfg(test)]
    pub(super) fake_busy_s: Option<fn(rank: usize, images: usize) -> f64>,
}

impl Seat {
    fn new(comm: impl Communicator + 'static, ranks_here: usize) -> Self {
        let (comm, meter) = Metered::new(comm);
        Seat {
            context: Some(ParallelContext::new(comm)),
            ranks_here,
            meter,
            #[cfg(test)]
            fake_busy_s: None,
        }
    }

    /// This rank and the number of ranks.
    pub(in crate::train) fn place(&self) -> (usize, usize) {
        match &self.context {
            Some(context) => (context.rank(), context.world_size()),
            None => (0, 1),
        }
    }

    /// Rank 0 first, then the others: threads share the generator that initial weights are drawn
    /// from, and rank 0's are those that count.
    pub(in crate::train) fn in_turn<T>(&self, draw: impl FnOnce() -> Result<T>) -> Result<T> {
        let Some(context) = &self.context else {
            return draw();
        };
        let barrier = || {
            let passed = context.comm().barrier("rank 0 has drawn its weights");
            passed.map_err(|error| TrainError::from(MoeError::from(error)))
        };
        if context.rank() == 0 {
            let drawn = draw()?;
            barrier()?;
            return Ok(drawn);
        }
        barrier()?;
        draw()
    }
}

/// Runs `job` on as many ranks as the settings say; gives rank 0's result, or with MPI that of
/// this process.
pub(in crate::train) fn launch<J: RankJob>(
    backend: BackendKind,
    settings: &ParallelConfig,
    job: J,
) -> Result<J::Output> {
    match settings.engine {
        Engine::Local if settings.ranks == 1 => dispatch(backend, Alone(job))?,
        Engine::Local => {
            let ranks = settings.ranks;
            let threads = Threads {
                backend,
                ranks,
                job,
            };
            dispatch(backend, threads)?
        }
        Engine::Mpi => mpi::launch(backend, settings, job),
    }
}

struct Alone<J>(J);

impl<J: RankJob> Job for Alone<J> {
    type Output = Result<J::Output>;

    fn run<B: TrainingBackend>(self, device: &B::Device) -> Self::Output {
        self.0.run::<B>(device, Seat::default())
    }
}

struct Threads<J> {
    backend: BackendKind,
    ranks: usize,
    job: J,
}

impl<J: RankJob> Job for Threads<J> {
    type Output = Result<J::Output>;

    fn run<B: TrainingBackend>(self, device: &B::Device) -> Self::Output {
        let devices = devices::<B>(self.backend, device);
        // Ranks share a processor, but no GPU: they would only wait for one another.
        if self.backend != BackendKind::Cpu && self.ranks > devices.len() {
            return Err(TrainError::Request(format!(
                "{} ranks with the back-end {} need as many devices, found {}; use fewer ranks, \
                 or --backend cpu",
                self.ranks,
                self.backend,
                devices.len()
            )));
        }
        let outcomes = std::thread::scope(|scope| {
            let mut threads = Vec::with_capacity(self.ranks);
            for (rank, comm) in local::world(self.ranks).into_iter().enumerate() {
                let device = devices.get(rank).unwrap_or(device).clone();
                let (job, ranks) = (self.job.clone(), self.ranks);
                let thread = std::thread::Builder::new()
                    .name(format!("rank-{rank}"))
                    .stack_size(STACK_BYTES)
                    .spawn_scoped(scope, move || {
                        let seat = Seat::new(comm, ranks);
                        job.run::<B>(&device, seat)
                    });
                threads.push(thread.map_err(|error| {
                    TrainError::Request(format!(
                        "rank {rank} got no thread ({error}); use fewer ranks"
                    ))
                })?);
            }
            Ok::<_, TrainError>(threads.into_iter().map(|t| t.join()).collect::<Vec<_>>())
        });
        first_cause(outcomes?)
    }
}

/// Rank 0's result; of failures, the one that the others followed from.
fn first_cause<T>(outcomes: Vec<std::thread::Result<Result<T>>>) -> Result<T> {
    let mut lead = None;
    let mut failure: Option<(usize, TrainError)> = None;
    for (rank, outcome) in outcomes.into_iter().enumerate() {
        match outcome {
            Err(panic) => resume_unwind(panic),
            Ok(Err(error)) => {
                let follows = |error: &TrainError| is_rank_lost(error);
                if failure.as_ref().is_none_or(|(_, first)| follows(first)) {
                    failure = Some((rank, error));
                }
            }
            Ok(Ok(result)) if rank == 0 => lead = Some(result),
            Ok(Ok(_)) => {}
        }
    }
    match (failure, lead) {
        (Some((0, error)), _) => Err(error),
        (Some((rank, error)), _) => Err(TrainError::Rank {
            rank,
            error: Box::new(error),
        }),
        (None, Some(result)) => Ok(result),
        (None, None) => Err(TrainError::Request("a job needs ranks".to_owned())),
    }
}

fn is_rank_lost(error: &TrainError) -> bool {
    let mut source: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = source {
        if let Some(CommError::RankLost { .. }) = error.downcast_ref() {
            return true;
        }
        if let Some(MoeError::Comm(CommError::RankLost { .. })) = error.downcast_ref() {
            return true;
        }
        if let Some(TrainError::Load(MoeError::Comm(CommError::RankLost { .. }))) =
            error.downcast_ref()
        {
            return true;
        }
        if let Some(TrainError::Fleet(FleetJobError::Fleet(FleetError::Moe(MoeError::Comm(
            CommError::RankLost { .. },
        ))))) = error.downcast_ref()
        {
            return true;
        }
        source = error.source();
    }
    false
}

#[cfg(not(feature = "mpi"))]
mod mpi {
    use super::*;

    pub(super) fn launch<J: RankJob>(
        _: BackendKind,
        _: &ParallelConfig,
        _: J,
    ) -> Result<J::Output> {
        Err(TrainError::Request(
            "this program was built without the engine mpi; build it with `cargo build --release \
             --features mpi`, which needs an MPI library and libclang, or use --engine local"
                .to_owned(),
        ))
    }
}

#[cfg(feature = "mpi")]
mod mpi {
    use std::sync::Arc;

    use hexa_moe::parallel::comm::mpi::{DEFAULT_TIMEOUT, MpiCommunicator};
    use hexa_moe::parallel::comm::{Collective, CommResult, Pending};

    use super::*;

    /// This process' communicator, which outlives its rank's context: the process says why it
    /// leaves before it does, since the others then end the job.
    #[derive(Debug)]
    struct Line(Arc<MpiCommunicator>);

    impl Communicator for Line {
        fn rank(&self) -> usize {
            self.0.rank()
        }

        fn world_size(&self) -> usize {
            self.0.world_size()
        }

        fn start(&self, tensor: &str, collective: Collective) -> Pending {
            self.0.start(tensor, collective)
        }

        fn leave(&self) {
            if std::thread::panicking() {
                self.0.leave();
            }
        }

        fn failure(&self) -> Option<CommError> {
            self.0.failure()
        }
    }

    pub(super) fn launch<J: RankJob>(
        backend: BackendKind,
        settings: &ParallelConfig,
        job: J,
    ) -> Result<J::Output> {
        let comm = joined().map_err(|error| TrainError::from(MoeError::from(error)))?;
        let (rank, world_size) = (comm.rank(), comm.world_size());
        let outcome = if settings.ranks != 1 && settings.ranks != world_size {
            Err(TrainError::Request(format!(
                "parallel.ranks is {}, mpirun started {world_size}; leave --ranks out, or start \
                 as many with mpirun -np",
                settings.ranks
            )))
        } else {
            let seat = match world_size {
                1 => Seat::default(),
                _ => {
                    let here = number_of("OMPI_COMM_WORLD_LOCAL_SIZE").unwrap_or(world_size);
                    Seat::new(Line(comm.clone()), here)
                }
            };
            // This process' number among those of its machine.
            let local = number_of("OMPI_COMM_WORLD_LOCAL_RANK").unwrap_or(rank);
            dispatch(
                backend,
                Process {
                    backend,
                    local,
                    seat,
                    job,
                },
            )?
        };
        if let Err(error) = &outcome {
            eprintln!("rank {rank}: {error}");
        }
        comm.close();
        outcome
    }

    fn joined() -> CommResult<Arc<MpiCommunicator>> {
        MpiCommunicator::init(DEFAULT_TIMEOUT).map(Arc::new)
    }

    /// What OpenMPI tells its processes in an environment variable.
    fn number_of(variable: &str) -> Option<usize> {
        std::env::var(variable).ok()?.parse().ok()
    }

    struct Process<J> {
        backend: BackendKind,
        local: usize,
        seat: Seat,
        job: J,
    }

    impl<J: RankJob> Job for Process<J> {
        type Output = Result<J::Output>;

        fn run<B: TrainingBackend>(self, device: &B::Device) -> Self::Output {
            // Ranks of other back-ends on this machine are counted, too: hence the remainder.
            let devices = devices::<B>(self.backend, device);
            let device = devices
                .get(self.local % devices.len().max(1))
                .unwrap_or(device);
            self.job.run::<B>(device, self.seat)
        }
    }
}
