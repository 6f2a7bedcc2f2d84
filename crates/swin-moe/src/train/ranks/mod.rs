//! Training and evaluation over several ranks.
//!
//! Every rank runs the same [`Session`](super::session::Session) on its contiguous part of each
//! batch and on its slices of the experts. What it must do together with the others is here; a run
//! alone does none of it.

mod exchange;
mod launch;
mod plan;
mod planning;
mod rebalance;
mod save;
mod slices;
mod watch;

use std::cell::Cell;
use std::path::{Path, PathBuf};

use hexa_moe::parallel::comm::{Collective, Payload};
use hexa_moe::parallel::fleet::predict;
use hexa_moe::parallel::{
    BatchShare, ParallelContext, ParallelPlan, broadcast_parameters, parallelize,
};
use hexa_ops::{ExpertOps, TrainingBackend};

use self::planning::Measured;
use self::rebalance::Rebalance;
use self::watch::Watch;
use super::error::{Result, TrainError};
use super::optimizer::{AdamW, AdamWConfig};
use super::params::HostTensors;
use super::report::{Compared, ComparedRank, Comparison};
use crate::config::{self, Config};
use crate::data::{Batch, BatchPart};
use crate::fleet::workload;
use crate::info::ModelInfo;
use crate::model::SwinMoe;

pub(super) use exchange::Reduced;
pub(super) use launch::{RankJob, Seat, launch};
pub(super) use planning::{PlanFor, Planned};
pub(super) use save::Snapshot;
pub(super) use slices::{Cut, Cuts};

/// This rank's ties to the others; none for a run alone.
#[derive(Debug, Default)]
pub(super) struct Ranks(Option<Member>);

#[derive(Debug)]
struct Member {
    seat: Seat,
    context: ParallelContext,
    plan: ParallelPlan,
    /// Whether the plan is another one than settings say.
    is_chosen: bool,
    cuts: Cuts,
    watch: Watch,
    measured: Option<Measured>,
    rebalance: Option<Rebalance>,
    /// Whether steps have several parts, whose sizes ranks tell each other.
    parts_differ: bool,
    /// Whether any rank was asked to stop before the latest step.
    stop: Cell<bool>,
}

impl Ranks {
    /// A run on one device.
    pub(super) fn alone() -> Self {
        Ranks(None)
    }

    /// Takes the seat: gives all ranks rank 0's parameters, and keeps of the experts this rank's
    /// slices.
    pub(super) fn join<B: ExpertOps>(
        seat: &Seat,
        config: &Config,
        planned: Planned,
        model: SwinMoe<B>,
    ) -> Result<(Self, SwinMoe<B>)> {
        let Some(context) = &seat.context else {
            return Ok((Ranks(None), model));
        };
        if config.train.activation_checkpointing && context.world_size() > 1 {
            return Err(TrainError::Request(format!(
                "train.activation_checkpointing is true and there are {} ranks; it is for one rank: \
                 set it to false, or raise train.accumulation_steps to save memory",
                context.world_size()
            )));
        }
        let (settings, batch_size) = (&config.parallel, config.train.batch_size);
        let d_ff: Vec<usize> = model
            .moe_layers()
            .map(|moe| moe.experts.w2.dims()[1])
            .collect();
        let is_chosen = planned.plan.is_some();
        let plan = match planned.plan {
            Some(plan) => plan,
            None => plan::from_settings(settings, context.world_size(), &d_ff, batch_size)?,
        };
        plan.validate(context.world_size(), &d_ff, batch_size)?;
        let workload = workload(model.config(), batch_size)?;
        let rebalance = match settings.rebalance {
            config::Rebalance::Off => None,
            config::Rebalance::Auto => {
                let flops = ModelInfo::new(model.config(), 1)?.forward_flops();
                let threshold = settings.rebalance_threshold;
                Some(Rebalance::new(threshold, &workload, flops, &plan)?)
            }
        };
        let measured = planned
            .fleet
            .and_then(|fleet| Measured::new(fleet, workload, &plan));
        let model = broadcast_parameters::<B, _>(context, model)?;
        let cuts = Cuts::of(&model, &plan);
        let model = model.map_moe(|number, moe| {
            let layer = &plan.layers[number];
            parallelize(moe, context, number, layer.mode, layer.widths.clone())
        })?;
        let member = Member {
            seat: seat.clone(),
            context: context.clone(),
            plan,
            is_chosen,
            cuts,
            watch: Watch::new(seat),
            measured,
            rebalance,
            parts_differ: config.train.accumulation_steps > 1,
            stop: Cell::new(false),
        };
        Ok((Ranks(Some(member)), model))
    }

