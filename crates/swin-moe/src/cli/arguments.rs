//! What the command line takes.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::backend::BackendKind;
use crate::config::{Engine, Mode, Precision, Rebalance};
use crate::train::{ParallelOverrides, ThroughputMode};

/// Swin Transformer with Mixture-of-Experts layers: training and what goes with it.
#[derive(Parser)]
#[command(name = "swin-moe", version)]
pub(super) struct Arguments {
    #[command(subcommand)]
    pub(super) command: Command,
}

/// What to do.
#[derive(Subcommand)]
pub(super) enum Command {
    /// Train a model; without arguments, on the embedded handwritten digits.
    Train(Train),
    /// Accuracy, loss and expert load on the test images.
    Eval(Eval),
    /// The five likeliest classes of image files.
    Predict(Predict),
    /// Pictures of which expert took which patch of image files.
    Inspect(Inspect),
    /// Make a run out of published weights (.pth or .safetensors).
    Import(Import),
    /// Make a run with experts out of a dense model: its MLPs' copies, and fresh routers.
    Upcycle(Upcycle),
    /// Write a run's model as safetensors, in the published names.
    Export(Export),
    /// Parameters, arithmetic and memory of a model, layer by layer.
    Info(Info),
    /// Images per second that the training images' loader delivers, alone.
    Loader(Loader),
    /// Images per second of the model alone, on synthetic images that are on the device.
    Throughput(Throughput),
    /// Predicted and measured peak memory of training steps on synthetic images, as JSON.
    Memory(Memory),
    /// Measure ranks and the links between them on a model, and write a fleet file.
    Calibrate(Calibrate),
    /// Modes, shares, time and memory of a model on a measured fleet, before anything is trained.
    Plan(Plan),
    /// Compare with reference numbers of the published model.
    Parity(Parity),
}

#[derive(Args)]
pub(super) struct Train {
    /// Settings as TOML; without it, those of the embedded digits.
    #[arg(long, value_name = "FILE", conflicts_with = "resume")]
    pub(super) config: Option<PathBuf>,
    /// One setting, over the file's: section.key=value. May be repeated.
    #[arg(long, value_name = "KEY=VALUE", conflicts_with = "resume")]
    pub(super) set: Vec<String>,
    /// Image folder with train/CLASS/ and val/CLASS/ or test/CLASS/.
    #[arg(long, value_name = "DIR")]
    pub(super) data: Option<PathBuf>,
    /// Directory of the new run; runs/NAME-TIME without it.
    #[arg(long, value_name = "DIR", conflicts_with = "resume")]
    pub(super) output: Option<PathBuf>,
    /// Where to compute: cpu, wgpu or cuda, of those compiled in.
    #[arg(long)]
    pub(super) backend: Option<BackendKind>,
    /// Seed of everything random; over train.seed.
    #[arg(long, conflicts_with = "resume")]
    pub(super) seed: Option<u64>,
    /// Stop, with a checkpoint, once this many steps are done since the run's start.
    #[arg(long, value_name = "N")]
    pub(super) max_steps: Option<u64>,
    /// Continue the run in this directory as if it had never stopped.
    #[arg(long, value_name = "RUN_DIR")]
    pub(super) resume: Option<PathBuf>,
    #[command(flatten)]
    pub(super) parallel: Parallel,
    /// Fleet file that `calibrate` wrote with these settings: shares by measured speed, and the
    /// faster mode of each layer unless --mode names one. A resumed run has its own.
    #[arg(
        long,
        value_name = "FILE",
        help_heading = "Several devices",
        conflicts_with = "split"
    )]
    pub(super) fleet: Option<PathBuf>,
    /// Split shares anew when a device has slowed down or come back: auto or off.
    #[arg(long, value_enum, help_heading = "Several devices")]
    pub(super) rebalance: Option<Rebalance>,
    /// Fraction by which the slowest rank may take longer than the fastest before shares are split
    /// anew.
    #[arg(long, value_name = "FRACTION", help_heading = "Several devices")]
    pub(super) rebalance_threshold: Option<f64>,
}

