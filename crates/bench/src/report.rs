//! Results as Markdown and JSON.

use serde::Serialize;

use crate::case::{Shape, Timings};
use crate::operators::Timing;

/// All rows of a run.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    rows: Vec<Row>,
    operators: Vec<OperatorRow>,
}

#[derive(Debug, Serialize)]
struct Row {
    backend: String,
    shape: Shape,
    timings: Timings,
}

#[derive(Debug, Serialize)]
struct OperatorRow {
    backend: String,
    shape: Shape,
    timing: Timing,
}

impl Report {
    /// Adds a back-end's operators.
    pub fn push_operators(&mut self, backend: &str, shape: Shape, timings: Vec<Timing>) {
        self.operators
            .extend(timings.into_iter().map(|timing| OperatorRow {
                backend: backend.to_owned(),
                shape,
                timing,
            }));
    }

    /// Adds a measured case.
    pub fn push(&mut self, backend: &str, shape: Shape, timings: Timings) {
        self.rows.push(Row {
            backend: backend.to_owned(),
            shape,
            timings,
        });
    }

    /// A table of medians with their spread for cases, and one for operators, where there are any.
    pub fn to_markdown(&self) -> String {
        let mut tables = Vec::new();
        if !self.rows.is_empty() {
            tables.push(self.cases());
        }
        if !self.operators.is_empty() {
            tables.push(self.operators());
        }
        tables.join("\n")
    }

    /// Useful GFLOP/s, and GB/s if every operand and the result are moved once.
    fn operators(&self) -> String {
        let mut text = String::from(
            "| back-end | tokens,d_model,d_ff,E,k | operator | ms (min–max) | GFLOP/s | GB/s |\n\
             |---|---|---|---|---|---|\n",
        );
        for row in &self.operators {
            let Timing {
                operator, seconds, ..
            } = &row.timing;
            let (time, rate) = columns(seconds, row.timing.flops);
            let bandwidth = columns(seconds, row.timing.bytes).1;
            text += &format!(
                "| {} | {} | {operator} | {time} | {rate:.0} | {bandwidth:.0} |\n",
                row.backend, row.shape
            );
        }
        text
    }

    /// Useful GFLOP/s count the backward pass as twice the forward pass.
    fn cases(&self) -> String {
        let mut text = String::from(
            "| back-end | tokens,d_model,d_ff,E,k | forward ms (min–max) | GFLOP/s | \
             forward + backward ms (min–max) | GFLOP/s | extra MiB |\n\
             |---|---|---|---|---|---|---|\n",
        );
        // Shape by shape, so that what is to be compared stands together.
        let mut rows: Vec<&Row> = self.rows.iter().collect();
        rows.sort_by_key(|row| self.first_of(row.shape));
        for row in rows {
            let flops = row.shape.forward_flops();
            let (forward, forward_rate) = columns(&row.timings.forward_s, flops);
            let (both, both_rate) = columns(&row.timings.forward_backward_s, 3.0 * flops);
            text += &format!(
                "| {} | {} | {forward} | {forward_rate:.0} | {both} | {both_rate:.0} | {} |\n",
                row.backend,
                row.shape,
                row.timings
                    .extra_bytes
                    .map_or("–".into(), |bytes| (bytes >> 20).to_string()),
            );
        }
        text
    }

    /// Number of the first row of this shape.
    fn first_of(&self, shape: Shape) -> Option<usize> {
        self.rows.iter().position(|row| row.shape == shape)
    }
}

/// Median and spread in milliseconds, and the rate at the median.
fn columns(seconds: &[f64], flops: f64) -> (String, f64) {
    let ms = |s: f64| s * 1e3;
    let (Some(&min), Some(&max)) = (seconds.first(), seconds.last()) else {
        return ("not measured".into(), 0.0);
    };
    let median = seconds[seconds.len() / 2];
    let text = format!("{:.3} ({:.3}–{:.3})", ms(median), ms(min), ms(max));
    (text, flops / median / 1e9)
}
