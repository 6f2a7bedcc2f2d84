//! Both modes over batch sizes, predicted and measured.

use anyhow::Result;
use hexa_moe::parallel::Mode;
use hexa_moe::parallel::fleet::{Fleet, balanced_plan, choose, predict};
use serde::Serialize;

use crate::Arguments;
use crate::net::NetShape;
use crate::ranks::Rank;

/// One batch size of one shape.
#[derive(Debug, Serialize)]
pub struct Row {
    pub shape: NetShape,
    pub tokens: usize,
    /// Data-centric and model-centric, in this order, each with its own balanced shares.
    pub measured_s: [f64; 2],
    pub predicted_s: [f64; 2],
    /// What the planner chooses.
    pub chosen: Mode,
    /// Whether that was measured to be the faster mode.
    pub right: bool,
}

const MODES: [Mode; 2] = [Mode::DataCentric, Mode::ModelCentric];

pub fn measure(
    rank: &Rank,
    shape: NetShape,
    fleet: &Fleet,
    arguments: &Arguments,
) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for &tokens in &arguments.batches {
        let workload = shape.workload(tokens)?;
        let mut measured_s = [0.0; 2];
        let mut predicted_s = [0.0; 2];
        for (i, mode) in MODES.into_iter().enumerate() {
            let plan = balanced_plan(fleet, &workload, &vec![mode; shape.layers])?;
            predicted_s[i] = predict(fleet, &workload, &plan)?.step_s;
            measured_s[i] = rank.time(shape, &plan, true, arguments.steps)?.step_s;
        }
        let chosen = choose(fleet, &workload)?.plan.layers[0].mode;
        let faster = if measured_s[0] <= measured_s[1] {
            Mode::DataCentric
        } else {
            Mode::ModelCentric
        };
        rows.push(Row {
            shape,
            tokens,
            measured_s,
            predicted_s,
            chosen,
            right: chosen == faster,
        });
    }
    Ok(rows)
}
