//! Ranks as processes. Started by itself, this launches its scenarios under `mpirun`; started by
//! `mpirun`, it is a rank of one. Arguments filter scenarios by name. It reports as the standard
//! test harness does.

#[allow(dead_code, reason = "shared with the tests of ranks as threads")]
#[path = "../parallel/equivalence.rs"]
mod equivalence;
#[cfg(feature = "nccl")]
#[path = "../nccl/collectives.rs"]
mod nccl_collectives;
#[path = "../nccl/shared.rs"]
mod shared;
#[allow(dead_code, reason = "shared with the tests of the layer on one device")]
#[path = "../moe/support.rs"]
mod support;

use std::path::Path;
use std::process::{Command, ExitCode, Output, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use burn::backend::Autodiff;
use hexa_moe::backends::Cpu;
use hexa_moe::parallel::Communicator;
use hexa_moe::parallel::comm::mpi::MpiCommunicator;
use hexa_moe::parallel::comm::{Collective, CommResult};
use hexa_ops::testing::backend::skip;

use equivalence::{cases, check};
use shared::Shared;

type Ad = Autodiff<Cpu>;

/// A scenario: ranks, whether the job is to succeed, and what the output must contain.
struct Scenario {
    name: &'static str,
    ranks: usize,
    succeeds: bool,
    says: &'static [&'static str],
}

const fn equal(ranks: usize) -> Scenario {
    Scenario {
        name: "equivalence",
        ranks,
        succeeds: true,
        says: &["18 cases equal one device"],
    }
}

const SCENARIOS: &[Scenario] = &[
    equal(1),
    equal(2),
    equal(3),
    equal(4),
    Scenario {
        name: "collectives",
        ranks: 3,
        succeeds: true,
        says: &[
            "rank 0: as expected",
            "rank 1: as expected",
            "rank 2: as expected",
        ],
    },
    Scenario {
        name: "counts",
        ranks: 3,
        succeeds: true,
        says: &[
            "rank 0: as expected",
            "rank 1: as expected",
            "rank 2: as expected",
        ],
    },
    Scenario {
        name: "panic",
        ranks: 3,
        succeeds: false,
        says: &["rank 1 panicked"],
    },
    Scenario {
        name: "leave",
        ranks: 3,
        succeeds: false,
        says: &["rank 2 left the job"],
    },
    Scenario {
        name: "kill",
        ranks: 3,
        succeeds: false,
        says: &["process rank 1", "signal 9"],
    },
    Scenario {
        name: "hang",
        ranks: 3,
        succeeds: false,
        says: &["rank(s) [1] did not reach `gradients`"],
    },
    #[cfg(feature = "wgpu")]
    Scenario {
        name: "mixed_wgpu",
        ranks: 3,
        succeeds: true,
        says: &[
            "rank 0 (wgpu): 8 cases equal",
            "rank 1 (cpu): 8 cases equal",
            "rank 2 (cpu): 8 cases equal",
        ],
    },
    #[cfg(feature = "cuda")]
    Scenario {
        name: "mixed_cuda",
        ranks: 2,
        succeeds: true,
        says: &[
            "rank 0 (cuda): 8 cases equal",
            "rank 1 (cpu): 8 cases equal",
        ],
    },
    #[cfg(feature = "nccl")]
    nccl(1),
    #[cfg(feature = "nccl")]
    nccl(2),
];

/// Each rank with a GPU of its own; MPI only brings them together.
#[cfg(feature = "nccl")]
const fn nccl(ranks: usize) -> Scenario {
    Scenario {
        name: "nccl",
        ranks,
        succeeds: true,
        says: &["rank 0: NCCL's collectives and layers as expected"],
    }
}

impl Scenario {
    fn title(&self) -> String {
        format!("{}_on_{}_ranks", self.name, self.ranks)
    }

