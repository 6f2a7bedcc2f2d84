//! The choice of modes and shares: the fastest that fits.

use super::super::context::Mode;
use super::super::plan::{LayerPlan, ParallelPlan};
use super::cost::{Prediction, check, memory, predict};
use super::error::{FleetError, Result};
use super::file::Fleet;
use super::shape::{LayerShape, Workload};
use super::shares::{AffineTime, balanced_shares, width_multiple};

/// Layers of different kinds choose independently; all choices are compared.
const MAX_KINDS: usize = 12;

/// The plan that is predicted to be fastest of those that fit into every rank's memory, with
/// shares that let ranks finish together. Layers of one shape are run in one mode.
///
/// # Errors
/// [`FleetError::Memory`] if none fits; else as [`predict`].
pub fn choose(fleet: &Fleet, workload: &Workload) -> Result<Prediction> {
    let (kinds, kind_of_layer) = workload.kinds();
    if kinds.len() > MAX_KINDS {
        return Err(FleetError::Kinds {
            got: kinds.len(),
            limit: MAX_KINDS,
        });
    }
    let mut fastest: Option<Prediction> = None;
    let mut least: Option<(u64, FleetError)> = None;
    for choice in 0usize..1 << kinds.len() {
        let mode = |kind: usize| match choice >> kind & 1 {
            0 => Mode::DataCentric,
            _ => Mode::ModelCentric,
        };
        let modes: Vec<Mode> = kind_of_layer.iter().map(|&kind| mode(kind)).collect();
        let plan = balanced_plan(fleet, workload, &modes)?;
        match over_budget(fleet, workload, &plan) {
            Some((excess, error)) => {
                if least.as_ref().is_none_or(|(least, _)| excess < *least) {
                    least = Some((excess, error));
                }
            }
            None => {
                let prediction = predict(fleet, workload, &plan)?;
                let faster = |best: &Prediction| prediction.step_s < best.step_s;
                if fastest.as_ref().is_none_or(faster) {
                    fastest = Some(prediction);
                }
            }
        }
    }
    match (fastest, least) {
        (Some(fastest), _) => Ok(fastest),
        (None, Some((_, error))) => Err(error),
        (None, None) => Err(FleetError::Kinds {
            got: 0,
            limit: MAX_KINDS,
        }),
    }
}

/// Shares for given modes that let ranks finish together, as measured: batches by what is computed
/// on a rank's own samples, slices of model-centric layers by what is computed on everybody's.
///
/// # Errors
/// [`FleetError`] if the fleet was measured on other shapes.
pub fn balanced_plan(fleet: &Fleet, workload: &Workload, modes: &[Mode]) -> Result<ParallelPlan> {
    check(fleet, workload)?;
    let pairs = || workload.layers.iter().zip(modes);
    let mut own = Vec::with_capacity(fleet.world_size());
    for rank in &fleet.ranks {
        let mut time = AffineTime {
            fixed_s: rank.step.fixed_s,
            unit_s: rank.step.sample_s,
        };
        for (shape, _) in pairs().filter(|(_, mode)| **mode == Mode::DataCentric) {
            let cost = rank.ffn(&shape.ffn)?;
            let units = shape.ffn.d_ff as f64;
            time.fixed_s += cost.fixed_s + cost.unit_s * units;
            time.unit_s +=
                shape.tokens_per_sample as f64 * (cost.token_s + cost.token_unit_s * units);
        }
        own.push(time);
    }
    let batch = balanced_shares(workload.batch, &own, 1)?;
    let layers = pairs().map(|(shape, &mode)| {
        Ok(LayerPlan {
            mode,
            widths: match mode {
                Mode::ModelCentric => balanced_widths(fleet, shape, workload.batch)?,
                // Time does not depend on them; memory and updates follow the batches.
                Mode::DataCentric => proportional_widths(shape, &own)?,
            },
        })
    });
    Ok(ParallelPlan {
        layers: layers.collect::<Result<_>>()?,
        batch,
    })
}

fn balanced_widths(fleet: &Fleet, shape: &LayerShape, batch: usize) -> Result<Vec<usize>> {
    let tokens = (batch * shape.tokens_per_sample) as f64;
    let times = fleet.ranks.iter().map(|rank| {
        let cost = rank.ffn(&shape.ffn)?;
        Ok(AffineTime {
            fixed_s: cost.fixed_s + cost.token_s * tokens,
            unit_s: cost.unit_s + cost.token_unit_s * tokens,
        })
    });
    let times: Vec<AffineTime> = times.collect::<Result<_>>()?;
    let multiple = width_multiple(shape.ffn.d_ff, fleet.world_size());
    balanced_shares(shape.ffn.d_ff, &times, multiple)
}

fn proportional_widths(shape: &LayerShape, own: &[AffineTime]) -> Result<Vec<usize>> {
    let speeds: Vec<AffineTime> = own
        .iter()
        .map(|time| AffineTime {
            fixed_s: 0.0,
            unit_s: time.unit_s,
        })
        .collect();
    balanced_shares(
        shape.ffn.d_ff,
        &speeds,
        width_multiple(shape.ffn.d_ff, own.len()),
    )
}

/// The rank that lacks most memory for `plan`, and by how much.
fn over_budget(
    fleet: &Fleet,
    workload: &Workload,
    plan: &ParallelPlan,
) -> Option<(u64, FleetError)> {
    let lacks = fleet
        .ranks
        .iter()
        .enumerate()
        .filter_map(|(rank, profile)| {
            let available = profile.memory_bytes?;
            let needed = memory(fleet, workload, plan, rank).total();
            (needed > available).then(|| {
                let error = FleetError::Memory {
                    rank: profile.name.clone(),
                    needed,
                    available,
                };
                (needed - available, error)
            })
        });
    lacks.max_by_key(|(excess, _)| *excess)
}
