//! `[init]`: weights that a new run starts with, and what of them stays as it is.

use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::error::ConfigError;
use super::raw::RawInit;
use super::validate::Result;

/// What a new run starts with.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct InitConfig {
    /// Whose weights; `None` draws them from the seed.
    pub source: Option<InitSource>,
    /// What of them stays as it is.
    pub freeze: Freeze,
}

/// Whose weights a new run starts with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum InitSource {
    /// Those of a run of ours, or of one of its checkpoints.
    Run(PathBuf),
    /// A `.pth` or `.safetensors` file in the published names.
    Weights(PathBuf),
}

/// What is not trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Freeze {
    /// Everything is trained.
    #[default]
    None,
    /// The head alone is trained, on what the rest makes of an image in evaluation: a linear probe.
    Backbone,
}

impl fmt::Display for InitSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            InitSource::Run(path) => write!(f, "the run {}", path.display()),
            InitSource::Weights(path) => write!(f, "the file {}", path.display()),
        }
    }
}

impl RawInit {
    pub(super) fn validate(&self) -> Result<InitConfig> {
        let source = match (self.run.as_str(), self.weights.as_str()) {
            ("", "") => None,
            (run, "") => Some(InitSource::Run(PathBuf::from(run))),
            ("", weights) => Some(InitSource::Weights(PathBuf::from(weights))),
            (_, weights) => {
                return Err(ConfigError::value(
                    "init.weights",
                    format!("{weights:?} beside init.run"),
                    "one of init.run and init.weights",
                    "remove one of the two",
                ));
            }
        };
        if self.freeze == Freeze::Backbone && source.is_none() {
            return Err(ConfigError::value(
                "init.freeze",
                "\"backbone\" without weights to keep",
                "\"backbone\" with init.run or init.weights, or \"none\"",
                "name a run with init.run or a file with init.weights",
            ));
        }
        Ok(InitConfig {
            source,
            freeze: self.freeze,
        })
    }
}

impl InitConfig {
    pub(super) fn to_raw(&self) -> RawInit {
        let mut raw = RawInit {
            freeze: self.freeze,
            ..RawInit::default()
        };
        match &self.source {
            None => {}
            Some(InitSource::Run(path)) => raw.run = path.display().to_string(),
            Some(InitSource::Weights(path)) => raw.weights = path.display().to_string(),
        }
        raw
    }
}