    /// Why this machine cannot run it.
    fn obstacle(&self) -> Option<String> {
        let mpirun = Command::new("mpirun").arg("--version").output();
        if mpirun.is_err() {
            return Some("mpirun is missing; install openmpi-bin".to_owned());
        }
        let has_gpu = Path::new("/dev/nvidiactl").exists();
        if self.name == "mixed_cuda" && !has_gpu {
            return Some("no NVIDIA GPU".to_owned());
        }
        self.nccl_obstacle()
    }

    #[cfg(feature = "nccl")]
    fn nccl_obstacle(&self) -> Option<String> {
        use hexa_moe::parallel::comm::nccl::{device_count, obstacle};
        if self.name != "nccl" {
            return None;
        }
        let devices = device_count();
        let few = || (devices < self.ranks).then(|| format!("{devices} CUDA device(s)"));
        obstacle().or_else(few)
    }

    #[cfg(not(feature = "nccl"))]
    fn nccl_obstacle(&self) -> Option<String> {
        None
    }
}

fn main() -> ExitCode {
    if std::env::var_os("OMPI_COMM_WORLD_SIZE").is_some() {
        let name = std::env::args().nth(1).unwrap_or_default();
        return match rank(&name) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("{error}");
                ExitCode::FAILURE
            }
        };
    }
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let filters: Vec<&String> = arguments.iter().filter(|a| !a.starts_with('-')).collect();
    let (scenarios, others): (Vec<_>, Vec<_>) = SCENARIOS.iter().partition(|scenario| {
        filters.is_empty() || filters.iter().any(|f| scenario.title().contains(*f))
    });
    if arguments.iter().any(|a| a == "--list") {
        scenarios
            .iter()
            .for_each(|s| println!("{}: test", s.title()));
        return ExitCode::SUCCESS;
    }
    run(&scenarios, others.len())
}

/// Runs scenarios one after the other and reports as the standard harness does.
fn run(scenarios: &[&Scenario], filtered_out: usize) -> ExitCode {
    println!("\nrunning {} tests", scenarios.len());
    let start = Instant::now();
    let (mut passed, mut failed, mut ignored) = (0, 0, 0);
    for scenario in scenarios {
        let title = scenario.title();
        if let Some(reason) = scenario.obstacle() {
            skip(&title, &reason);
            println!("test {title} ... ignored, {reason}");
            ignored += 1;
            continue;
        }
        match launch(scenario) {
            Ok(()) => {
                passed += 1;
                println!("test {title} ... ok");
            }
            Err(error) => {
                failed += 1;
                println!("{error}\ntest {title} ... FAILED");
            }
        }
    }
    let verdict = if failed == 0 { "ok" } else { "FAILED" };
    println!(
        "\ntest result: {verdict}. {passed} passed; {failed} failed; {ignored} ignored; 0 measured; \
         {filtered_out} filtered out; finished in {:.2}s\n",
        start.elapsed().as_secs_f32()
    );
    ExitCode::from(u8::from(failed > 0))
}

/// Time after which a job hangs: one that is to compute, and one whose ranks are to die.
const BOUNDS: [Duration; 2] = [Duration::from_secs(300), Duration::from_secs(60)];

/// Attempts at a job whose ranks are to die: OpenMPI 4.1's mpirun itself now and then waits for one
/// of its own locks for ever, when all its ranks have ended.
const ATTEMPTS: usize = 3;

fn launch(scenario: &Scenario) -> Result<(), String> {
    let attempts = if scenario.succeeds { 1 } else { ATTEMPTS };
    let mut job = start(scenario)?;
    for _ in 1..attempts {
        if !job.hangs {
            break;
        }
        println!("{}: mpirun did not end; once more", scenario.title());
        job = start(scenario)?;
    }
    judge(scenario, &job)
}

/// A job that has ended or was ended.
struct Job {
    output: Output,
    hangs: bool,
}

