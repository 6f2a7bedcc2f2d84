//! Ranks on cores of their own.

use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use anyhow::{Context, Result, anyhow, ensure};
use burn::optim::GradientsParams;
use core_affinity::CoreId;
use hexa_moe::parallel::comm::{Communicator, Meter, Metered, local};
use hexa_moe::parallel::fleet::{Calibration, Fleet, calibrate};
use hexa_moe::parallel::{
    BackwardEnd, BatchShare, ParallelContext, ParallelPlan, exchange_gradients,
};
use serde::Serialize;

use crate::net::{B, Net, NetShape, OneRank, tokens};
use crate::report::Report;
use crate::{Arguments, Engine};

/// Cores of each rank, as places among those that the process may use.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Cores(pub Vec<Vec<usize>>);

impl FromStr for Cores {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let number = |text: &str| {
            text.trim()
                .parse::<usize>()
                .map_err(|_| anyhow!("`{text}` is no core; write cores as 0-11/12-15 or 0,2/1,3"))
        };
        let range = |part: &str| -> Result<Vec<usize>> {
            Ok(match part.split_once('-') {
                Some((first, last)) => (number(first)?..=number(last)?).collect(),
                None => vec![number(part)?],
            })
        };
        let rank = |text: &str| -> Result<Vec<usize>> {
            let parts = text.split(',').map(range).collect::<Result<Vec<_>>>()?;
            let cores = parts.concat();
            ensure!(!cores.is_empty(), "`{text}` has no cores; write 0-11, say");
            Ok(cores)
        };
        Ok(Self(text.split('/').map(rank).collect::<Result<_>>()?))
    }
}

impl Cores {
    fn or_default(given: Option<Self>) -> Result<Self> {
        let available = core_affinity::get_core_ids().map_or(0, |cores| cores.len());
        let cores = given.unwrap_or_else(|| {
            let first = (available * 3 / 4).max(1);
            Self(vec![
                (0..first).collect(),
                (first..available.max(2)).collect(),
            ])
        });
        let last = cores.0.iter().flatten().max().copied().unwrap_or(0);
        ensure!(
            last < available,
            "core {last} of --ranks is not there; this process may use {available}, numbered from 0"
        );
        Ok(cores)
    }
}

/// One rank of the job.
pub struct Rank {
    pub context: ParallelContext,
    pub meter: Meter,
    pub cores: Cores,
    pub engine: Engine,
}

/// Runs `work` as all ranks of the job; gives rank 0's report, where that is in this process.
pub fn run(
    arguments: Arguments,
    work: fn(&Rank, &Arguments) -> Result<Report>,
) -> Result<Option<Report>> {
    let cores = Cores::or_default(arguments.ranks.clone())?;
    match arguments.engine {
        Engine::Local => {
            let threads: Vec<_> = local::world(cores.0.len())
                .into_iter()
                .map(|comm| {
                    let (arguments, cores) = (arguments.clone(), cores.clone());
                    std::thread::spawn(move || on_cores(comm, cores, arguments, work))
                })
                .collect();
            let mut reports = Vec::new();
            for thread in threads {
                reports.push(thread.join().map_err(|_| anyhow!("a rank panicked"))?);
            }
            let reports = reports.into_iter().collect::<Result<Vec<_>>>()?;
            Ok(reports.into_iter().next())
        }
        #[cfg(feature = "mpi")]
        Engine::Mpi => {
            let timeout = std::time::Duration::from_secs(120);
            let comm = hexa_moe::parallel::comm::mpi::MpiCommunicator::init(timeout)?;
            ensure!(
                comm.world_size() == cores.0.len(),
                "mpirun started {} ranks, --ranks names cores of {}",
                comm.world_size(),
                cores.0.len()
            );
            let rank = comm.rank();
            let report = on_cores(comm, cores, arguments, work)?;
            Ok((rank == 0).then_some(report))
        }
        #[cfg(not(feature = "mpi"))]
        Engine::Mpi => anyhow::bail!("built without MPI; build with --features mpi"),
    }
}

/// Runs one rank in a pool whose threads are pinned to its cores.
fn on_cores(
    comm: impl Communicator + 'static,
    cores: Cores,
    arguments: Arguments,
    work: fn(&Rank, &Arguments) -> Result<Report>,
) -> Result<Report> {
    let place = comm.rank();
    let ids = core_affinity::get_core_ids().context("the system names no cores")?;
    let own: Vec<CoreId> = cores.0[place].iter().map(|&core| ids[core]).collect();
    let _load = Load::start(&own, arguments.busy.get(place).copied().unwrap_or(0));
    let pinned = own.clone();
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(own.len())
        .start_handler(move |thread| {
            core_affinity::set_for_current(pinned[thread]);
        })
        .build()?;
    pool.install(move || {
        let (comm, meter) = Metered::new(comm);
        let rank = Rank {
            context: ParallelContext::new(comm),
            meter,
            cores,
            engine: arguments.engine,
        };
        work(&rank, &arguments).with_context(|| format!("rank {place}"))
    })
}

/// Threads that take time from a rank's cores.
struct Load(Arc<AtomicBool>);

