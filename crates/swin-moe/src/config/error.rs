//! Why a configuration is refused.

use std::path::PathBuf;

/// Why a configuration was refused. `place` says where: a file and line, or an override.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration {}: {reason}; check --config", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's words.
        reason: String,
    },
    /// The file is not TOML.
    #[error("{place}: not valid TOML: {reason}")]
    Syntax {
        /// File, line and column.
        place: String,
        /// The parser's words.
        reason: String,
    },
    /// A section that does not exist.
    #[error("{place}: unknown section [{got}]; {hint}")]
    UnknownSection {
        /// File and line, or the override.
        place: String,
        /// The name that was given.
        got: String,
        /// The nearest name, and all of them.
        hint: String,
    },
    /// A key that does not exist in its section.
    #[error("{place}: unknown key `{key}` in [{section}]; {hint}")]
    UnknownKey {
        /// File and line, or the override.
        place: String,
        /// The section.
        section: String,
        /// The name that was given.
        key: String,
        /// The nearest name, or all of them.
        hint: String,
    },
    /// A value of the wrong type.
    #[error("{place}: {key} = {value}: {reason}")]
    Type {
        /// File and line, or the override.
        place: String,
        /// The dotted key.
        key: String,
        /// The value as TOML.
        value: String,
        /// What was got and what is expected.
        reason: String,
    },
    /// An override that is not `section.key=value`.
    #[error("--set {text:?}: {reason}; write --set section.key=value, as in --set train.lr=0.001")]
    Override {
        /// The override.
        text: String,
        /// What is missing.
        reason: &'static str,
    },
    /// A value outside its range, or at odds with another.
    #[error("{place}: {key} is {got}, allowed is {allowed}; {remedy}")]
    Value {
        /// File and line, or the override, or the file alone for a default.
        place: String,
        /// The dotted key.
        key: String,
        /// The value.
        got: String,
        /// What is allowed.
        allowed: String,
        /// What to do.
        remedy: String,
    },
}

impl ConfigError {
    /// A value outside its range, not placed yet.
    pub(super) fn value(
        key: &str,
        got: impl std::fmt::Display,
        allowed: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        ConfigError::Value {
            place: "configuration".into(),
            key: key.into(),
            got: got.to_string(),
            allowed: allowed.into(),
            remedy: remedy.into(),
        }
    }

    /// Says where the value of a [`ConfigError::Value`] came from.
    pub(super) fn placed(mut self, place_of: impl Fn(&str) -> String) -> Self {
        if let ConfigError::Value { place, key, .. } = &mut self {
            *place = place_of(key);
        }
        self
    }
}