    /// Whether this rank speaks for the run: writes its files and shows its progress.
    pub(super) fn is_lead(&self) -> bool {
        self.0.as_ref().is_none_or(|m| m.context.rank() == 0)
    }

    /// This rank and the number of ranks.
    pub(super) fn place(&self) -> (usize, usize) {
        match &self.0 {
            Some(member) => (member.context.rank(), member.context.world_size()),
            None => (0, 1),
        }
    }

    /// This rank and its shares, in words; none for a run alone.
    pub(super) fn describe(&self) -> Option<String> {
        let Member {
            context,
            plan,
            measured,
            ..
        } = self.0.as_ref()?;
        let rank = context.rank();
        let widths: Vec<String> = plan
            .layers
            .iter()
            .map(|layer| {
                let d_ff: usize = layer.widths.iter().sum();
                format!("{} of {d_ff} ({:?})", layer.widths[rank], layer.mode)
            })
            .collect();
        let mut text = format!(
            "rank {rank} of {}: {} of {} images of a batch; hidden units by layer: {}",
            context.world_size(),
            plan.batch[rank],
            plan.batch.iter().sum::<usize>(),
            widths.join(", ")
        );
        if let Some(step_s) = measured.as_ref().and_then(|m| m.step_s(plan)) {
            text += &format!("; predicted {:.2} ms/step", 1e3 * step_s);
        }
        Some(text)
    }

    /// Which part of each batch is this rank's.
    pub(super) fn batch_part(&self) -> Option<BatchPart> {
        self.0.as_ref().map(|member| BatchPart {
            weights: member
                .plan
                .batch
                .iter()
                .map(|&images| images as f64)
                .collect(),
            rank: member.context.rank(),
        })
    }

    /// An optimizer for this rank's parameters.
    pub(super) fn optimizer<B: TrainingBackend>(
        &self,
        config: AdamWConfig,
        model: &SwinMoe<B>,
    ) -> AdamW<B> {
        match &self.0 {
            Some(member) => AdamW::of_slices(config, model, &|name| member.cuts.contains(name)),
            None => AdamW::new(config, model),
        }
    }

    /// This rank's part of an optimizer's whole state.
    pub(super) fn own_state(&self, whole: HostTensors) -> HostTensors {
        match &self.0 {
            Some(member) => member.cuts.slice_state(member.context.rank(), whole),
            None => whole,
        }
    }

    /// Begins a step together: this rank's share of its images, and whether all are to stop
    /// behind it.
    pub(super) fn begin_step(&mut self, local: usize, stop: bool) -> Result<BatchShare> {
        let Some(member) = &mut self.0 else {
            return Ok(BatchShare {
                local,
                global: local,
            });
        };
        member.watch.begin();
        let own = vec![u32::try_from(local).unwrap_or(u32::MAX), u32::from(stop)];
        let comm = member.context.comm();
        let all = comm
            .all_gather_u32("images and wish to stop", own)
            .map_err(hexa_moe::MoeError::from)?;
        member
            .stop
            .set(all.chunks_exact(2).any(|rank| rank[1] == 1));
        Ok(BatchShare {
            local,
            global: all.chunks_exact(2).map(|rank| rank[0] as usize).sum(),
        })
    }

    /// Ends a step together. If batches are split anew from now on, gives what to say about it.
    pub(super) fn finish_step(&mut self) -> Result<Option<String>> {
        let Some(member) = &mut self.0 else {
            return Ok(None);
        };
        let rank = member.context.rank();
        let busy_s = member.watch.end(rank, member.plan.batch[rank]);
        let Some(rebalance) = &mut member.rebalance else {
            return Ok(None);
        };
        let resplit = rebalance.observe(member.context.comm(), busy_s, &member.plan)?;
        Ok(resplit.map(|resplit| {
            member.plan.batch = resplit.batch;
            member.is_chosen = true;
            member.watch.forget();
            resplit.reason
        }))
    }

    /// The plan of slices that were decided upon since the last checkpoint, and the seat to take
    /// with it.
    pub(super) fn pending(&self) -> Option<(Seat, Planned)> {
        let member = self.0.as_ref()?;
        let plan = member.rebalance.as_ref()?.pending()?;
        let planned = Planned {
            plan: Some(plan.clone()),
            fleet: member.measured.as_ref().map(|m| m.fleet.clone()),
        };
        Some((member.seat.clone(), planned))
    }

    /// The plan to go on with, if it is another one than settings say.
    pub(super) fn chosen_plan(&self) -> Option<ParallelPlan> {
        let member = self.0.as_ref().filter(|member| member.is_chosen)?;
        let pending = member.rebalance.as_ref().and_then(Rebalance::pending);
        Some(pending.unwrap_or(&member.plan).clone())
    }