fn start(scenario: &Scenario) -> Result<Job, String> {
    let bound = BOUNDS[usize::from(!scenario.succeeds)];
    let begun = Instant::now();
    let program = std::env::current_exe().map_err(|e| e.to_string())?;
    let child = Command::new("timeout")
        .args([
            "-k",
            "5",
            &bound.as_secs().to_string(),
            "mpirun",
            "--oversubscribe",
            "--allow-run-as-root",
        ])
        .args(["-np", &scenario.ranks.to_string()])
        .arg(program)
        .arg(scenario.name)
        .stdin(Stdio::null())
        .output();
    let output = child.map_err(|e| format!("mpirun: {e}; install openmpi-bin"))?;
    Ok(Job {
        output,
        hangs: begun.elapsed() >= bound,
    })
}

fn judge(scenario: &Scenario, job: &Job) -> Result<(), String> {
    let output = &job.output;
    let status = output.status;
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    if job.hangs {
        return Err(format!("the job hangs\n{text}"));
    }
    if status.success() != scenario.succeeds {
        return Err(format!("{status}\n{text}"));
    }
    match scenario.says.iter().find(|part| !text.contains(**part)) {
        Some(part) => Err(format!("`{part}` is not in\n{text}")),
        None => Ok(()),
    }
}

fn rank(scenario: &str) -> Result<(), String> {
    let seconds = if scenario == "hang" { 2 } else { 120 };
    let comm = MpiCommunicator::init(Duration::from_secs(seconds)).map_err(|e| e.to_string())?;
    let rank = comm.rank();
    match scenario {
        "equivalence" => {
            let comm = Shared(Arc::new(comm));
            let cases = cases(comm.world_size());
            for case in &cases {
                check::<Ad, Ad>(comm.clone(), case)
                    .map_err(|e| fatal(format!("rank {rank} of {case:?}: {e}")))?;
            }
            println!("rank {rank}: {} cases equal one device", cases.len());
        }
        #[cfg(feature = "wgpu")]
        "mixed_wgpu" => mixed::<hexa_moe::backends::Wgpu>(comm, "wgpu")?,
        #[cfg(feature = "cuda")]
        "mixed_cuda" => mixed::<hexa_moe::backends::Cuda>(comm, "cuda")?,
        #[cfg(feature = "nccl")]
        "nccl" => over_nccl(comm)?,
        "collectives" => {
            collectives(&comm).map_err(|e| e.to_string())?;
            println!("rank {rank}: as expected");
        }
        "counts" => {
            let counts = if rank == 2 { [2, 3, 1] } else { [2, 2, 2] };
            let data = vec![0.0; counts[rank]];
            let error = comm.all_gather_v("layer 4: w1", data, &counts).unwrap_err();
            let text = error.to_string();
            let names = ["layer 4: w1", "[2, 3, 1]", "[2, 2, 2]"];
            if names.iter().all(|name| text.contains(name)) && comm.barrier("later") == Err(error) {
                println!("rank {rank}: as expected");
            }
        }
        "panic" if rank == 1 => panic!("this rank is meant to die"),
        "leave" if rank == 2 => {}
        "kill" if rank == 1 => {
            comm.barrier("start").map_err(|e| e.to_string())?;
            let own = std::process::id().to_string();
            Command::new("kill")
                .args(["-9", &own])
                .status()
                .map_err(|e| e.to_string())?;
        }
        "hang" if rank == 1 => std::thread::sleep(Duration::from_secs(200)),
        _ => {
            if scenario == "kill" {
                comm.barrier("start").map_err(|e| e.to_string())?;
            }
            comm.all_reduce("gradients", vec![0.0])
                .map_err(|e| e.to_string())?;
        }
    }
    Ok(())
}

/// A rank that found a difference must not wait for the others at the end.
fn fatal(error: String) -> String {
    eprintln!("{error}");
    std::process::exit(1);
}

