//! Results as Markdown and JSON.

use serde::Serialize;

use crate::case::{Shape, Timings};

/// All rows of a run.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    rows: Vec<Row>,
}

#[derive(Debug, Serialize)]
struct Row {
    backend: String,
    shape: Shape,
    timings: Timings,
}

impl Report {
    /// Adds a measured case.
    pub fn push(&mut self, backend: &str, shape: Shape, timings: Timings) {
        self.rows.push(Row {
            backend: backend.to_owned(),
            shape,
            timings,
        });
    }

    /// A table of medians with their spread, and useful GFLOP/s (backward counted as twice the
    /// forward pass).
    pub fn to_markdown(&self) -> String {
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
    let text = format!("{:.2} ({:.2}–{:.2})", ms(median), ms(min), ms(max));
    (text, flops / median / 1e9)
}