    /// What the plan was predicted to take beside what its steps took, on all ranks; none without
    /// a measured fleet. All ranks call it together.
    pub(super) fn comparison(&self) -> Result<Option<Comparison>> {
        let Some(member) = &self.0 else {
            return Ok(None);
        };
        let Some(Measured { fleet, workload }) = &member.measured else {
            return Ok(None);
        };
        let (steps, own) = member.watch.medians();
        let own = vec![own.step_s as f32, own.busy_s as f32, own.layer_bytes as f32];
        let counts = vec![own.len(); fleet.world_size()];
        let comm = member.context.comm();
        let all = comm.all_gather_v("measured steps", own, &counts);
        let all = all.map_err(hexa_moe::MoeError::from)?;
        let column = |at: usize| all.chunks_exact(3).map(move |rank| f64::from(rank[at]));
        let prediction =
            predict(fleet, workload, &member.plan).map_err(crate::fleet::FleetJobError::from)?;
        // All ranks have done the same steps.
        let compared = |predicted: f64, measured: f64| Compared {
            predicted,
            measured: (steps > 0).then_some(measured),
        };
        let predicted_bytes: u64 = prediction.layers.iter().map(|l| l.bytes_moved).sum();
        let ranks = fleet.ranks.iter().zip(&member.plan.batch);
        let busy = prediction.ranks.iter().zip(column(1));
        let ranks = ranks
            .zip(busy)
            .map(|((profile, &images), (rank, busy_s))| ComparedRank {
                name: profile.name.clone(),
                backend: profile.backend.clone(),
                images,
                busy_s: compared(rank.busy_s, busy_s),
            });
        Ok(Some(Comparison {
            steps,
            step_s: compared(prediction.step_s, column(0).fold(0.0, f64::max)),
            layer_bytes: compared(predicted_bytes as f64, column(2).sum()),
            ranks: ranks.collect(),
        }))
    }

    /// The parts of a step's batch, as many on all ranks; parts may be empty on some.
    pub(super) fn parts(&self, batch: Batch, parts: usize) -> Vec<Batch> {
        let [_, channels, height, width] = batch.shape;
        let position = batch.position;
        let mut cut = batch.into_parts(parts);
        if self.0.is_some() {
            cut.resize_with(parts, || Batch {
                images: Vec::new(),
                labels: Vec::new(),
                partners: None,
                share: 1.0,
                indices: Vec::new(),
                shape: [0, channels, height, width],
                position,
            });
        }
        cut
    }

    /// This rank's share of a part of a step of `images` images.
    pub(super) fn share(&self, local: usize, images: usize) -> Result<BatchShare> {
        match &self.0 {
            Some(member) if member.parts_differ => {
                Ok(BatchShare::exchange(&member.context, local)?)
            }
            Some(_) => Ok(BatchShare {
                local,
                global: images,
            }),
            None => Ok(BatchShare {
                local,
                global: local,
            }),
        }
    }

    /// Whether the run is to stop: `own` alone, what was agreed upon in the latest step otherwise.
    pub(super) fn is_to_stop(&self, own: bool) -> bool {
        match &self.0 {
            Some(member) => member.stop.get(),
            None => own,
        }
    }

    /// Nobody goes on before all have come.
    pub(super) fn barrier(&self, what: &str) -> Result<()> {
        if let Some(member) = &self.0 {
            let comm = member.context.comm();
            comm.barrier(what).map_err(hexa_moe::MoeError::from)?;
        }
        Ok(())
    }

    /// The lead's path, on all ranks.
    pub(super) fn agree_on(&self, path: &Path) -> Result<PathBuf> {
        let Some(member) = &self.0 else {
            return Ok(path.to_path_buf());
        };
        let comm = member.context.comm();
        let send = |name: &str, own: Vec<u32>, len: usize| {
            let data = Payload::U32(if comm.rank() == 0 { own } else { Vec::new() });
            let pending = comm.start(name, Collective::Broadcast { data, root: 0, len });
            pending
                .wait()
                .map(Payload::into_u32)
                .map_err(hexa_moe::MoeError::from)
        };
        let text: Vec<u32> = path.to_string_lossy().chars().map(u32::from).collect();
        let length = send("length of the output's name", vec![text.len() as u32], 1)?;
        let length = length.first().map_or(0, |&length| length as usize);
        let text = send("the output's name", text, length)?;
        Ok(text
            .into_iter()
            .filter_map(char::from_u32)
            .collect::<String>()
            .into())
    }
}