fn collectives(comm: &MpiCommunicator) -> CommResult<()> {
    let (rank, me) = (comm.rank(), comm.rank() as f32);
    let part = vec![me; rank];
    assert_eq!(comm.all_gather_v("g", part, &[0, 1, 2])?, [1.0, 2.0, 2.0]);
    let addend = (rank != 1).then(|| vec![1.0 + me, 2.0, 3.0]);
    let sum = comm.reduce_scatter_v("s", addend, &[1, 0, 2])?;
    assert_eq!(sum, [&[4.0][..], &[], &[4.0, 6.0]][rank]);
    assert_eq!(
        comm.reduce_scatter_v("nothing", None, &[1, 0, 2])?,
        vec![0.0; [1, 0, 2][rank]]
    );
    assert_eq!(comm.broadcast("b", vec![me; 2], 2, 2)?, [2.0, 2.0]);
    assert_eq!(comm.all_gather_u32("u", vec![rank as u32])?, [0, 1, 2]);
    assert!(comm.all_reduce("empty", Vec::new())?.is_empty());
    // Short and long sums take different paths; both are in the order of ranks.
    for len in [1, 5000] {
        let addend = vec![[1e8, 1.0, -1e8][rank]; len];
        assert_eq!(comm.all_reduce("in order", addend)?, vec![0.0; len]);
    }
    let addend = || Collective::AllReduce { data: vec![me] };
    let first = comm.start("first", addend());
    drop(comm.start("dropped", addend()));
    let second = comm.start("second", addend());
    assert_eq!(second.wait()?.into_f32(), [3.0]);
    assert_eq!(first.wait()?.into_f32(), [3.0]);
    comm.barrier("end")
}

/// The first rank on a device's back-end, the others on the CPU, in one job.
#[cfg(any(feature = "wgpu", feature = "cuda"))]
fn mixed<D: hexa_ops::ExpertKernels>(comm: MpiCommunicator, device: &str) -> Result<(), String> {
    let rank = comm.rank();
    let comm = Shared(Arc::new(comm));
    // A rank without tokens is the CPU's in these cases, one without a slice too.
    let cases: Vec<_> = cases(comm.world_size())
        .into_iter()
        .enumerate()
        .filter(|(i, _)| i % 9 % 2 == 0 && i % 9 != 8)
        .map(|(_, case)| equivalence::Case {
            tolerance: 1e-4,
            ..case
        })
        .collect();
    for case in &cases {
        let outcome = if rank == 0 {
            let mut outcome = Ok(());
            hexa_ops::testing::watch::watched::<D>(|| {
                outcome = check::<Autodiff<D>, Ad>(comm.clone(), case);
            });
            outcome
        } else {
            check::<Ad, Ad>(comm.clone(), case)
        };
        outcome.map_err(|e| fatal(format!("rank {rank} of {case:?}: {e}")))?;
    }
    let backend = if rank == 0 { device } else { "cpu" };
    println!("rank {rank} ({backend}): {} cases equal", cases.len());
    Ok(())
}

/// Collectives and layers over NCCL; rank `i` has device `i` of this machine.
#[cfg(feature = "nccl")]
fn over_nccl(comm: MpiCommunicator) -> Result<(), String> {
    use hexa_moe::backends::Cuda;
    use hexa_moe::parallel::comm::nccl::NcclCommunicator;
    let rank = comm.rank();
    let timeout = Duration::from_secs(60);
    let comm = NcclCommunicator::init(comm, rank, timeout).map_err(|e| e.to_string())?;
    nccl_collectives::on_host(&comm).map_err(|e| e.to_string())?;
    nccl_collectives::on_device(&comm).map_err(|e| e.to_string())?;
    let comm = Shared(Arc::new(comm));
    for case in &shared::cases_without_empty_ranks(comm.world_size()) {
        let case = equivalence::Case {
            tolerance: 1e-4,
            ..case.clone()
        };
        let device = comm.0.device();
        equivalence::check_on::<Autodiff<Cuda>, Ad>(comm.clone(), &case, device)
            .map_err(|e| fatal(format!("rank {rank} of {case:?}: {e}")))?;
    }
    println!("rank {rank}: NCCL's collectives and layers as expected");
    Ok(())
}