/// Ranks; each replaces a key of [parallel].
#[derive(Args)]
#[command(next_help_heading = "Several devices")]
pub(super) struct Parallel {
    /// Ranks that work together: threads of this process, one GPU each or sharing the processor.
    #[arg(long, value_name = "N")]
    pub(super) ranks: Option<usize>,
    /// What ranks are: local (threads) or mpi (processes that mpirun has started).
    #[arg(long, value_enum)]
    pub(super) engine: Option<Engine>,
    /// What Mixture-of-Experts layers move between ranks: data (weights), model (tokens) or, in
    /// training, auto: each layer's faster mode and shares by speed, as the fleet file says or as
    /// measured first.
    #[arg(long, value_enum)]
    pub(super) mode: Option<Mode>,
    /// Weight of each rank's share, as in 5,2,1; equal without it.
    #[arg(long, value_name = "W,W,…", value_delimiter = ',')]
    pub(super) split: Option<Vec<f64>>,
}

impl Parallel {
    pub(super) fn overrides(&self) -> ParallelOverrides {
        ParallelOverrides {
            ranks: self.ranks,
            engine: self.engine,
            mode: self.mode,
            split: self.split.clone(),
            ..ParallelOverrides::default()
        }
    }
}

/// A trained model: a run's directory or one of its checkpoints.
#[derive(Args)]
#[group(required = true, multiple = false)]
pub(super) struct Model {
    /// Directory of a run: its best checkpoint, or the last if there is none.
    #[arg(long, value_name = "DIR")]
    pub(super) run: Option<PathBuf>,
    /// One checkpoint: a directory in a run's checkpoints/.
    #[arg(long, value_name = "DIR")]
    pub(super) checkpoint: Option<PathBuf>,
}

#[derive(Args)]
pub(super) struct Eval {
    #[command(flatten)]
    pub(super) model: Model,
    /// Image folder; the run's own without it.
    #[arg(long, value_name = "DIR")]
    pub(super) data: Option<PathBuf>,
    /// Arithmetic: f32, tf32, bf16 or f16; the run's own without it.
    #[arg(long)]
    pub(super) precision: Option<Precision>,
    /// Show every class, rather than the least accurate ones.
    #[arg(long)]
    pub(super) per_class: bool,
    /// Where to compute: cpu, wgpu or cuda, of those compiled in.
    #[arg(long, default_value_t = BackendKind::Cpu)]
    pub(super) backend: BackendKind,
    /// Images per step; the run's own without it.
    #[arg(long, value_name = "N")]
    pub(super) batch_size: Option<usize>,
    #[command(flatten)]
    pub(super) parallel: Parallel,
}

#[derive(Args)]
pub(super) struct Predict {
    #[command(flatten)]
    pub(super) model: Model,
    /// Image files.
    #[arg(required = true, value_name = "IMAGE")]
    pub(super) images: Vec<PathBuf>,
    /// Also write what the model saw and said, as safetensors: `images` and `logits`.
    #[arg(long, value_name = "FILE")]
    pub(super) tensors: Option<PathBuf>,
    /// Arithmetic: f32, tf32, bf16 or f16; the run's own without it.
    #[arg(long)]
    pub(super) precision: Option<Precision>,
    /// Where to compute: cpu, wgpu or cuda, of those compiled in.
    #[arg(long, default_value_t = BackendKind::Cpu)]
    pub(super) backend: BackendKind,
}

#[derive(Args)]
pub(super) struct Inspect {
    #[command(flatten)]
    pub(super) model: Model,
    /// Image files.
    #[arg(required = true, value_name = "IMAGE")]
    pub(super) images: Vec<PathBuf>,
    /// Directory of the pictures and inspect.html; RUN_DIR/inspect without it.
    #[arg(long, value_name = "DIR", required_unless_present = "run")]
    pub(super) output: Option<PathBuf>,
    /// Arithmetic: f32, tf32 or bf16; the run's own without it.
    #[arg(long)]
    pub(super) precision: Option<Precision>,
    /// Where to compute: cpu, wgpu or cuda, of those compiled in.
    #[arg(long, default_value_t = BackendKind::Cpu)]
    pub(super) backend: BackendKind,
}

