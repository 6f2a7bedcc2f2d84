//! `report.html`: a run in one self-contained page.

mod comparison;
mod experts;
mod heat;
mod svg;

use std::fmt::Write;

pub use self::comparison::{Compared, ComparedRank, Comparison};
use self::experts::expert_section;
pub(crate) use self::svg::escape;
use self::svg::{Series, line_chart, number};
use super::checkpoint::write_atomically;
use super::error::Result;
use super::metrics::{EvalRecord, MemoryRecord, Record, StepRecord, read_records};
use super::run_dir::RunDir;
use crate::info::binary;

const STYLE: &str = include_str!("style.css");
const BLUE: &str = "hsl(215 70% 52%)";
const ORANGE: &str = "hsl(28 85% 52%)";
const GREEN: &str = "hsl(150 50% 42%)";

/// What the page says beside the metrics.
#[derive(Debug, Clone, Default)]
pub struct Facts {
    /// The run's name.
    pub name: String,
    /// Label and value of each line of the last table.
    pub lines: Vec<(String, String)>,
    /// Predicted peak of the memory that tensors take, where there is a prediction.
    pub predicted_bytes: Option<u64>,
    /// What was predicted, of a run on a measured fleet.
    pub comparison: Option<Comparison>,
}

/// Writes the page from the run's metrics, replacing an earlier one as a whole.
///
/// # Errors
/// [`super::TrainError`] if the metrics cannot be read or the page cannot be written.
pub fn write(run: &RunDir, facts: &Facts) -> Result<()> {
    let records = read_records(&run.metrics())?;
    write_atomically(&run.report(), render(facts, &records).as_bytes())
}

/// The page.
pub fn render(facts: &Facts, records: &[Record]) -> String {
    let mut steps = Vec::new();
    let mut evals = Vec::new();
    for record in records {
        match record {
            Record::Step(step) => steps.push(step),
            Record::Eval(eval) => evals.push(eval),
        }
    }
    let title = escape(&facts.name);
    let mut html = format!(
        "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\
         <title>{title}</title><style>{STYLE}</style></head><body><main><h1>{title}</h1>"
    );
    html.push_str(&cards(&steps, &evals));
    html.push_str("<section class=\"charts\">");
    for (title, chart) in [
        ("Loss", loss_chart(&steps, &evals)),
        ("Test accuracy, %", accuracy_chart(&evals)),
        ("Learning rate", step_chart(&steps, |step| step.lr, true)),
        (
            "Gradient norm before clipping",
            step_chart(
                &steps,
                |step| step.grad_norm.map_or(f64::NAN, f64::from),
                true,
            ),
        ),
        (
            "Images per second",
            step_chart(&steps, |step| step.images_per_s, true),
        ),
        (
            "Auxiliary loss",
            step_chart(&steps, |step| f64::from(step.aux_loss), true),
        ),
    ] {
        push_figure(&mut html, title, &chart);
    }
    html.push_str("</section>");
    html.push_str(&expert_section(&steps, &evals));
    html.push_str(&class_table(&evals));
    html.push_str(&comparison::table(facts.comparison.as_ref()));
    html.push_str("<h2>Run</h2><table class=\"facts\">");
    let memory = memory_lines(facts, &steps);
    for (label, value) in facts.lines.iter().chain(&memory) {
        let _ = write!(
            html,
            "<tr><th>{}</th><td>{}</td></tr>",
            escape(label),
            escape(value)
        );
    }
    html.push_str("</table></main></body></html>\n");
    html
}

/// Predicted and measured peaks.
fn memory_lines(facts: &Facts, steps: &[&StepRecord]) -> Vec<(String, String)> {
    let most = |pick: fn(&MemoryRecord) -> Option<u64>| {
        steps.iter().filter_map(|step| pick(&step.memory)).max()
    };
    [
        ("peak memory of tensors, predicted", facts.predicted_bytes),
        (
            "peak memory of tensors, measured",
            most(|memory| memory.tensor_bytes),
        ),
        (
            "memory taken from the device",
            most(|memory| memory.reserved_bytes),
        ),
        (
            "peak memory of the process",
            most(|memory| memory.host_bytes),
        ),
    ]
    .into_iter()
    .filter_map(|(label, bytes)| Some((label.to_owned(), binary(bytes?))))
    .collect()
}

fn push_figure(html: &mut String, title: &str, chart: &str) {
    let _ = write!(
        html,
        "<figure><figcaption>{}</figcaption>{chart}</figure>",
        escape(title)
    );
}

