//! Measures the expert FFN on the compiled-in back-ends, side by side.
//!
//! Every case is verified against the f64 oracle before it is timed; a case that fails is
//! reported and never becomes a row.

mod case;
mod report;
mod verify;

use anyhow::{Context, Result, bail, ensure};
use burn::backend::Autodiff;
use burn::tensor::DType;
use burn::tensor::backend::Backend;
use case::{Shape, measure};
use clap::{Parser, ValueEnum};
use hexa_ops::backends;
use report::Report;

/// Times the expert FFN, forward and forward + backward.
#[derive(Parser)]
#[command(version)]
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
    /// Timed repetitions after two that are not counted.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=1000))]
    repetitions: u32,
    /// File for the results as JSON.
    #[arg(long)]
    json: Option<std::path::PathBuf>,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum BackendName {
    Cpu,
    Wgpu,
    Cuda,
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
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let mut report = Report::default();
    for &backend in &arguments.backend {
        for shape in &arguments.shapes {
            let row = run(
                backend,
                *shape,
                arguments.dtype.dtype(),
                arguments.repetitions,
            )
            .with_context(|| format!("{} at {shape}", name(backend)))?;
            report.push(name(backend), *shape, row);
        }
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
    }
}

fn run(
    backend: BackendName,
    shape: Shape,
    dtype: DType,
    repetitions: u32,
) -> Result<case::Timings> {
    match backend {
        #[cfg(feature = "cpu")]
        BackendName::Cpu => on::<backends::Cpu>(shape, dtype, repetitions),
        #[cfg(feature = "wgpu")]
        BackendName::Wgpu => on::<backends::Wgpu>(shape, dtype, repetitions),
        #[cfg(feature = "cuda")]
        BackendName::Cuda => on::<backends::Cuda>(shape, dtype, repetitions),
        #[allow(unreachable_patterns, reason = "with all features nothing is left")]
        other => bail!(
            "back-end {} is not compiled in; build with --features {}",
            name(other),
            name(other)
        ),
    }
}

fn on<K: hexa_ops::ExpertKernels>(
    shape: Shape,
    dtype: DType,
    repetitions: u32,
) -> Result<case::Timings> {
    let device = <Autodiff<K> as burn::tensor::backend::BackendTypes>::Device::default();
    <K as Backend>::seed(&device, 7);
    ensure!(
        K::supports_dtype(&device, dtype),
        "this device has no {dtype:?}; measure another type"
    );
    verify::verify::<Autodiff<K>>(shape, dtype, &device)?;
    measure::<Autodiff<K>>(shape, dtype, repetitions, &device)
}
