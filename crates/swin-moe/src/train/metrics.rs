//! `metrics.jsonl`: one JSON object per line, appended as the run goes. The same figures go into a
//! TensorBoard event file beside it.

use std::fs::{self, File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use hexa_moe::RouterMeans;
use serde::{Deserialize, Serialize};

use super::classes::ClassScore;
use super::error::{Result, TrainError};
use super::tensorboard::EventFile;

/// One line of `metrics.jsonl`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Record {
    /// An optimizer step, every `train.log_every` of them.
    Step(StepRecord),
    /// An evaluation on the whole test set.
    Eval(EvalRecord),
}

/// What one optimizer step saw.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StepRecord {
    /// Optimizer steps done, this one included.
    pub step: u64,
    /// The epoch of the step's batch, from one.
    pub epoch: u64,
    /// Cross entropy plus auxiliary loss.
    pub loss: f32,
    /// Cross entropy with label smoothing.
    pub ce_loss: f32,
    /// Auxiliary losses of all MoE layers, weighted.
    pub aux_loss: f32,
    /// The learning rate that the step used.
    pub lr: f64,
    /// Norm of all gradients together, before clipping; none if they were not finite, for which a
    /// step with scaled losses is left out.
    pub grad_norm: Option<f32>,
    /// Factor of the loss in the backward pass, in f16.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss_scale: Option<f32>,
    /// Images trained on per second since the previous line.
    pub images_per_s: f64,
    /// Share of the time since the previous line that went to waiting for the loader, in 0..=1.
    #[serde(default)]
    pub loader_wait: f64,
    /// Load of each MoE layer's experts in this step, layers in the model's order.
    pub layers: Vec<LayerLoad>,
    /// Memory, as far as the system tells.
    #[serde(default)]
    pub memory: MemoryRecord,
}

/// Most memory that a run's process has taken so far, since it began or was resumed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryRecord {
    /// Bytes of tensors on the device, in the steps that were watched.
    pub tensor_bytes: Option<u64>,
    /// Bytes that the runtime had taken from the device then.
    pub reserved_bytes: Option<u64>,
    /// Bytes of the process on the host, tensors on the CPU included.
    pub host_bytes: Option<u64>,
}

/// How a batch spread over the experts of one MoE layer.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct LayerLoad {
    /// Slots (token, choice) that each expert worked on.
    pub tokens_per_expert: Vec<u64>,
    /// Entropy of the load, 1 for an even one.
    pub entropy: f64,
    /// Rows that tiles compute beyond the slots, as a part of the slots.
    pub tile_waste: f64,
    /// What the router says, in the mean over the tokens: entropy in nats, gate weight of a choice,
    /// z. `None` without tokens, and in files of earlier versions.
    #[serde(default)]
    pub router: Option<RouterMeans>,
}

impl LayerLoad {
    /// Each expert's share of the slots.
    pub fn shares(&self) -> Vec<f64> {
        let total = self.tokens_per_expert.iter().sum::<u64>().max(1) as f64;
        self.tokens_per_expert
            .iter()
            .map(|&tokens| tokens as f64 / total)
            .collect()
    }
}

/// An evaluation on the whole test set.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EvalRecord {
    /// Optimizer steps done before it.
    pub step: u64,
    /// Epochs done before it.
    pub epoch: u64,
    /// Images whose label is the highest-scored class, in percent.
    pub top1: f32,
    /// Images whose label is among the five highest-scored classes, in percent.
    pub top5: f32,
    /// Mean cross entropy, without label smoothing.
    pub loss: f32,
    /// Images evaluated.
    pub images: u64,
    /// Mean training cross entropy over the epoch's steps.
    pub train_ce_loss: f32,
    /// Mean auxiliary loss over the epoch's steps.
    pub train_aux_loss: f32,
    /// Load of each MoE layer's experts over the test set, layers in the model's order.
    pub layers: Vec<LayerLoad>,
    /// The least accurate classes, worst first, [`WORST_CLASSES`] at most.
    #[serde(default)]
    pub worst_classes: Vec<ClassScore>,
}

/// Classes that an [`EvalRecord`] names.
pub const WORST_CLASSES: usize = 10;

/// Appends records to `metrics.jsonl` and to an event file in the same directory.
#[derive(Debug)]
pub struct MetricsWriter {
    path: PathBuf,
    /// None where another rank writes.
    files: Option<Files>,
    length: u64,
}

#[derive(Debug)]
struct Files {
    lines: File,
    events: EventFile,
}

impl MetricsWriter {
    /// Writes nothing: for ranks whose lead does.
    pub fn nowhere(path: &Path) -> Self {
        MetricsWriter {
            path: path.to_path_buf(),
            files: None,
            length: 0,
        }
    }

    /// Starts an empty file.
    ///
    /// # Errors
    /// [`TrainError::Io`] if it cannot be created.
    pub fn create(path: &Path) -> Result<Self> {
        let lines = File::create(path).map_err(TrainError::io("create", path))?;
        Self::new(path, lines, 0, 0)
    }

    fn new(path: &Path, lines: File, length: u64, step: u64) -> Result<Self> {
        let directory = path.parent().unwrap_or(Path::new("."));
        let events = EventFile::create(directory, step)?;
        Ok(MetricsWriter {
            path: path.to_path_buf(),
            files: Some(Files { lines, events }),
            length,
        })
    }

