//! The page's part about experts: who worked, and what the router said.

use std::fmt::Write;

use super::heat::{Grid, Labels, heat_map};
use super::push_figure;
use super::svg::{Series, line_chart, number, palette};
use crate::train::metrics::{EvalRecord, LayerLoad, StepRecord};

/// Each expert's share over time, one map for each MoE layer; curves of all layers; the last shares
/// on the test set.
pub(super) fn expert_section(steps: &[&StepRecord], evals: &[&EvalRecord]) -> String {
    let num_layers = steps.iter().map(|s| s.layers.len()).max().unwrap_or(0);
    if num_layers == 0 {
        return String::new();
    }
    let mut html = String::from("<h2>Experts</h2><section class=\"charts\">");
    for layer in 0..num_layers {
        push_figure(
            &mut html,
            &format!("MoE layer {layer}: share of tokens, expert by step"),
            &share_map(steps, layer),
        );
    }
    html.push_str("</section><h2>Routers</h2><section class=\"charts\">");
    for (title, pick) in CURVES {
        let series: Vec<Series> = (0..num_layers)
            .map(|layer| curve(steps, layer, num_layers, pick))
            .collect();
        push_figure(&mut html, &title(steps), &line_chart("step", &series, true));
    }
    html.push_str("</section>");
    if let Some(eval) = evals.last() {
        html.push_str(&load_table(eval));
    }
    html
}

fn share_map(steps: &[&StepRecord], layer: usize) -> String {
    let records: Vec<(u64, Vec<f64>)> = steps
        .iter()
        .filter_map(|step| {
            let counts = &step.layers.get(layer)?.tokens_per_expert;
            let counts = counts.iter().map(|&count| count as f64).collect();
            Some((step.step, counts))
        })
        .collect();
    let num_experts = records.iter().map(|(_, counts)| counts.len()).max();
    let even = 100.0 / num_experts.unwrap_or(1).max(1) as f64;
    heat_map(
        &Grid::of_sums(&records).into_percent(),
        &Labels {
            x: "step",
            y: "expert",
            value: "share of tokens, %",
            mark: Some((even, "even")),
        },
    )
}

type Title = fn(&[&StepRecord]) -> String;
type Pick = fn(&LayerLoad) -> Option<f64>;

/// What is drawn of each layer over time.
const CURVES: [(Title, Pick); 5] = [
    (
        |steps| {
            let layers = steps.iter().flat_map(|step| &step.layers);
            let experts = layers.map(|layer| layer.tokens_per_expert.len()).max();
            let most = (experts.unwrap_or(1).max(1) as f64).ln();
            format!("Router entropy, nats (undecided: {})", number(most))
        },
        |layer| Some(layer.router?.entropy_nats),
    ),
    (
        |_| "Mean gate weight of a choice".to_owned(),
        |layer| Some(layer.router?.gate_weight),
    ),
    (
        |_| "Router z: mean of (log Σ exp logits)²".to_owned(),
        |layer| Some(layer.router?.z),
    ),
    (
        |_| "Entropy of the load, 1 is even".to_owned(),
        |layer| Some(layer.entropy),
    ),
    (
        |_| "Tile waste, % of the slots".to_owned(),
        |layer| Some(100.0 * layer.tile_waste),
    ),
];

fn curve(steps: &[&StepRecord], layer: usize, num_layers: usize, pick: Pick) -> Series {
    let points = steps
        .iter()
        .filter_map(|step| Some((step.step as f64, pick(step.layers.get(layer)?)?)))
        .collect();
    Series::line(
        &format!("layer {layer}"),
        &palette(layer, num_layers),
        points,
    )
}

fn load_table(eval: &EvalRecord) -> String {
    let num_experts = eval
        .layers
        .iter()
        .map(|l| l.tokens_per_expert.len())
        .max()
        .unwrap_or(0);
    let mut html = format!(
        "<h2>Share of tokens on the test set, epoch {}</h2><div class=\"scroll\"><table><tr><th>MoE layer</th>",
        eval.epoch
    );
    for expert in 0..num_experts {
        let _ = write!(html, "<th>expert {expert}</th>");
    }
    html.push_str(
        "<th>load entropy</th><th>router entropy, nats</th><th>gate weight</th><th>router z</th>\
         <th>tile waste</th></tr>",
    );
    for (index, layer) in eval.layers.iter().enumerate() {
        let _ = write!(html, "<tr><th>{index}</th>");
        for share in layer.shares() {
            // The darker the cell, the more tokens; an even share is a third of the scale.
            let tint = (share * num_experts as f64 / 3.0).min(1.0) * 60.0;
            let _ = write!(
                html,
                "<td style=\"background:hsl(215 80% 55% / {tint:.0}%)\">{:.1} %</td>",
                100.0 * share
            );
        }
        let _ = write!(html, "<td>{:.3}</td>", layer.entropy);
        let router = layer.router.map(|r| [r.entropy_nats, r.gate_weight, r.z]);
        for place in 0..3 {
            let value = router.map_or("–".to_owned(), |means| format!("{:.3}", means[place]));
            let _ = write!(html, "<td>{value}</td>");
        }
        let _ = write!(html, "<td>{:.1} %</td></tr>", 100.0 * layer.tile_waste);
    }
    html + "</table></div>"
}
