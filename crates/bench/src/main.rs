//! Measures the expert FFN and its operators on the compiled-in back-ends, side by side, and PyTorch implementations
//! of the same in the same run.
//!
//! Every case is verified against an oracle in double precision before it is timed; a case that
//! fails is reported and never becomes a row.

mod case;
mod operators;
mod peers;
mod report;
mod upstream;
mod verify;

use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use burn::backend::Autodiff;
use burn::tensor::DType;
use burn::tensor::backend::{Backend, BackendTypes};
use case::{Setting, Shape, measure};
use clap::{Args, Parser, Subcommand, ValueEnum};
use hexa_ops::{Favor, backends};
use report::Report;

/// Times the expert FFN and its operators.
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Routing and expert FFN, forward and forward + backward.
    Layer(Arguments),
    /// ESMM, ESTMM and ESS by themselves; with one expert they are dense.
    Operators(Arguments),
    /// As `layer`, and PyTorch on the same machine in the same run.
    Peers {
        #[command(flatten)]
        arguments: Arguments,
        /// Interpreter that has PyTorch.
        #[arg(long, default_value = "python3")]
        python: PathBuf,
        /// Program that times the peers.
        #[arg(long, default_value = "tools/peers/peers.py")]
        program: PathBuf,
        /// Peers that the program is to time, of those it has; all if none is named.
        #[arg(long)]
        only: Vec<String>,
        /// Further peers: importable modules with a function `layer(x, gates, expert_ids, params)`.
        #[arg(long = "peer")]
        peers: Vec<String>,
    },
}

#[derive(Args)]
struct Arguments {
    /// Back-ends to measure, of those compiled in.
    #[arg(long, value_enum, value_delimiter = ',', default_value = "cpu")]
    backend: Vec<BackendName>,
    /// Shapes as tokens,d_model,d_ff,num_experts,top_k; may be given several times.
    #[arg(long = "shape", default_values_t = [Shape::default()])]
    shapes: Vec<Shape>,
    /// Type of tokens and weights; the router is f32 in any case.
    #[arg(long, value_enum, default_value = "f32")]
    dtype: DTypeName,
    /// Exponent of Zipf's distribution, in proportion to which tokens choose experts.
    #[arg(long, default_value_t = 0.0)]
    skew: f64,
    /// What the layer's kernels choose where they could have either.
    #[arg(long, value_enum, default_value = "speed")]
    favor: FavorName,
    /// Timed repetitions after two that are not counted.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=1000))]
    repetitions: u32,
    /// File for the results as JSON.
    #[arg(long)]
    json: Option<PathBuf>,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum BackendName {
    Cpu,
    Wgpu,
    Cuda,
    /// CUDA with the kernels alone that other devices run, too.
    CudaPortable,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum FavorName {
    Speed,
    Memory,
}

impl FavorName {
    fn favor(self) -> Favor {
        match self {
            FavorName::Speed => Favor::Speed,
            FavorName::Memory => Favor::Memory,
        }
    }
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum DTypeName {
    F32,
    Bf16,
    F16,
}

impl DTypeName {
    fn dtype(self) -> DType {
        match self {
            DTypeName::F32 => DType::F32,
            DTypeName::Bf16 => DType::BF16,
            DTypeName::F16 => DType::F16,
        }
    }

    /// PyTorch's name.
    fn torch(self) -> &'static str {
        match self {
            DTypeName::F32 => "float32",
            DTypeName::Bf16 => "bfloat16",
            DTypeName::F16 => "float16",
        }
    }
}

fn main() -> Result<()> {
    let (arguments, measurement, peers) = match Cli::parse().command {
        Command::Layer(arguments) => (arguments, Measurement::Layer, None),
        Command::Operators(arguments) => (arguments, Measurement::Operators, None),
        Command::Peers {
            arguments,
            python,
            program,
            only,
            peers,
        } => {
            let program = peers::Program {
                python,
                program,
                only,
                modules: peers,
            };
            (arguments, Measurement::Layer, Some(program))
        }
    };
    let mut report = Report::default();
    for &backend in &arguments.backend {
        for &shape in &arguments.shapes {
            let case = Case {
                backend,
                shape,
                measurement,
            };
            run(case, &arguments, &mut report)
                .with_context(|| format!("{} at {shape}", name(backend)))?;
        }
    }
    if let Some(program) = peers {
        program.measure(&arguments, &mut report)?;
    }
    print!("{}", report.to_markdown());
    if let Some(path) = arguments.json {
        let text = serde_json::to_string_pretty(&report)?;
        std::fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(())
}

fn name(backend: BackendName) -> &'static str {
    match backend {
        BackendName::Cpu => "cpu",
        BackendName::Wgpu => "wgpu",
        BackendName::Cuda => "cuda",
        BackendName::CudaPortable => "cuda-portable",
    }
}

/// The cargo feature that compiles it in.
fn feature(backend: BackendName) -> &'static str {
    match backend {
        BackendName::CudaPortable => name(BackendName::Cuda),
        other => name(other),
    }
}

/// What is measured of each back-end.
#[derive(Clone, Copy)]
enum Measurement {
    Layer,
    Operators,
}

/// One back-end at one shape.
#[derive(Clone, Copy)]
struct Case {
    backend: BackendName,
    shape: Shape,
    measurement: Measurement,
}

fn run(case: Case, arguments: &Arguments, report: &mut Report) -> Result<()> {
    match case.backend {
        #[cfg(feature = "cpu")]
        BackendName::Cpu => on::<backends::Cpu>(case, arguments, report),
        #[cfg(feature = "wgpu")]
        BackendName::Wgpu => on::<backends::Wgpu>(case, arguments, report),
        #[cfg(feature = "cuda")]
        BackendName::Cuda => on::<backends::Cuda>(case, arguments, report),
        #[cfg(feature = "cuda")]
        BackendName::CudaPortable => {
            hexa_ops::use_portable_kernels(true);
            let outcome = on::<backends::Cuda>(case, arguments, report);
            hexa_ops::use_portable_kernels(false);
            outcome
        }
        #[allow(unreachable_patterns, reason = "with all features nothing is left")]
        other => bail!(
            "back-end {} is not compiled in; build with --features {}",
            name(other),
            feature(other)
        ),
    }
}

fn on<K: hexa_ops::ExpertKernels>(
    case: Case,
    arguments: &Arguments,
    report: &mut Report,
) -> Result<()> {
    let Case {
        backend,
        shape,
        measurement,
    } = case;
    let device = <Autodiff<K> as BackendTypes>::Device::default();
    let dtype = arguments.dtype.dtype();
    <K as Backend>::seed(&device, 7);
    ensure!(
        K::supports_dtype(&device, dtype),
        "this device has no {dtype:?}; measure another type"
    );
    let setting = Setting {
        shape,
        dtype,
        skew: arguments.skew,
        favor: arguments.favor.favor(),
    };
    match measurement {
        Measurement::Layer => {
            verify::verify::<Autodiff<K>>(setting, &device)?;
            let timings = measure::<K>(setting, arguments.repetitions, &device)?;
            report.push(name(backend), shape, timings);
        }
        Measurement::Operators => {
            let timings = operators::measure::<K>(setting, arguments.repetitions, &device)?;
            report.push_operators(name(backend), shape, timings);
        }
    }
    Ok(())
}