#[derive(Args)]
pub(super) struct Import {
    /// Weights of the published model: .pth or .safetensors.
    #[arg(value_name = "WEIGHTS")]
    pub(super) weights: PathBuf,
    /// Settings of the model that they belong to.
    #[arg(long, value_name = "FILE")]
    pub(super) config: PathBuf,
    /// One setting, over the file's: section.key=value. May be repeated.
    #[arg(long, value_name = "KEY=VALUE")]
    pub(super) set: Vec<String>,
    /// Directory of the run to make.
    #[arg(long, value_name = "DIR")]
    pub(super) output: PathBuf,
    /// Keep initial values where the file has none that fit, rather than failing.
    #[arg(long)]
    pub(super) allow_partial: bool,
    /// Where to compute: cpu, wgpu or cuda, of those compiled in.
    #[arg(long, default_value_t = BackendKind::Cpu)]
    pub(super) backend: BackendKind,
}

/// A dense model: weights, a run's directory or one of its checkpoints.
#[derive(Args)]
#[group(required = true, multiple = false)]
pub(super) struct Dense {
    /// Dense weights in the published names: .pth or .safetensors; needs --config.
    #[arg(long, value_name = "WEIGHTS", requires = "config")]
    pub(super) weights: Option<PathBuf>,
    /// Directory of a dense run: its best checkpoint, or the last if there is none.
    #[arg(long, value_name = "DIR")]
    pub(super) run: Option<PathBuf>,
    /// One checkpoint: a directory in a dense run's checkpoints/.
    #[arg(long, value_name = "DIR")]
    pub(super) checkpoint: Option<PathBuf>,
}

#[derive(Args)]
pub(super) struct Upcycle {
    #[command(flatten)]
    pub(super) dense: Dense,
    /// Settings of the model with experts; without it, those of the dense run.
    #[arg(long, value_name = "FILE")]
    pub(super) config: Option<PathBuf>,
    /// One setting, over the others: section.key=value, as moe.blocks=[[],[1]]. May be repeated.
    #[arg(long, value_name = "KEY=VALUE")]
    pub(super) set: Vec<String>,
    /// Noise that tells experts apart: its standard deviation, relative to each weight. Drawn from
    /// train.seed.
    #[arg(long, value_name = "STD", default_value_t = 0.0)]
    pub(super) noise: f64,
    /// Directory of the run to make.
    #[arg(long, value_name = "DIR")]
    pub(super) output: PathBuf,
    /// Where to compute: cpu, wgpu or cuda, of those compiled in.
    #[arg(long, default_value_t = BackendKind::Cpu)]
    pub(super) backend: BackendKind,
}

#[derive(Args)]
pub(super) struct Export {
    #[command(flatten)]
    pub(super) model: Model,
    /// File to write.
    #[arg(long, value_name = "FILE")]
    pub(super) output: PathBuf,
    /// Where to compute: cpu, wgpu or cuda, of those compiled in.
    #[arg(long, default_value_t = BackendKind::Cpu)]
    pub(super) backend: BackendKind,
}

#[derive(Args)]
pub(super) struct Info {
    /// Settings as TOML; without it and without a model, those of the embedded digits.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["run", "checkpoint"])]
    pub(super) config: Option<PathBuf>,
    /// One setting, over the file's: section.key=value. May be repeated.
    #[arg(long, value_name = "KEY=VALUE", conflicts_with_all = ["run", "checkpoint"])]
    pub(super) set: Vec<String>,
    /// Directory of a run: its best checkpoint, or the last if there is none.
    #[arg(long, value_name = "DIR", conflicts_with = "checkpoint")]
    pub(super) run: Option<PathBuf>,
    /// One checkpoint: a directory in a run's checkpoints/.
    #[arg(long, value_name = "DIR")]
    pub(super) checkpoint: Option<PathBuf>,
}

#[derive(Args)]
pub(super) struct Loader {
    /// Settings as TOML; without it, those of the embedded digits.
    #[arg(long, value_name = "FILE")]
    pub(super) config: Option<PathBuf>,
    /// One setting, over the file's: section.key=value. May be repeated.
    #[arg(long, value_name = "KEY=VALUE")]
    pub(super) set: Vec<String>,
    /// Image folder with train/CLASS/.
    #[arg(long, value_name = "DIR")]
    pub(super) data: Option<PathBuf>,
    /// Epochs to deliver; images that data.cache_bytes keeps make later ones faster.
    #[arg(long, value_name = "N", default_value_t = 2)]
    pub(super) epochs: u64,
}

