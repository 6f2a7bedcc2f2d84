//! Measures parallel training of Mixture-of-Experts layers on unequal ranks: what calibrated
//! shares gain, where which mode wins and whether that is predicted, and what an early gather
//! hides. Ranks are threads of this process, or processes under `mpirun`, pinned to cores.

mod crossover;
mod heterogeneity;
mod net;
mod overlap;
mod plot;
mod ranks;
mod report;

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::{Parser, ValueEnum};

use crate::net::NetShape;
use crate::ranks::{Cores, Rank};
use crate::report::Report;

/// Measures parallel training on unequal ranks.
#[derive(Parser, Clone)]
#[command(version)]
pub struct Arguments {
    /// How ranks communicate.
    #[arg(long, value_enum, default_value = "local")]
    engine: Engine,
    /// Cores of each rank, as 0-11/12-15; without it, three quarters and one quarter of all.
    #[arg(long, value_name = "CORES")]
    ranks: Option<Cores>,
    /// Threads that keep each rank's cores busy, as 0,2.
    #[arg(long, value_delimiter = ',', value_name = "THREADS")]
    busy: Vec<usize>,
    /// What to measure.
    #[arg(
        long,
        value_enum,
        value_delimiter = ',',
        default_value = "heterogeneity,crossover,overlap"
    )]
    only: Vec<Part>,
    /// Shapes as d_model,d_ff,num_experts,top_k,layers; may be given several times.
    #[arg(long = "shape", default_values_t = NetShape::defaults())]
    shapes: Vec<NetShape>,
    /// Tokens of all ranks for the comparison of splits.
    #[arg(long, default_value_t = 8192)]
    tokens: usize,
    /// Tokens of all ranks at which the modes are compared.
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "1024,2048,3072,4096,6144,8192,12288"
    )]
    batches: Vec<usize>,
    /// Measured steps of each case, after two that are not counted; a multiple of three where uniform
    /// and calibrated shares take turns.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    steps: u32,
    /// Seconds for each measurement of the calibration.
    #[arg(long, default_value_t = 0.2)]
    calibrate_s: f64,
    /// Folder for report.json, report.md and plots.
    #[arg(long, default_value = "parallel-report")]
    output: PathBuf,
}

/// How ranks communicate.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Engine {
    /// Threads of this process.
    Local,
    /// Processes under mpirun.
    Mpi,
}

/// What is measured.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Part {
    /// Calibrated against uniform shares.
    Heterogeneity,
    /// Both modes over batch sizes.
    Crossover,
    /// Early gathers.
    Overlap,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    for &tokens in arguments.batches.iter().chain([&arguments.tokens]) {
        ensure!(
            tokens >= net::TOKENS_PER_SAMPLE && tokens.is_multiple_of(net::TOKENS_PER_SAMPLE),
            "{tokens} tokens are no whole samples; give multiples of {}",
            net::TOKENS_PER_SAMPLE
        );
    }
    ensure!(
        arguments.calibrate_s.is_finite() && arguments.calibrate_s > 0.0,
        "--calibrate-s is {}, allowed is a number above 0",
        arguments.calibrate_s
    );
    let output = arguments.output.clone();
    let start = Instant::now();
    if let Some(mut report) = ranks::run(arguments, measure)? {
        report.seconds = start.elapsed().as_secs_f64();
        report
            .write(&output)
            .with_context(|| format!("writing into {}", output.display()))?;
        print!("{}", report.to_markdown());
    }
    Ok(())
}

/// One rank's part in all measurements; all ranks come to the same report.
fn measure(rank: &Rank, arguments: &Arguments) -> Result<Report> {
    let mut report = Report::new(rank, arguments);
    for &shape in &arguments.shapes {
        rank.say(&format!("{shape}: calibration"));
        let calibrated = rank.calibrate(shape, arguments)?;
        report.fleets.push(calibrated.clone());
        if arguments.only.contains(&Part::Heterogeneity) {
            rank.say(&format!("{shape}: shares"));
            let rows = heterogeneity::measure(rank, shape, &calibrated, arguments)?;
            report.heterogeneity.extend(rows);
        }
        if arguments.only.contains(&Part::Crossover) {
            rank.say(&format!("{shape}: modes"));
            let rows = crossover::measure(rank, shape, &calibrated, arguments)?;
            report.crossover.extend(rows);
        }
        if arguments.only.contains(&Part::Overlap) {
            rank.say(&format!("{shape}: gathers"));
            let row = overlap::measure(rank, shape, &calibrated, arguments)?;
            report.overlap.push(row);
        }
    }
    Ok(report)
}
