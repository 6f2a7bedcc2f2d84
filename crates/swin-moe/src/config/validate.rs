//! Raw settings to checked ones.

mod model;
mod moe;
mod train;

use std::fmt::Display;
use std::ops::RangeInclusive;
use std::path::PathBuf;

use self::moe::check_parameters;
use super::error::ConfigError;
use super::raw::{RawCheckpoint, RawConfig, RawData, RawParallel};
use super::types::{
    CheckpointConfig, Config, DataConfig, DataSource, Engine, Mode, ParallelConfig,
};

pub(super) type Result<T> = std::result::Result<T, ConfigError>;

/// Beyond this, announcements between all pairs of ranks cost more than the work.
const MAX_RANKS: usize = 1024;

impl RawConfig {
    /// Checks every value, alone and against the others.
    ///
    /// # Errors
    /// [`ConfigError::Value`] for the first value out of its range.
    pub fn validate(&self) -> Result<Config> {
        let model = self.model.validate()?;
        let moe = self.moe.validate(&model)?;
        check_parameters(&model, &moe)?;
        let train = self.train.validate(&model)?;
        Ok(Config {
            init: self.init.validate()?,
            augment: self.augment.validate(&model)?,
            data: self.data.validate()?,
            checkpoint: self.checkpoint.validate()?,
            parallel: self.parallel.validate()?,
            model,
            moe,
            train,
        })
    }
}

pub(super) fn within<T: PartialOrd + Display + Copy>(
    key: &str,
    value: T,
    range: RangeInclusive<T>,
    remedy: &str,
) -> Result<T> {
    // `contains` is false for NaN, and the ranges' ends are finite.
    if range.contains(&value) {
        return Ok(value);
    }
    let allowed = format!("{}..={}", range.start(), range.end());
    Err(ConfigError::value(key, value, allowed, remedy))
}

pub(super) fn probability(key: &str, value: f64, remedy: &str) -> Result<f64> {
    if (0.0..1.0).contains(&value) {
        return Ok(value);
    }
    Err(ConfigError::value(key, value, "0 <= value < 1", remedy))
}

fn positive(key: &str, value: f64, max: f64, remedy: &str) -> Result<f64> {
    if value > 0.0 && value <= max {
        return Ok(value);
    }
    let allowed = format!("0 < value <= {max}");
    Err(ConfigError::value(key, value, allowed, remedy))
}

fn one_per_stage(key: &str, len: usize, stages: usize) -> Result<()> {
    if len == stages {
        return Ok(());
    }
    Err(ConfigError::value(
        key,
        format!("{len} entries long"),
        format!("{stages}, one for each entry of model.depths"),
        "make the lists equally long",
    ))
}

/// 0 in a file stands for "none".
fn non_zero(value: usize) -> Option<usize> {
    (value > 0).then_some(value)
}

impl RawData {
    fn validate(&self) -> Result<DataConfig> {
        let workers = "give a number of threads, or 0 for one for each core";
        within("data.workers", self.workers, 0..=1024, workers)?;
        let bytes = "TOML's integers have 63 bits";
        within(
            "data.cache_bytes",
            self.cache_bytes,
            0..=i64::MAX as u64,
            bytes,
        )?;
        let corrupt = "give the number of unreadable images to put up with";
        within("data.max_corrupt", self.max_corrupt, 0..=1 << 30, corrupt)?;
        Ok(DataConfig {
            source: if self.dir.is_empty() {
                DataSource::Digits
            } else {
                DataSource::Folder(PathBuf::from(&self.dir))
            },
            workers: non_zero(self.workers),
            max_corrupt: self.max_corrupt,
            cache_bytes: self.cache_bytes,
        })
    }
}

impl RawCheckpoint {
    fn validate(&self) -> Result<CheckpointConfig> {
        let every = "give a number of steps, or 0 to save at the end of each epoch only";
        within(
            "checkpoint.every_steps",
            self.every_steps,
            0..=1_000_000_000,
            every,
        )?;
        let keep = "resuming needs the last checkpoint";
        within("checkpoint.keep_last", self.keep_last, 1..=1_000_000, keep)?;
        Ok(CheckpointConfig {
            every_steps: non_zero(self.every_steps),
            keep_last: self.keep_last,
        })
    }
}

impl RawParallel {
    fn validate(&self) -> Result<ParallelConfig> {
        let ranks = "give the number of devices, or of threads that share a processor";
        within("parallel.ranks", self.ranks, 1..=MAX_RANKS, ranks)?;
        let key = "parallel.split";
        let started_by_mpi = self.engine == Engine::Mpi && self.ranks == 1;
        if !self.split.is_empty() && !started_by_mpi && self.split.len() != self.ranks {
            return Err(ConfigError::value(
                key,
                format!("{} numbers long", self.split.len()),
                format!("{}, one for each of parallel.ranks", self.ranks),
                "give one weight for each rank, or none for equal shares",
            ));
        }
        for (rank, &weight) in self.split.iter().enumerate() {
            let key = format!("{key}[{rank}]");
            within(&key, weight, 0.0..=1e6, "5, 2 and 1, say; 0 is no share")?;
        }
        if !self.split.is_empty() && self.split.iter().sum::<f64>() <= 0.0 {
            return Err(ConfigError::value(
                key,
                "all zero",
                "at least one weight above 0",
                "somebody has to do the work",
            ));
        }
        if !self.split.is_empty() && self.mode == Mode::Auto {
            return Err(ConfigError::value(
                key,
                format!("{:?} with parallel.mode = \"auto\"", self.split),
                "none, as this mode chooses shares itself",
                "leave the split out, or choose the mode data or model",
            ));
        }
        within(
            "parallel.rebalance_threshold",
            self.rebalance_threshold,
            0.0..=100.0,
            "0.2, say: a fifth slower",
        )?;
        Ok(ParallelConfig {
            ranks: self.ranks,
            engine: self.engine,
            mode: self.mode,
            split: (!self.split.is_empty()).then(|| self.split.clone()),
            rebalance: self.rebalance,
            rebalance_threshold: self.rebalance_threshold,
        })
    }
}