#[derive(Args)]
pub(super) struct Throughput {
    /// Settings as TOML; without it, those of the embedded digits.
    #[arg(long, value_name = "FILE")]
    pub(super) config: Option<PathBuf>,
    /// One setting, over the file's: section.key=value. May be repeated.
    #[arg(long, value_name = "KEY=VALUE")]
    pub(super) set: Vec<String>,
    /// Images of a step; those of the settings without it.
    #[arg(long, value_name = "N")]
    pub(super) batch_size: Option<usize>,
    /// What a step is: train (forward, backward, optimizer) or eval (forward).
    #[arg(long, value_enum, default_value_t)]
    pub(super) mode: ThroughputMode,
    /// Steps before the first timed one.
    #[arg(long, value_name = "N", default_value_t = 5)]
    pub(super) warmup: u16,
    /// Timed windows; the device is waited for at the end of each.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..))]
    pub(super) windows: u16,
    /// Steps of a window.
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u16).range(1..))]
    pub(super) steps: u16,
    /// Where to compute: cpu, wgpu or cuda, of those compiled in.
    #[arg(long, default_value_t = BackendKind::Cpu)]
    pub(super) backend: BackendKind,
}

#[derive(Args)]
pub(super) struct Memory {
    /// Settings as TOML; without it, those of the embedded digits.
    #[arg(long, value_name = "FILE")]
    pub(super) config: Option<PathBuf>,
    /// One setting, over the file's: section.key=value. May be repeated.
    #[arg(long, value_name = "KEY=VALUE")]
    pub(super) set: Vec<String>,
    /// Images of a step; those of the settings without it.
    #[arg(long, value_name = "N")]
    pub(super) batch_size: Option<usize>,
    /// Training steps; the peak is that of all but the first.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..))]
    pub(super) steps: u16,
    /// Where to compute: cpu, wgpu or cuda, of those compiled in.
    #[arg(long, default_value_t = BackendKind::Cpu)]
    pub(super) backend: BackendKind,
}

#[derive(Args)]
pub(super) struct Parity {
    /// Folders with config.json, io.safetensors and weights.
    #[arg(required = true, value_name = "DIR")]
    pub(super) cases: Vec<PathBuf>,
    /// Where to compute: cpu, wgpu or cuda, of those compiled in.
    #[arg(long, default_value_t = BackendKind::Cpu)]
    pub(super) backend: BackendKind,
    /// Largest relative error that passes; 1e-4 on the CPU and 1e-3 elsewhere without it.
    #[arg(long)]
    pub(super) tolerance: Option<f64>,
}

#[derive(Args)]
pub(super) struct Calibrate {
    /// Settings as TOML; without it, those of the embedded digits.
    #[arg(long, value_name = "FILE")]
    pub(super) config: Option<PathBuf>,
    /// One setting, over the file's: section.key=value. May be repeated.
    #[arg(long, value_name = "KEY=VALUE")]
    pub(super) set: Vec<String>,
    /// Ranks, as threads of this process; as many as --backend names without it.
    #[arg(long, value_name = "N")]
    pub(super) ranks: Option<usize>,
    /// What ranks are: local (threads) or mpi (processes that mpirun has started, each measuring
    /// its own --backend).
    #[arg(long, value_enum, default_value = "local")]
    pub(super) engine: Engine,
    /// Where ranks compute: one back-end for all, or one for each, as cpu,wgpu.
    #[arg(long, value_delimiter = ',', default_value = "cpu")]
    pub(super) backend: Vec<BackendKind>,
    /// Memory that each rank may use, in GiB; unknown without it, but for ranks on the CPU, which
    /// share the machine's.
    #[arg(long, value_name = "GIB")]
    pub(super) memory_gib: Option<f64>,
    /// Seconds for each measurement.
    #[arg(long, default_value_t = 0.2)]
    pub(super) seconds: f64,
    /// Fleet file to write.
    #[arg(long, value_name = "FILE", default_value = "fleet.toml")]
    pub(super) output: PathBuf,
}

#[derive(Args)]
pub(super) struct Plan {
    /// Settings as TOML; without it, those of the embedded digits.
    #[arg(long, value_name = "FILE")]
    pub(super) config: Option<PathBuf>,
    /// One setting, over the file's: section.key=value. May be repeated.
    #[arg(long, value_name = "KEY=VALUE")]
    pub(super) set: Vec<String>,
    /// Fleet file that `calibrate` wrote with these settings.
    #[arg(long, value_name = "FILE")]
    pub(super) fleet: PathBuf,
}