fn cards(steps: &[&StepRecord], evals: &[&EvalRecord]) -> String {
    let best = evals.iter().map(|e| e.top1).fold(f32::NAN, f32::max);
    let percent = |value: Option<f32>| value.map_or("–".to_owned(), |v| format!("{v:.2} %"));
    let last_step = steps.last();
    let rate = {
        let mut rates: Vec<f64> = steps.iter().map(|s| s.images_per_s).collect();
        rates.sort_by(f64::total_cmp);
        rates.get(rates.len() / 2).map(|&rate| number(rate.round()))
    };
    let cards = [
        ("test top-1", percent(evals.last().map(|e| e.top1))),
        ("best top-1", percent(Some(best).filter(|b| !b.is_nan()))),
        ("test top-5", percent(evals.last().map(|e| e.top5))),
        (
            "epochs",
            evals.last().map_or("–".to_owned(), |e| e.epoch.to_string()),
        ),
        (
            "steps",
            last_step.map_or("–".to_owned(), |s| s.step.to_string()),
        ),
        ("images / s, median", rate.unwrap_or("–".to_owned())),
        ("of the time waiting for images", waiting(steps)),
    ];
    let mut html = String::from("<section class=\"cards\">");
    for (label, value) in cards {
        let _ = write!(html, "<div><b>{value}</b><span>{label}</span></div>");
    }
    html + "</section>"
}

/// Mean share of the time that steps waited for the loader.
fn waiting(steps: &[&StepRecord]) -> String {
    if steps.is_empty() {
        return "–".to_owned();
    }
    let sum: f64 = steps.iter().map(|s| s.loader_wait).sum();
    format!("{:.1} %", 100.0 * sum / steps.len() as f64)
}

fn loss_chart(steps: &[&StepRecord], evals: &[&EvalRecord]) -> String {
    let raw: Vec<(f64, f64)> = steps
        .iter()
        .map(|s| (s.step as f64, f64::from(s.loss)))
        .collect();
    let test = evals
        .iter()
        .map(|e| (e.step as f64, f64::from(e.loss)))
        .collect();
    let series = [
        Series {
            faint: true,
            ..Series::line("training, raw", BLUE, raw.clone())
        },
        Series::line("training, smoothed", BLUE, smooth(&raw)),
        Series {
            dots: true,
            ..Series::line("test, without smoothing of labels", ORANGE, test)
        },
    ];
    line_chart("step", &series, true)
}

/// Exponential moving average over about a thirtieth of the run, unbiased at its start.
fn smooth(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let keep = 1.0 - 1.0 / (1.0 + points.len() as f64 / 30.0);
    let (mut sum, mut weight) = (0.0, 0.0);
    points
        .iter()
        .map(|&(x, y)| {
            sum = sum * keep + y * (1.0 - keep);
            weight = weight * keep + (1.0 - keep);
            (x, sum / weight)
        })
        .collect()
}

fn accuracy_chart(evals: &[&EvalRecord]) -> String {
    let of = |pick: fn(&EvalRecord) -> f32| -> Vec<(f64, f64)> {
        evals
            .iter()
            .map(|e| (e.epoch as f64, f64::from(pick(e))))
            .collect()
    };
    let series = [
        Series {
            dots: true,
            ..Series::line("top-1", BLUE, of(|e| e.top1))
        },
        Series {
            dots: true,
            ..Series::line("top-5", GREEN, of(|e| e.top5))
        },
    ];
    line_chart("epoch", &series, false)
}

fn step_chart(steps: &[&StepRecord], pick: fn(&StepRecord) -> f64, from_zero: bool) -> String {
    let points = steps.iter().map(|s| (s.step as f64, pick(s)));
    let points = points.filter(|(_, value)| value.is_finite()).collect();
    let mut chart = line_chart("step", &[Series::line("", BLUE, points)], from_zero);
    // One line needs no legend.
    if let Some(end) = chart.find("</svg>") {
        chart.truncate(end + "</svg>".len());
    }
    chart
}