impl Load {
    fn start(cores: &[CoreId], threads: usize) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        for i in 0..threads {
            let (stop, core) = (stop.clone(), cores[i % cores.len()]);
            std::thread::spawn(move || {
                core_affinity::set_for_current(core);
                while !stop.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
            });
        }
        Self(stop)
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Medians over the measured steps.
#[derive(Debug, Clone, Serialize)]
pub struct Timed {
    /// A step, of the slowest rank.
    pub step_s: f64,
    /// Fastest and slowest of the steps.
    pub spread_s: [f64; 2],
    /// Each rank's own computation in a step.
    pub busy_s: Vec<f64>,
    /// Each rank's wait for gathered weights in the forward pass.
    pub gather_s: Vec<f64>,
}

/// Steps with all ranks' seconds: of the whole step, of own computation, and of waiting for gathered
/// weights in the forward pass.
#[derive(Debug, Clone, Default)]
pub struct Steps(Vec<Vec<[f64; 3]>>);

impl Steps {
    /// Takes `more` in.
    pub fn add(&mut self, more: Steps) {
        self.0.extend(more.0);
    }

    /// The medians.
    pub fn timed(&self) -> Timed {
        let slowest: Vec<f64> = (self.0.iter())
            .map(|ranks| ranks.iter().map(|rank| rank[0]).fold(0.0, f64::max))
            .collect();
        let ranks = self.0.first().map_or(0, Vec::len);
        let of_ranks = |i: usize| {
            let rank = |r: usize| median(self.0.iter().map(|ranks| ranks[r][i]).collect());
            (0..ranks).map(rank).collect()
        };
        Timed {
            step_s: median(slowest.clone()),
            spread_s: [
                slowest.iter().copied().fold(f64::INFINITY, f64::min),
                slowest.iter().copied().fold(0.0, f64::max),
            ],
            busy_s: of_ranks(1),
            gather_s: of_ranks(2),
        }
    }
}

impl Rank {
    /// Tells whoever waits for the report what is going on.
    pub fn say(&self, what: &str) {
        if self.context.rank() == 0 {
            eprintln!("{what}");
        }
    }

    /// Measures ranks and links on a net; batches cover what will be measured.
    pub fn calibrate(&self, shape: NetShape, arguments: &Arguments) -> Result<Fleet> {
        let most = arguments.batches.iter().chain([&arguments.tokens]).max();
        let least = arguments.batches.iter().chain([&arguments.tokens]).min();
        let (Some(&most), Some(&least)) = (most, least) else {
            return Err(anyhow!("no batches"));
        };
        let workload = shape.workload(most)?;
        let samples = |tokens: usize| tokens.div_ceil(crate::net::TOKENS_PER_SAMPLE);
        let mut batches = vec![
            samples(least).div_ceil(4),
            samples(least),
            samples(most / 4),
            samples(most),
        ];
        batches.dedup();
        let calibration = Calibration {
            workload: &workload,
            batches,
            seconds: arguments.calibrate_s,
            name: format!("{} cores", self.cores.0[self.context.rank()].len()),
            backend: "cpu".into(),
            memory_bytes: None,
            engine: match self.engine {
                Engine::Local => "local".into(),
                Engine::Mpi => "mpi".into(),
            },
        };
        let mut step = OneRank::new(shape)?;
        let device = Default::default();
        Ok(calibrate::<B>(
            &self.context,
            &device,
            &calibration,
            &mut step,
        )?)
    }

    /// Times training steps of a net that is distributed by `plan`.
    pub fn time(
        &self,
        shape: NetShape,
        plan: &ParallelPlan,
        early: bool,
        steps: u32,
    ) -> Result<Timed> {
        Ok(self.steps(shape, plan, early, steps)?.timed())
    }

    /// Times `steps` steps after two that are not counted.
    pub fn steps(
        &self,
        shape: NetShape,
        plan: &ParallelPlan,
        early: bool,
        steps: u32,
    ) -> Result<Steps> {
        let net = Net::<B>::distributed(shape, &self.context, plan)?;
        let samples = plan.batch[self.context.rank()];
        let x = tokens(samples, shape.d_model);
        let share = BatchShare::exchange(&self.context, samples)?;
        let mut all = Steps::default();
        for step in 0..steps + 2 {
            let own = self.step(&net, x.clone(), share, early)?;
            let own: Vec<f32> = own.into_iter().map(|seconds| seconds as f32).collect();
            let counts = vec![own.len(); self.context.world_size()];
            let ranks = self.context.comm().all_gather_v("seconds", own, &counts)?;
            if step >= 2 {
                let ranks = ranks.chunks_exact(3);
                all.0
                    .push(ranks.map(|r| [0, 1, 2].map(|i| f64::from(r[i]))).collect());
            }
        }
        Ok(all)
    }

    /// One step: seconds of all of it, of own computation, and of waiting for gathered weights in
    /// the forward pass.
    fn step(
        &self,
        net: &Net<B>,
        x: burn::tensor::Tensor<B, 2>,
        share: BatchShare,
        early: bool,
    ) -> Result<[f64; 3]> {
        let context = &self.context;
        context.comm().barrier("step")?;
        self.meter.take();
        let (start, end) = (Instant::now(), BackwardEnd::default());
        let (y, aux_loss) = net.forward(end.mark(x)?, early)?;
        let gather = self.meter.take();
        let mut waited: f64 = gather.values().map(|t| t.waited.as_secs_f64()).sum();
        let gather = gather
            .get("expert weights")
            .map_or(0.0, |t| t.waited.as_secs_f64());
        let loss = share.weigh(y.mean()) + aux_loss;
        let mut grads = loss.backward();
        let returned = start.elapsed();
        let mut grads = GradientsParams::from_module(&mut grads, net);
        exchange_gradients(context, net, &mut grads)?;
        let all = start.elapsed().as_secs_f64();
        waited += self.meter.waited().as_secs_f64();
        waited += returned.saturating_sub(end.since(start)).as_secs_f64();
        Ok([all, all - waited, gather])
    }
}

/// The middle value.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}
