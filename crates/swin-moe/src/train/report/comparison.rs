//! What a plan was predicted to take, beside what its steps took.

use std::fmt::Write;

use super::svg::escape;

/// A number as it was predicted and as it was measured.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Compared {
    /// By the cost model.
    pub predicted: f64,
    /// Median over steps; `None` before the second step.
    pub measured: Option<f64>,
}

/// A run on a measured fleet.
#[derive(Debug, Clone, PartialEq)]
pub struct Comparison {
    /// Steps that medians are of: the latest ones, since the run was started or resumed, or shares
    /// were changed.
    pub steps: usize,
    /// Seconds of a step, all of it.
    pub step_s: Compared,
    /// Bytes that Mixture-of-Experts layers received in a step, all ranks together.
    pub layer_bytes: Compared,
    /// The ranks, in order.
    pub ranks: Vec<ComparedRank>,
}

/// One rank of them.
#[derive(Debug, Clone, PartialEq)]
pub struct ComparedRank {
    /// Its name in the fleet file.
    pub name: String,
    /// Its back-end.
    pub backend: String,
    /// Images of a whole batch that are its own.
    pub images: usize,
    /// Seconds of a step in which it computes, waiting left out.
    pub busy_s: Compared,
}

/// The table; empty for a run without a measured fleet.
pub(super) fn table(comparison: Option<&Comparison>) -> String {
    let Some(comparison) = comparison else {
        return String::new();
    };
    let mut html = format!(
        "<h2>Predicted and measured</h2><div class=\"scroll\"><table><tr><th>a step, median of \
         {}</th><th>predicted</th><th>measured</th><th>measured / predicted</th></tr>",
        comparison.steps
    );
    row(&mut html, "whole step, ms", comparison.step_s, 1e3);
    for (rank, of) in comparison.ranks.iter().enumerate() {
        let label = format!(
            "rank {rank} ({}, {}, {} images) computes, ms",
            of.name, of.backend, of.images
        );
        row(&mut html, &label, of.busy_s, 1e3);
    }
    let mebi = 1.0 / f64::from(1 << 20);
    row(
        &mut html,
        "moved by MoE layers, MiB",
        comparison.layer_bytes,
        mebi,
    );
    html + "</table></div>"
}

fn row(html: &mut String, label: &str, compared: Compared, unit: f64) {
    let number = |value: f64| format!("{:.3}", unit * value);
    let (measured, ratio) = match compared.measured {
        None => ("–".to_owned(), "–".to_owned()),
        Some(measured) if compared.predicted > 0.0 => (
            number(measured),
            format!("{:.2}", measured / compared.predicted),
        ),
        Some(measured) => (number(measured), "–".to_owned()),
    };
    let _ = write!(
        html,
        "<tr><th>{}</th><td>{}</td><td>{measured}</td><td>{ratio}</td></tr>",
        escape(label),
        number(compared.predicted)
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_stand_side_by_side() {
        let mut comparison = Comparison {
            steps: 12,
            step_s: Compared {
                predicted: 0.02,
                measured: Some(0.025),
            },
            layer_bytes: Compared {
                predicted: 0.0,
                measured: Some(3_145_728.0),
            },
            ranks: vec![ComparedRank {
                name: "a & b".to_owned(),
                backend: "cpu".to_owned(),
                images: 7,
                busy_s: Compared {
                    predicted: 0.0105,
                    measured: Some(0.0063),
                },
            }],
        };
        let html = table(Some(&comparison));
        for part in [
            "median of 12",
            "<th>whole step, ms</th><td>20.000</td><td>25.000</td><td>1.25</td>",
            "<th>rank 0 (a &amp; b, cpu, 7 images) computes, ms</th><td>10.500</td><td>6.300</td>\
             <td>0.60</td>",
            "MiB</th><td>0.000</td><td>3.000</td><td>–</td>",
        ] {
            assert!(html.contains(part), "{part}: {html}");
        }
        comparison.step_s.measured = None;
        let html = table(Some(&comparison));
        assert!(
            html.contains("<td>20.000</td><td>–</td><td>–</td>"),
            "{html}"
        );
        assert_eq!(table(None), "");
    }
}
