//! The fleet file: what each rank and the links between them were measured at.

use std::io::Write;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::error::{FleetError, Result};
use super::fit::non_negative;
use super::shape::FfnShape;

/// Version of the file's layout.
pub const FLEET_VERSION: u32 = 1;

/// Ranks that train together, as they were measured.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fleet {
    /// [`FLEET_VERSION`].
    pub version: u32,
    /// Engine that the links were measured with: `local`, `mpi`, …
    pub engine: String,
    /// Trained parameters that all ranks of the calibrated model hold.
    pub replicated_params: u64,
    /// What exchanges take.
    pub links: Links,
    /// The ranks, in order.
    pub ranks: Vec<RankProfile>,
}

/// One rank.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RankProfile {
    /// A name, for people.
    pub name: String,
    /// Its back-end: `cpu`, `wgpu`, `cuda`.
    pub backend: String,
    /// Bytes that the rank may use; absent if unknown, and then not checked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_bytes: Option<u64>,
    /// What a step takes besides the experts' FFNs.
    pub step: StepCost,
    /// Forward and backward pass of the experts' FFN, for each shape of the model.
    pub ffn: Vec<FfnCost>,
}

/// Seconds of forward and backward pass of the experts' FFN:
/// `fixed + token · tokens + unit · units + token_unit · tokens · units`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FfnCost {
    /// The experts.
    pub shape: FfnShape,
    /// Launches, and what else does not depend on sizes.
    pub fixed_s: f64,
    /// For each token: moving it to its experts and back.
    pub token_s: f64,
    /// For each hidden unit of all experts: reading weights, writing their gradients.
    pub unit_s: f64,
    /// For each token and hidden unit: the products.
    pub token_unit_s: f64,
}

impl FfnCost {
    /// Seconds of a pass; none without tokens or without units.
    pub fn seconds(&self, tokens: usize, units: usize) -> f64 {
        if tokens == 0 || units == 0 {
            return 0.0;
        }
        let (tokens, units) = (tokens as f64, units as f64);
        self.fixed_s
            + self.token_s * tokens
            + self.unit_s * units
            + self.token_unit_s * tokens * units
    }

    /// The cost that measurements `(tokens, units, seconds)` imply.
    pub fn fit(shape: FfnShape, points: &[(usize, usize, f64)]) -> Option<Self> {
        let points: Vec<_> = points
            .iter()
            .map(|&(tokens, units, seconds)| {
                let (tokens, units) = (tokens as f64, units as f64);
                ([1.0, tokens, units, tokens * units], seconds)
            })
            .collect();
        let [fixed_s, token_s, unit_s, token_unit_s] = non_negative(&points)?;
        Some(Self {
            shape,
            fixed_s,
            token_s,
            unit_s,
            token_unit_s,
        })
    }

    /// Floating-point operations per second in the limit of many tokens and units.
    pub fn flops_per_s(&self) -> f64 {
        self.shape.flops(1, 1) / self.token_unit_s
    }
}

/// Seconds of a step besides the experts' FFNs.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StepCost {
    /// What does not depend on the batch.
    pub fixed_s: f64,
    /// For each sample: attention, routers, norms, loss.
    pub sample_s: f64,
    /// The optimizer's update, for each parameter that the rank holds.
    pub parameter_s: f64,
}

impl StepCost {
    /// Seconds of forward and backward pass outside of the experts; none without samples.
    pub fn seconds(&self, samples: usize) -> f64 {
        if samples == 0 {
            return 0.0;
        }
        self.fixed_s + self.sample_s * samples as f64
    }
}

/// Seconds of an exchange of `bytes`: `latency_s + bytes / bytes_per_s`, copies from and to the
/// devices included.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LinkCost {
    /// What does not depend on the size.
    pub latency_s: f64,
    /// The rate.
    pub bytes_per_s: f64,
}

/// Rates above this cannot be told from instantaneous: all messages were equally fast.
const FASTEST_BYTES_PER_S: f64 = 1e15;

impl LinkCost {
    /// Seconds of an exchange.
    pub fn seconds(&self, bytes: u64) -> f64 {
        self.latency_s + bytes as f64 / self.bytes_per_s
    }

    /// The cost that measurements `(bytes, seconds)` imply.
    pub fn fit(points: &[(u64, f64)]) -> Option<Self> {
        let points: Vec<_> = points
            .iter()
            .map(|&(bytes, seconds)| ([1.0, bytes as f64], seconds))
            .collect();
        let [latency_s, byte_s] = non_negative(&points)?;
        Some(Self {
            latency_s,
            bytes_per_s: (1.0 / byte_s).min(FASTEST_BYTES_PER_S),
        })
    }
}

/// The exchanges of a step. Bytes are those of the whole: all ranks' parts together.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Links {
    /// Seconds of a collective of a few numbers.
    pub small_s: f64,
    /// Data-centric: a layer's slices become whole weights.
    pub gather_weights: LinkCost,
    /// Data-centric: whole weight gradients become sums of slices.
    pub reduce_weight_gradients: LinkCost,
    /// Model-centric: all ranks get all tokens.
    pub gather_tokens: LinkCost,
    /// Model-centric: partial results of all tokens become sums of the own ones.
    pub reduce_tokens: LinkCost,
    /// Gradients of replicated parameters are summed.
    pub all_reduce: LinkCost,
}

