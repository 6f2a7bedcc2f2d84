//! `calibrate` and `plan`.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use hexa_moe::parallel::Mode;
use hexa_moe::parallel::fleet::{Fleet, FleetError, PlanTable, Prediction};

use super::Done;
use super::arguments;
use super::commands::count_classes;
use crate::backend::BackendKind;
use crate::config::{Config, Engine};
use crate::fleet::{self, CalibrateRequest, FleetJobError};
use crate::model::SwinMoeConfig;
use crate::settings::model_config;
use crate::train::{CalibrateProcessRequest, DeviceFaults, ParallelOverrides, calibrate_process};

pub(super) fn calibrate(arguments: arguments::Calibrate, faults: DeviceFaults) -> Result<Done> {
    let (config, model) = configured(arguments.config.as_deref(), &arguments.set)?;
    ensure!(
        arguments.seconds > 0.0 && arguments.seconds <= 3600.0,
        "--seconds is {}, allowed is a number above 0 and up to 3600; give 0.2, say",
        arguments.seconds
    );
    let memory_bytes = match arguments.memory_gib {
        Some(gib) => {
            ensure!(
                gib.is_finite() && gib > 0.0,
                "--memory-gib is {gib}, allowed is a number above 0"
            );
            Some((gib * f64::from(1 << 30)) as u64)
        }
        None => None,
    };
    let batch = config.train.batch_size;
    let measured = match arguments.engine {
        Engine::Local => {
            let request = CalibrateRequest {
                model,
                batch,
                backends: backends(arguments.ranks, arguments.backend)?,
                memory_bytes,
                seconds: arguments.seconds,
            };
            let fleet = fleet::calibrate(&request)?;
            faults.check("while ranks were measured")?;
            Some(fleet)
        }
        Engine::Mpi => {
            let [backend] = arguments.backend[..] else {
                bail!(
                    "--backend names {} back-ends, allowed is one with --engine mpi: that of the \
                     process; for others, give mpirun several programs, parted by a colon",
                    arguments.backend.len()
                );
            };
            let job = ParallelOverrides {
                engine: Some(Engine::Mpi),
                ranks: arguments.ranks,
                ..ParallelOverrides::default()
            };
            calibrate_process(CalibrateProcessRequest {
                model,
                batch,
                backend,
                parallel: job.apply(&config)?.parallel,
                memory_bytes,
                seconds: arguments.seconds,
                faults,
            })?
        }
    };
    // Rank 0 speaks for the job.
    let Some(fleet) = measured else {
        return Ok(Done::Success);
    };
    fleet.save(&arguments.output)?;
    for rank in &fleet.ranks {
        println!("{} ({}):", rank.name, rank.backend);
        for cost in &rank.ffn {
            println!("  {}: {:.1} GFLOP/s", cost.shape, 1e-9 * cost.flops_per_s());
        }
        println!("  all else: {:.3} ms/image", 1e3 * rank.step.sample_s);
    }
    println!(
        "wrote {}; see what it means for a run with: swin-moe plan --fleet {0}",
        arguments.output.display()
    );
    Ok(Done::Success)
}

/// One back-end for each rank: one for all, or as many as ranks.
fn backends(ranks: Option<usize>, given: Vec<BackendKind>) -> Result<Vec<BackendKind>> {
    let ranks = ranks.unwrap_or(given.len());
    ensure!(
        (1..=1024).contains(&ranks),
        "--ranks is {ranks}, allowed is 1..=1024"
    );
    match given.as_slice() {
        [one] => Ok(vec![*one; ranks]),
        several => {
            ensure!(
                several.len() == ranks,
                "--backend names {} back-ends for {ranks} ranks; name one, or one for each rank",
                several.len()
            );
            Ok(given)
        }
    }
}

pub(super) fn plan(arguments: arguments::Plan) -> Result<Done> {
    let (config, model) = configured(arguments.config.as_deref(), &arguments.set)?;
    let fleet = Fleet::load(&arguments.fleet)?;
    let batch = config.train.batch_size;
    let of_mode = |mode| -> Result<(Mode, Option<Prediction>)> {
        match fleet::plan(&model, batch, &fleet, Some(mode)) {
            Ok(prediction) => Ok((mode, fits(&fleet, &prediction).then_some(prediction))),
            Err(error) => Err(error.into()),
        }
    };
    let alternatives = [of_mode(Mode::DataCentric)?, of_mode(Mode::ModelCentric)?];
    let chosen = fleet::plan(&model, batch, &fleet, None);
    let chosen = match chosen {
        Err(FleetJobError::Fleet(error @ FleetError::Memory { .. })) => {
            return Err(error).context("no plan");
        }
        other => other?,
    };
    println!("batch of {batch}, {} ranks", fleet.world_size());
    print!(
        "{}",
        PlanTable {
            fleet: &fleet,
            chosen: &chosen,
            alternatives: &alternatives,
        }
    );
    Ok(Done::Success)
}

/// Whether all ranks have the memory.
fn fits(fleet: &Fleet, prediction: &Prediction) -> bool {
    let ranks = fleet.ranks.iter().zip(&prediction.ranks);
    ranks.into_iter().all(|(profile, rank)| {
        profile
            .memory_bytes
            .is_none_or(|available| rank.memory.total() <= available)
    })
}

/// The settings and the model that they describe.
fn configured(config: Option<&Path>, set: &[String]) -> Result<(Config, SwinMoeConfig)> {
    let config = Config::load(config, set)?;
    let model = model_of(&config)?;
    Ok((config, model))
}

fn model_of(config: &Config) -> Result<SwinMoeConfig> {
    let num_classes = match config.model.num_classes {
        Some(num_classes) => num_classes,
        None => count_classes(config)?,
    };
    Ok(model_config(config, num_classes)?)
}
