//! Calibrated shares against uniform ones, and against the ideal.

use anyhow::Result;
use hexa_moe::parallel::fleet::{Fleet, balanced_plan, width_multiple};
use hexa_moe::parallel::{Mode, ParallelPlan};
use serde::Serialize;

use crate::Arguments;
use crate::net::NetShape;
use crate::ranks::{Rank, Steps, Timed};

/// One mode of one shape.
#[derive(Debug, Serialize)]
pub struct Row {
    pub shape: NetShape,
    pub mode: Mode,
    pub tokens: usize,
    /// Equal shares.
    pub uniform: Timed,
    /// Shares by calibration.
    pub calibrated: Timed,
    /// The calibrated plan.
    pub plan: ParallelPlan,
    /// Step time if computation were balanced perfectly at the speeds that the uniform run
    /// showed, and all else stayed as it is there.
    pub ideal_s: f64,
    /// What part of the ideal gain calibrated shares reach.
    pub gain_reached: f64,
    /// Steps with other shares of the first rank, for the curve.
    pub sweep: Vec<(f64, f64)>,
}

/// Turns in which uniform and calibrated steps are timed, so that a machine that becomes slower or
/// faster does so for both.
const TURNS: u32 = 3;

/// First ranks' shares of the curve.
const SWEEP: [f64; 5] = [0.4, 0.6, 0.7, 0.8, 0.9];

pub fn measure(
    rank: &Rank,
    shape: NetShape,
    fleet: &Fleet,
    arguments: &Arguments,
) -> Result<Vec<Row>> {
    let workload = shape.workload(arguments.tokens)?;
    let ranks = rank.context.world_size();
    let d_ff = vec![shape.d_ff; shape.layers];
    let multiple = width_multiple(shape.d_ff, ranks);
    let in_proportion = |mode, shares: &[f64]| {
        ParallelPlan::in_proportion(mode, &d_ff, workload.batch, shares, multiple)
    };
    let mut rows = Vec::new();
    for mode in [Mode::DataCentric, Mode::ModelCentric] {
        let time = |plan: &ParallelPlan| rank.time(shape, plan, true, arguments.steps);
        let plan = balanced_plan(fleet, &workload, &vec![mode; shape.layers])?;
        let plans = [in_proportion(mode, &vec![1.0; ranks])?, plan];
        let mut steps = [Steps::default(), Steps::default()];
        for _ in 0..TURNS {
            for (steps, plan) in steps.iter_mut().zip(&plans) {
                let count = arguments.steps.div_ceil(TURNS);
                steps.add(rank.steps(shape, plan, true, count)?);
            }
        }
        let [uniform, calibrated] = steps.map(|steps| steps.timed());
        let [_, plan] = plans;
        let mut sweep = Vec::new();
        if ranks == 2 {
            for share in SWEEP {
                let plan = in_proportion(mode, &[share, 1.0 - share])?;
                sweep.push((share, time(&plan)?.step_s));
            }
        }
        // At equal shares, a rank's speed is one over its time.
        let slowest = uniform.busy_s.iter().copied().fold(0.0, f64::max);
        let speeds: f64 = uniform
            .busy_s
            .iter()
            .map(|busy| 1.0 / (ranks as f64 * busy))
            .sum();
        let ideal_s = uniform.step_s - (slowest - 1.0 / speeds);
        rows.push(Row {
            shape,
            mode,
            tokens: arguments.tokens,
            gain_reached: (uniform.step_s - calibrated.step_s) / (uniform.step_s - ideal_s),
            ideal_s,
            uniform,
            calibrated,
            plan,
            sweep,
        });
    }
    Ok(rows)
}