/// The classes that the last evaluation found hardest.
fn class_table(evals: &[&EvalRecord]) -> String {
    let Some(eval) = evals.last().filter(|eval| !eval.worst_classes.is_empty()) else {
        return String::new();
    };
    let mut html = format!(
        "<h2>Least accurate classes, epoch {}</h2><div class=\"scroll\"><table><tr><th>class</th>\
         <th>top-1</th><th>images</th><th>mistaken for</th></tr>",
        eval.epoch
    );
    for score in &eval.worst_classes {
        let _ = write!(
            html,
            "<tr><th>{}</th><td>{:.2} %</td><td>{}</td><td>{}</td></tr>",
            escape(&score.class),
            score.top1,
            score.images,
            escape(&score.mistakes())
        );
    }
    html + "</table></div>"
}

#[cfg(test)]
mod tests {
    use hexa_moe::RouterMeans;

    use super::*;
    use crate::train::classes::ClassScore;
    use crate::train::metrics::LayerLoad;

    fn records() -> Vec<Record> {
        let layers = |i: u64| {
            vec![
                LayerLoad {
                    tokens_per_expert: vec![3 + i, 1, 0],
                    entropy: 0.9,
                    tile_waste: 0.125,
                    router: Some(RouterMeans {
                        entropy_nats: 0.75,
                        gate_weight: 0.5,
                        z: i as f64,
                    }),
                };
                2
            ]
        };
        let mut records: Vec<Record> = (1..=40)
            .map(|step| {
                Record::Step(StepRecord {
                    step,
                    epoch: 1,
                    loss: 2.0 / step as f32,
                    ce_loss: 1.9 / step as f32,
                    aux_loss: 0.01,
                    lr: 1e-3,
                    grad_norm: (step != 7).then_some(1.0),
                    loss_scale: None,
                    images_per_s: 321.0,
                    loader_wait: 0.1 + 0.1 * (step % 2) as f64,
                    layers: layers(step),
                    memory: MemoryRecord {
                        host_bytes: Some(step << 20),
                        ..MemoryRecord::default()
                    },
                })
            })
            .collect();
        records.push(Record::Eval(EvalRecord {
            step: 40,
            epoch: 1,
            top1: 87.5,
            top5: 99.0,
            loss: 0.5,
            images: 360,
            train_ce_loss: 0.6,
            train_aux_loss: 0.01,
            layers: layers(0),
            worst_classes: vec![ClassScore {
                class: "six & nine".to_owned(),
                images: 31,
                top1: 61.25,
                mistaken_for: vec![("eight".to_owned(), 7)],
            }],
        }));
        records
    }

    #[test]
    fn page_holds_every_series_and_needs_nothing_from_outside() {
        let facts = Facts {
            name: "digits <1>".to_owned(),
            lines: vec![("back-end".to_owned(), "cpu".to_owned())],
            predicted_bytes: Some(3 << 29),
            comparison: None,
        };
        let page = render(&facts, &records());
        for part in [
            "digits &lt;1&gt;",
            "<figcaption>Loss</figcaption>",
            "Test accuracy",
            "Learning rate",
            "MoE layer 0: share of tokens",
            "MoE layer 1: share of tokens",
            "share of tokens, %",
            "▲ even: 33.3<",
            "Router entropy, nats (undecided: 1.0986)",
            "Mean gate weight",
            "Router z",
            "Tile waste",
            "87.50 %",
            "<b>15.0 %</b><span>of the time waiting for images</span>",
            "<title>expert 2: mean 0.0, 0.0 to 0.0",
            "<td>0.750</td><td>0.500</td><td>0.000</td><td>12.5 %</td>",
            "<th>back-end</th><td>cpu</td>",
            "<th>peak memory of tensors, predicted</th><td>1.50 GiB</td>",
            "<th>peak memory of the process</th><td>40.00 MiB</td>",
            "six &amp; nine</th><td>61.25 %</td><td>31</td><td>eight (7)",
        ] {
            assert!(page.contains(part), "{part} is missing");
        }
        for outside in ["<script", "src=", "href=", "@import", "url("] {
            assert!(!page.contains(outside), "{outside} in the page");
        }
        // A map per layer, and a point for each of the 40 steps in the raw loss.
        assert_eq!(page.matches("crispEdges\"><path").count(), 2);
        let loss = page.split("<polyline points=\"").nth(1).unwrap();
        assert_eq!(loss.split('"').next().unwrap().split(' ').count(), 40);
        assert!(!page.contains("NaN") && !page.contains("inf"));
        assert!(!page.contains("taken from the device"));
    }

    #[test]
    fn page_of_a_run_without_records_is_whole() {
        let page = render(&Facts::default(), &[]);
        assert!(page.contains("nothing recorded yet") && page.ends_with("</html>\n"));
    }
}
