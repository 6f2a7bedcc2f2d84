//! What an early gather hides.

use anyhow::Result;
use hexa_moe::parallel::Mode;
use hexa_moe::parallel::fleet::{Fleet, balanced_plan};
use serde::Serialize;

use crate::Arguments;
use crate::net::NetShape;
use crate::ranks::{Rank, Timed};

/// Data-centric steps of one shape at one batch size.
#[derive(Debug, Serialize)]
pub struct Row {
    pub shape: NetShape,
    pub tokens: usize,
    /// Gathers start in front of the block before the layer.
    pub early: Timed,
    /// Gathers start when the layer needs them.
    pub late: Timed,
    /// Share of the wait for gathered weights in the forward pass that the early start hides, of
    /// all ranks together.
    pub hidden: f64,
}

pub fn measure(rank: &Rank, shape: NetShape, fleet: &Fleet, arguments: &Arguments) -> Result<Row> {
    let workload = shape.workload(arguments.tokens)?;
    let plan = balanced_plan(fleet, &workload, &vec![Mode::DataCentric; shape.layers])?;
    // As both fluctuate, more steps than elsewhere.
    let steps = 2 * arguments.steps;
    let late = rank.time(shape, &plan, false, steps)?;
    let early = rank.time(shape, &plan, true, steps)?;
    let wait = |timed: &Timed| timed.gather_s.iter().sum::<f64>();
    Ok(Row {
        shape,
        tokens: arguments.tokens,
        hidden: 1.0 - wait(&early) / wait(&late),
        early,
        late,
    })
}