    /// Continues a file after optimizer step `step`, dropping what was written after its first
    /// `length` bytes.
    ///
    /// # Errors
    /// [`TrainError::RunDir`] if the file is shorter than that, [`TrainError::Io`] if it cannot
    /// be opened.
    pub fn resume(path: &Path, length: u64, step: u64) -> Result<Self> {
        let mut file = OpenOptions::new()
            .write(true)
            .open(path)
            .map_err(TrainError::io("open", path))?;
        let found = file
            .metadata()
            .map_err(TrainError::io("inspect", path))?
            .len();
        if found < length {
            return Err(TrainError::RunDir {
                path: path.to_path_buf(),
                reason: format!("it has {found} bytes, the checkpoint was written after {length}"),
                remedy: "restore the file, or start a new run".to_owned(),
            });
        }
        file.set_len(length)
            .and_then(|()| file.seek(SeekFrom::Start(length)))
            .map_err(TrainError::io("truncate", path))?;
        Self::new(path, file, length, step)
    }

    /// Appends one line, and its figures as events.
    ///
    /// # Errors
    /// [`TrainError::Io`] if they cannot be written.
    pub fn append(&mut self, record: &Record) -> Result<()> {
        let mut line = serde_json::to_vec(record)
            .map_err(std::io::Error::from)
            .map_err(TrainError::io("write", &self.path))?;
        line.push(b'\n');
        let Some(Files { lines, events }) = &mut self.files else {
            return Ok(());
        };
        lines
            .write_all(&line)
            .map_err(TrainError::io("write", &self.path))?;
        self.length += line.len() as u64;
        events.append(record)
    }

    /// Makes all lines durable and says how long the file is, for a checkpoint.
    ///
    /// # Errors
    /// [`TrainError::Io`] if the system cannot write them out.
    pub fn sync(&mut self) -> Result<u64> {
        if let Some(Files { lines, .. }) = &self.files {
            lines
                .sync_data()
                .map_err(TrainError::io("synchronise", &self.path))?;
        }
        Ok(self.length)
    }
}

/// Reads all records of a file; a last line without its end is left out.
///
/// # Errors
/// [`TrainError::Io`] if the file cannot be read, [`TrainError::RunDir`] naming the first line
/// that is not a record.
pub fn read_records(path: &Path) -> Result<Vec<Record>> {
    let text = fs::read_to_string(path).map_err(TrainError::io("read", path))?;
    let whole = match text.rfind('\n') {
        Some(end) => &text[..end],
        None => "",
    };
    whole
        .lines()
        .enumerate()
        .map(|(number, line)| {
            serde_json::from_str(line).map_err(|error| TrainError::RunDir {
                path: path.to_path_buf(),
                reason: format!("line {} is not a record: {error}", number + 1),
                remedy: "restore the file, or start a new run".to_owned(),
            })
        })
        .collect()
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Some figures.
    pub fn step(step: u64) -> Record {
        Record::Step(StepRecord {
            step,
            epoch: 1,
            loss: 2.25,
            ce_loss: 2.125,
            aux_loss: 0.125,
            lr: 1e-3,
            grad_norm: Some(0.7),
            loss_scale: None,
            images_per_s: 100.0,
            loader_wait: 0.25,
            layers: vec![LayerLoad {
                tokens_per_expert: vec![3, 0, 1],
                entropy: 0.5,
                tile_waste: 0.25,
                router: Some(RouterMeans {
                    entropy_nats: 1.25,
                    gate_weight: 0.5,
                    z: 3.5,
                }),
            }],
            memory: MemoryRecord {
                tensor_bytes: Some(3 << 20),
                ..MemoryRecord::default()
            },
        })
    }

    #[test]
    fn lines_have_the_documented_keys() {
        let value = serde_json::to_value(step(3)).unwrap();
        assert_eq!(value["kind"], "step");
        for key in [
            "step",
            "epoch",
            "loss",
            "ce_loss",
            "aux_loss",
            "lr",
            "grad_norm",
            "images_per_s",
            "loader_wait",
        ] {
            assert!(value[key].is_number(), "{key}");
        }
        let layer = &value["layers"][0];
        assert_eq!(layer["tokens_per_expert"][0], 3);
        assert_eq!(layer["router"]["entropy_nats"], 1.25);
        assert_eq!(layer["router"]["gate_weight"], 0.5);
        assert_eq!(layer["router"]["z"], 3.5);

        // As earlier versions wrote it.
        let mut old = value.clone();
        old["layers"][0].as_object_mut().unwrap().remove("router");
        let Record::Step(old) = serde_json::from_value(old).unwrap() else {
            panic!("another kind of record");
        };
        assert_eq!(old.layers[0].router, None);
    }

    #[test]
    fn resuming_drops_exactly_what_came_later() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("metrics.jsonl");
        let mut writer = MetricsWriter::create(&path).unwrap();
        writer.append(&step(1)).unwrap();
        let length = writer.sync().unwrap();
        writer.append(&step(2)).unwrap();
        drop(writer);
        fs::write(
            &path,
            [fs::read(&path).unwrap(), b"{\"kind\":".to_vec()].concat(),
        )
        .unwrap();
        assert_eq!(read_records(&path).unwrap(), [step(1), step(2)]);

        let mut writer = MetricsWriter::resume(&path, length, 1).unwrap();
        writer.append(&step(9)).unwrap();
        assert_eq!(read_records(&path).unwrap(), [step(1), step(9)]);
        assert!(MetricsWriter::resume(&path, 1 << 20, 1).is_err());
    }

    #[test]
    fn shares_of_an_idle_layer_are_zero() {
        let load = LayerLoad {
            tokens_per_expert: vec![0, 0],
            ..LayerLoad::default()
        };
        assert_eq!(load.shares(), [0.0, 0.0]);
    }
}
