//! Results as JSON, Markdown and plots.

use std::fmt::Write as _;
use std::fs;
use std::io::Write as _;
use std::path::Path;

use anyhow::Result;
use hexa_moe::parallel::Mode;
use hexa_moe::parallel::fleet::Fleet;
use serde::Serialize;

use crate::ranks::{Cores, Rank};
use crate::{Arguments, Engine, crossover, heterogeneity, overlap, plot};

/// All results of a run.
#[derive(Serialize)]
pub struct Report {
    engine: &'static str,
    cores: Cores,
    busy: Vec<usize>,
    steps: u32,
    /// What all of it took.
    pub seconds: f64,
    /// Measurements of ranks and links, one for each shape.
    pub fleets: Vec<Fleet>,
    pub heterogeneity: Vec<heterogeneity::Row>,
    pub crossover: Vec<crossover::Row>,
    pub overlap: Vec<overlap::Row>,
}

/// How far predictions may be off.
const TOLERANCE: f64 = 0.2;

impl Report {
    pub fn new(rank: &Rank, arguments: &Arguments) -> Self {
        Self {
            engine: match rank.engine {
                Engine::Local => "local",
                Engine::Mpi => "mpi",
            },
            cores: rank.cores.clone(),
            busy: arguments.busy.clone(),
            steps: arguments.steps,
            seconds: 0.0,
            fleets: Vec::new(),
            heterogeneity: Vec::new(),
            crossover: Vec::new(),
            overlap: Vec::new(),
        }
    }

    /// Writes everything into a folder.
    pub fn write(&self, folder: &Path) -> Result<()> {
        fs::create_dir_all(folder)?;
        save(folder, "report.json", &serde_json::to_string_pretty(self)?)?;
        save(folder, "report.md", &self.to_markdown())?;
        if !self.crossover.is_empty() {
            save(folder, "crossover.svg", &plot::crossover(&self.crossover)?)?;
        }
        if self.heterogeneity.iter().any(|row| !row.sweep.is_empty()) {
            let svg = plot::heterogeneity(&self.heterogeneity)?;
            save(folder, "heterogeneity.svg", &svg)?;
        }
        Ok(())
    }

    pub fn to_markdown(&self) -> String {
        let cores: Vec<_> = self.cores.0.iter().map(|c| c.len().to_string()).collect();
        let mut text = format!(
            "Engine {}, ranks on {} cores, medians of {} steps; all of it took {:.0} s.\n",
            self.engine,
            cores.join(" and "),
            self.steps,
            self.seconds
        );
        if self.busy.iter().any(|&threads| threads > 0) {
            let _ = writeln!(
                text,
                "Ranks share their cores with {:?} busy threads.",
                self.busy
            );
        }
        self.heterogeneity_table(&mut text);
        self.crossover_table(&mut text);
        self.overlap_table(&mut text);
        text
    }

    fn heterogeneity_table(&self, text: &mut String) {
        if self.heterogeneity.is_empty() {
            return;
        }
        text.push_str(
            "\n| d_model,d_ff,E,k,layers | mode | tokens | uniform ms | calibrated ms | shares | \
             ideal ms | of the ideal gain | best of the curve ms |\n|---|---|---|---|---|---|---|---|---|\n",
        );
        for row in &self.heterogeneity {
            let shares = match row.mode {
                Mode::DataCentric => &row.plan.batch,
                Mode::ModelCentric => &row.plan.layers[0].widths,
            };
            let best = row.sweep.iter().map(|p| p.1).fold(f64::INFINITY, f64::min);
            let _ = writeln!(
                text,
                "| {} | {} | {} | {} | {} | {shares:?} | {} | {} | {} |",
                row.shape,
                row.mode.name(),
                row.tokens,
                ms(row.uniform.step_s),
                ms(row.calibrated.step_s),
                ms(row.ideal_s),
                reached(row),
                ms(best.min(row.calibrated.step_s)),
            );
        }
    }

    fn crossover_table(&self, text: &mut String) {
        if self.crossover.is_empty() {
            return;
        }
        text.push_str(
            "\n| d_model,d_ff,E,k,layers | tokens | data-centric ms (predicted) | \
             model-centric ms (predicted) | chosen | right |\n|---|---|---|---|---|---|\n",
        );
        let mut within = 0;
        for row in &self.crossover {
            let [data, model] = [0, 1].map(|i| {
                let error = row.predicted_s[i] / row.measured_s[i] - 1.0;
                within += usize::from(error.abs() <= TOLERANCE);
                format!(
                    "{} ({}, {:+.0} %)",
                    ms(row.measured_s[i]),
                    ms(row.predicted_s[i]),
                    100.0 * error
                )
            });
            let _ = writeln!(
                text,
                "| {} | {} | {data} | {model} | {} | {} |",
                row.shape,
                row.tokens,
                row.chosen.name(),
                if row.right { "yes" } else { "no" },
            );
        }
        let cost = |row: &crossover::Row| {
            let chosen = row.measured_s[usize::from(row.chosen == Mode::ModelCentric)];
            chosen / row.measured_s[0].min(row.measured_s[1])
        };
        let most = self.crossover.iter().map(cost).fold(1.0, f64::max);
        let right = self.crossover.iter().filter(|row| row.right).count();
        let _ = writeln!(
            text,
            "\nThe faster mode was chosen in {right} of {} cases; {within} of {} predictions are \
             within {:.0} % of the measurement. The choices cost up to {:.1} % more than the faster mode.",
            self.crossover.len(),
            2 * self.crossover.len(),
            100.0 * TOLERANCE,
            100.0 * (most - 1.0),
        );
    }

    fn overlap_table(&self, text: &mut String) {
        if self.overlap.is_empty() {
            return;
        }
        text.push_str(
            "\n| d_model,d_ff,E,k,layers | tokens | wait for gathers, late ms | early ms | hidden | \
             step, late ms | early ms |\n|---|---|---|---|---|---|---|\n",
        );
        for row in &self.overlap {
            let waits = |timed: &crate::ranks::Timed| {
                let waits: Vec<String> = timed.gather_s.iter().map(|&s| ms(s)).collect();
                waits.join(" + ")
            };
            let _ = writeln!(
                text,
                "| {} | {} | {} | {} | {:.0} % | {} | {} |",
                row.shape,
                row.tokens,
                waits(&row.late),
                waits(&row.early),
                100.0 * row.hidden,
                ms(row.late.step_s),
                ms(row.early.step_s),
            );
        }
    }
}

/// The part of the ideal gain, where there is one to speak of.
fn reached(row: &heterogeneity::Row) -> String {
    if row.ideal_s > 0.95 * row.uniform.step_s {
        return "–".into();
    }
    format!("{:.0} %", 100.0 * row.gain_reached)
}

fn ms(seconds: f64) -> String {
    format!("{:.2}", 1e3 * seconds)
}

/// To a temporary file, synchronised, then renamed.
fn save(folder: &Path, name: &str, text: &str) -> Result<()> {
    let temporary = folder.join(format!("{name}.tmp"));
    let mut file = fs::File::create(&temporary)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    fs::rename(&temporary, folder.join(name))?;
    Ok(())
}
