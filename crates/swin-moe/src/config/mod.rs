//! Run configurations: TOML in, a checked [`Config`] out.
//!
//! A file is read into plain serde structs ([`RawConfig`]), `--set key=value` overrides are
//! applied to the document before that, and [`RawConfig::validate`] turns the result into a
//! [`Config`]. The rest of the program sees validated settings only.

mod augment;
mod document;
mod error;
mod fields;
mod init;
mod raw;
mod resolved;
mod types;
mod validate;

use std::path::Path;

pub use error::ConfigError;
pub use init::{Freeze, InitConfig, InitSource};
pub use raw::{
    RawAugment, RawCheckpoint, RawConfig, RawData, RawInit, RawModel, RawMoe, RawParallel, RawTrain,
};
pub use types::{
    AugmentConfig, AuxLoss, CheckpointConfig, Config, CropFill, DataConfig, DataSource, Engine,
    MixConfig, Mode, ModelConfig, MoeSettings, ParallelConfig, Precision, RandAugmentConfig,
    Rebalance, RouterKind, TrainConfig,
};

use document::Document;

/// The configuration that is used when no file is given: the embedded digits on the CPU.
pub const DIGITS_TOML: &str = include_str!("../../../../configs/digits.toml");

/// Files larger than this are refused: no configuration comes near it.
const MAX_FILE_BYTES: u64 = 1 << 20;

impl Config {
    /// Reads a configuration file, or the embedded [`DIGITS_TOML`] when `path` is `None`, applies
    /// the overrides in order, and checks the result.
    ///
    /// An override is `section.key=value`; the value is TOML, or a plain string when it is not.
    ///
    /// # Errors
    /// [`ConfigError`] for the first thing that is wrong.
    pub fn load<S: AsRef<str>>(path: Option<&Path>, overrides: &[S]) -> Result<Self, ConfigError> {
        match path {
            None => Self::from_toml(DIGITS_TOML, "the built-in digits.toml", overrides),
            Some(path) => {
                let text = read_file(path)?;
                Self::from_toml(&text, &path.display().to_string(), overrides)
            }
        }
    }

    /// As [`Config::load`], from text; `origin` names the text in messages.
    ///
    /// # Errors
    /// [`ConfigError`] for the first thing that is wrong.
    pub fn from_toml<S: AsRef<str>>(
        text: &str,
        origin: &str,
        overrides: &[S],
    ) -> Result<Self, ConfigError> {
        let mut document = Document::parse(text, origin)?;
        for text in overrides {
            document.apply_override(text.as_ref())?;
        }
        let raw = document.read()?;
        raw.validate()
            .map_err(|error| error.placed(|key| document.place(key)))
    }

    /// Writes the resolved configuration, every key present, so that reading it back yields an
    /// equal [`Config`].
    pub fn to_toml(&self) -> String {
        // `RawConfig` holds numbers, strings, booleans and arrays of them only, and every integer
        // was checked to fit TOML's 64 signed bits: there is nothing that cannot be written.
        toml::to_string(&self.to_raw()).unwrap_or_default()
    }
}

fn read_file(path: &Path) -> Result<String, ConfigError> {
    let failed = |reason: String| ConfigError::Read {
        path: path.to_path_buf(),
        reason,
    };
    let metadata = std::fs::metadata(path).map_err(|error| failed(error.to_string()))?;
    if !metadata.is_file() {
        return Err(failed("it is not a file".into()));
    }
    if metadata.len() > MAX_FILE_BYTES {
        let size = metadata.len();
        return Err(failed(format!(
            "it has {size} bytes, allowed are {MAX_FILE_BYTES}"
        )));
    }
    std::fs::read_to_string(path).map_err(|error| failed(error.to_string()))
}