impl Fleet {
    /// Reads and checks a fleet file.
    ///
    /// # Errors
    /// [`FleetError::File`], and those of [`Fleet::parse`].
    pub fn load(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|error| FleetError::File {
            path: path.to_path_buf(),
            reason: error.to_string(),
        })?;
        Self::parse(&text, &path.display().to_string())
    }

    /// Reads and checks the text of a fleet file; `origin` names it in errors.
    ///
    /// # Errors
    /// [`FleetError::Syntax`] or [`FleetError::Value`].
    pub fn parse(text: &str, origin: &str) -> Result<Self> {
        let fleet: Self = toml::from_str(text).map_err(|error| FleetError::Syntax {
            origin: origin.to_owned(),
            reason: error.to_string().trim_end().to_owned(),
        })?;
        fleet.validate(origin)?;
        Ok(fleet)
    }

    /// The text of the fleet file.
    pub fn to_toml(&self) -> String {
        // A struct of structs, numbers and strings always has a TOML form.
        toml::to_string(self).unwrap_or_default()
    }

    /// Writes the fleet file: to a temporary one, synchronised, then renamed.
    ///
    /// # Errors
    /// [`FleetError::File`].
    pub fn save(&self, path: &Path) -> Result<()> {
        let write = || -> std::io::Result<()> {
            let mut name = path.as_os_str().to_owned();
            name.push(".tmp");
            let temporary = std::path::PathBuf::from(name);
            let mut file = std::fs::File::create(&temporary)?;
            file.write_all(self.to_toml().as_bytes())?;
            file.sync_all()?;
            std::fs::rename(&temporary, path)
        };
        write().map_err(|error| FleetError::File {
            path: path.to_path_buf(),
            reason: error.to_string(),
        })
    }

    /// Number of ranks.
    pub fn world_size(&self) -> usize {
        self.ranks.len()
    }

    fn validate(&self, origin: &str) -> Result<()> {
        let refuse = |field: String, got: String, allowed| {
            Err(FleetError::Value {
                origin: origin.to_owned(),
                field,
                got,
                allowed,
            })
        };
        if self.version != FLEET_VERSION {
            return refuse("version".into(), self.version.to_string(), "1");
        }
        if self.ranks.is_empty() {
            return refuse("ranks".into(), "empty".into(), "at least one [[ranks]]");
        }
        for (field, seconds) in self.numbers() {
            if !(seconds.is_finite() && seconds >= 0.0) {
                return refuse(field, seconds.to_string(), "a finite number >= 0");
            }
            if seconds == 0.0 && field.ends_with("bytes_per_s") {
                return refuse(field, seconds.to_string(), "a number > 0");
            }
        }
        for rank in &self.ranks {
            if rank.memory_bytes == Some(0) {
                let field = format!("memory_bytes of rank `{}`", rank.name);
                return refuse(field, "0".into(), "a number > 0, or no memory_bytes");
            }
            for cost in &rank.ffn {
                if cost.seconds(1, 1) == 0.0 {
                    let field = format!("the cost of rank `{}` at {}", rank.name, cost.shape);
                    return refuse(field, "0".into(), "at least one time above 0");
                }
            }
        }
        Ok(())
    }

    /// All times and rates, with their names.
    fn numbers(&self) -> Vec<(String, f64)> {
        let mut numbers = vec![("links.small_s".to_owned(), self.links.small_s)];
        for (name, link) in [
            ("gather_weights", self.links.gather_weights),
            (
                "reduce_weight_gradients",
                self.links.reduce_weight_gradients,
            ),
            ("gather_tokens", self.links.gather_tokens),
            ("reduce_tokens", self.links.reduce_tokens),
            ("all_reduce", self.links.all_reduce),
        ] {
            numbers.push((format!("links.{name}.latency_s"), link.latency_s));
            numbers.push((format!("links.{name}.bytes_per_s"), link.bytes_per_s));
        }
        for rank in &self.ranks {
            let mut add = |field: &str, value| {
                numbers.push((format!("{field} of rank `{}`", rank.name), value));
            };
            add("step.fixed_s", rank.step.fixed_s);
            add("step.sample_s", rank.step.sample_s);
            add("step.parameter_s", rank.step.parameter_s);
            for cost in &rank.ffn {
                add("ffn.fixed_s", cost.fixed_s);
                add("ffn.token_s", cost.token_s);
                add("ffn.unit_s", cost.unit_s);
                add("ffn.token_unit_s", cost.token_unit_s);
            }
        }
        numbers
    }
}

impl RankProfile {
    /// What this rank was measured at for experts of `shape`.
    pub(super) fn ffn(&self, shape: &FfnShape) -> Result<&FfnCost> {
        let found = self.ffn.iter().find(|cost| cost.shape == *shape);
        found.ok_or_else(|| {
            let measured: Vec<String> = self.ffn.iter().map(|c| c.shape.to_string()).collect();
            FleetError::Shape {
                rank: self.name.clone(),
                wanted: *shape,
                measured: match measured.is_empty() {
                    true => "none".to_owned(),
                    false => measured.join("; "),
                },
            }
        })
    }
}
