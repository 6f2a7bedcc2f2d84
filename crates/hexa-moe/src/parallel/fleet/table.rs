//! A prediction as a person reads it.

use core::fmt;

use super::super::context::Mode;
use super::cost::Prediction;
use super::file::Fleet;

/// Predictions of a plan and of the alternatives, to be printed.
#[derive(Debug, Clone, Copy)]
pub struct PlanTable<'a> {
    /// The fleet.
    pub fleet: &'a Fleet,
    /// The plan.
    pub chosen: &'a Prediction,
    /// All layers in one mode, with that mode's own best shares, if it fits.
    pub alternatives: &'a [(Mode, Option<Prediction>)],
}

impl Mode {
    /// The name of the mode.
    pub fn name(self) -> &'static str {
        match self {
            Mode::DataCentric => "data-centric",
            Mode::ModelCentric => "model-centric",
        }
    }
}

fn milliseconds(seconds: f64) -> String {
    format!("{:.2} ms", 1e3 * seconds)
}

fn mebibytes(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / (1u64 << 20) as f64)
}

/// Shares with a colon between.
fn shares(shares: &[usize]) -> String {
    let shares: Vec<String> = shares.iter().map(usize::to_string).collect();
    shares.join(":")
}

impl fmt::Display for PlanTable<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let chosen = self.chosen;
        writeln!(
            f,
            "predicted step time {}: computation {}, exchanges {}, update {}",
            milliseconds(chosen.step_s),
            milliseconds(chosen.compute_s),
            milliseconds(chosen.exchange_s),
            milliseconds(chosen.update_s),
        )?;
        for (mode, prediction) in self.alternatives {
            let text = match prediction {
                Some(prediction) => milliseconds(prediction.step_s),
                None => "does not fit into memory".to_owned(),
            };
            writeln!(f, "  all layers {:<14} {text}", mode.name())?;
        }
        writeln!(f)?;
        self.layers(f)?;
        writeln!(f)?;
        self.ranks(f)
    }
}

impl PlanTable<'_> {
    fn layers(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{:>5}  {:<13} {:<20} {:>12} {:>12} {:>14}",
            "layer", "mode", "hidden units", "experts", "exchanges", "bytes moved"
        )?;
        let plans = self.chosen.plan.layers.iter().zip(&self.chosen.layers);
        for (number, (plan, layer)) in plans.enumerate() {
            writeln!(
                f,
                "{:>5}  {:<13} {:<20} {:>12} {:>12} {:>14}",
                number + 1,
                layer.mode.name(),
                shares(&plan.widths),
                milliseconds(layer.ffn_s),
                milliseconds(layer.exchange_s),
                mebibytes(layer.bytes_moved),
            )?;
        }
        Ok(())
    }

    fn ranks(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{:>5}  {:<13} {:<9} {:>10} {:>12} {:>14} {:>14}",
            "rank", "name", "back-end", "samples", "computes", "memory", "of"
        )?;
        let ranks = self.fleet.ranks.iter().zip(&self.chosen.ranks);
        for (number, (profile, rank)) in ranks.enumerate() {
            let available = profile.memory_bytes.map_or("unknown".into(), mebibytes);
            writeln!(
                f,
                "{:>5}  {:<13} {:<9} {:>10} {:>12} {:>14} {:>14}",
                number,
                profile.name,
                profile.backend,
                self.chosen.plan.batch[number],
                milliseconds(rank.busy_s),
                mebibytes(rank.memory.total()),
                available,
            )?;
        }
        Ok(())
    }
}
