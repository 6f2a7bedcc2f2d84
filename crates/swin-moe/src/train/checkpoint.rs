//! Checkpoints: a directory for each, whatever the number of ranks that saved it.

pub(super) mod files;

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use hexa_moe::parallel::ParallelPlan;
use serde::{Deserialize, Serialize};

use self::files::ReadError;
use super::error::{Result, TrainError};
use super::loss_scale::LossScale;
use super::params::HostTensors;
use crate::backend::BackendKind;

const REMEDY_DAMAGED: &str =
    "it is damaged, not whole or not one of ours; take another of the run's checkpoints";

/// Where a run stands, to the batch.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunState {
    /// The run's name.
    pub name: String,
    /// Optimizer steps done.
    pub step: u64,
    /// The epoch that the next batch belongs to, from zero.
    pub epoch: u64,
    /// Batches of that epoch already done.
    pub batch: u64,
    /// Sum of the cross entropy over those batches, as the bits of an f32.
    pub ce_sum_bits: u32,
    /// Sum of the auxiliary loss over those batches, as the bits of an f32.
    pub aux_sum_bits: u32,
    /// Best test accuracy so far, in percent.
    pub best_top1: Option<f32>,
    /// The loss' scale, in f16.
    #[serde(default)]
    pub loss_scale: Option<LossScale>,
    /// Length of `metrics.jsonl` when the checkpoint was written, in bytes.
    pub metrics_bytes: u64,
    /// The back-end that the run used.
    pub backend: BackendKind,
    /// The run's seed.
    pub seed: u64,
    /// The resolved configuration, as TOML.
    pub config: String,
    /// Names of the classes, in label order.
    pub class_names: Vec<String>,
    /// Who does what, where that was chosen by measurements; what the configuration asks for
    /// otherwise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub plan: Option<ParallelPlan>,
}

/// A checkpoint on the host.
#[derive(Debug, Clone, PartialEq)]
pub struct Checkpoint {
    /// Where the run stands.
    pub state: RunState,
    /// The model's parameters, by their path in the model.
    pub model: HostTensors,
    /// The optimizer's tensors; empty in a checkpoint made from imported weights.
    pub optimizer: HostTensors,
}

impl Checkpoint {
    /// Reads a checkpoint's directory and checks every byte of it.
    ///
    /// # Errors
    /// [`TrainError::Io`] if a file cannot be read, [`TrainError::Checkpoint`] if one is damaged.
    pub fn load(path: &Path) -> Result<Self> {
        if path.is_file() {
            return Err(TrainError::Checkpoint {
                path: path.to_path_buf(),
                reason: "it is a file, a checkpoint is a directory with a manifest.jsonl"
                    .to_owned(),
                remedy: "give one of the directories in a run's checkpoints/",
            });
        }
        files::read(path).map_err(|error| match error {
            ReadError::Io(path, source) => TrainError::io("read", path)(source),
            ReadError::Damaged(reason) => TrainError::Checkpoint {
                path: path.to_path_buf(),
                reason,
                remedy: REMEDY_DAMAGED,
            },
        })
    }
}

/// Replaces `path` by `bytes`: temporary file, fsync, rename, fsync of the directory.
///
/// # Errors
/// [`TrainError::Io`] if any of it fails; `path` is then as it was.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> Result<()> {
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let mut file = tempfile::NamedTempFile::new_in(directory)
        .map_err(TrainError::io("create a temporary file in", directory))?;
    file.write_all(bytes)
        .and_then(|()| file.as_file().sync_all())
        .map_err(TrainError::io("write", path))?;
    set_ordinary_permissions(file.as_file()).map_err(TrainError::io("set permissions of", path))?;
    file.persist(path)
        .map_err(|error| TrainError::io("replace", path)(error.error))?;
    // A rename is on disk once its directory is. Not every system can open a directory.
    if let Ok(directory) = File::open(directory) {
        directory
            .sync_all()
            .map_err(TrainError::io("synchronise the directory of", path))?;
    }
    Ok(())
}

/// Temporary files are private to their owner; results are for everybody who may read the run.
#[cfg(unix)]
fn set_ordinary_permissions(file: &File) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    file.set_permissions(fs::Permissions::from_mode(0o644))
}

#[cfg(not(unix))]
fn set_ordinary_permissions(_file: &File) -> std::io::Result<()> {
    Ok(())
}

#[cfg(test)]
mod tests {
    use hexa_moe::parallel::{LayerPlan, Mode};

    use super::super::params::HostTensor;
    use super::super::ranks::{Cut, Cuts};
    use super::*;

    fn tensor(shape: &[usize], offset: f32) -> HostTensor {
        HostTensor {
            shape: shape.to_vec(),
            values: (0..shape.iter().product::<usize>())
                .map(|i| i as f32 * 0.37 - offset)
                .collect(),
        }
    }

    fn sample() -> Checkpoint {
        let model = HostTensors::from([
            ("blocks.0.w1".to_owned(), tensor(&[2, 3, 5], 3.0)),
            ("blocks.0.w2".to_owned(), tensor(&[2, 5, 3], 1.0)),
            ("scale".to_owned(), tensor(&[1], 9.0)),
        ]);
        let optimizer = HostTensors::from([
            ("first.blocks.0.w1".to_owned(), tensor(&[2, 3, 5], 2.0)),
            ("first.scale".to_owned(), tensor(&[1], 2.0)),
            ("steps".to_owned(), tensor(&[2], 0.0)),
        ]);
        let state = RunState {
            name: "digits".to_owned(),
            step: 41,
            epoch: 3,
            batch: 5,
            ce_sum_bits: 1.5f32.to_bits(),
            aux_sum_bits: 0.25f32.to_bits(),
            best_top1: Some(97.25),
            loss_scale: None,
            metrics_bytes: 1234,
            backend: BackendKind::Wgpu,
            seed: 7,
            config: "[train]\nlr = 0.001\n".to_owned(),
            class_names: vec!["zero".to_owned(), "eins \u{00e4}".to_owned()],
            plan: Some(ParallelPlan {
                layers: vec![LayerPlan {
                    mode: Mode::ModelCentric,
                    widths: vec![2, 3],
                }],
                batch: vec![5, 2],
            }),
        };
        Checkpoint {
            state,
            model,
            optimizer,
        }
    }

    /// Saves as ranks with these hidden widths do.
    fn save(directory: &Path, widths: &[usize]) {
        let whole = sample();
        let cut = |name: &str, axis| {
            let cut = Cut {
                shape: whole.model[name].shape.clone(),
                axis,
                lengths: widths.to_vec(),
            };
            (name.to_owned(), cut)
        };
        let cuts: Cuts = [cut("blocks.0.w1", 2), cut("blocks.0.w2", 1)]
            .into_iter()
            .collect();
        let seals = (0..widths.len()).map(|rank| {
            let model = whole.model.iter().map(|(name, tensor)| {
                let own = cuts.get(name).and_then(|cut| cut.slice(rank, tensor));
                (name.clone(), own.unwrap_or_else(|| tensor.clone()))
            });
            let optimizer = cuts.slice_state(rank, whole.optimizer.clone());
            let keep = |name: &str| rank == 0 || cuts.contains(name);
            files::write_part(directory, rank, &model.collect(), &optimizer, keep).unwrap()
        });
        let seals = seals.collect();
        files::write_manifest(directory, seals, &cuts, &whole.state).unwrap();
    }

    #[test]
    fn what_ranks_save_is_whole_whatever_their_number() {
        for widths in [&[5][..], &[2, 3], &[3, 1, 1], &[0, 4, 0, 1]] {
            let directory = tempfile::tempdir().unwrap();
            save(directory.path(), widths);
            assert_eq!(Checkpoint::load(directory.path()).unwrap(), sample());
        }
    }

    /// The files of a checkpoint, and a way to write one anew.
    fn each_file(widths: &[usize], mut test: impl FnMut(&Path, &Path, &[u8])) {
        let directory = tempfile::tempdir().unwrap();
        save(directory.path(), widths);
        for entry in fs::read_dir(directory.path()).unwrap() {
            let path = entry.unwrap().path();
            let bytes = fs::read(&path).unwrap();
            test(directory.path(), &path, &bytes);
            fs::write(&path, &bytes).unwrap();
        }
        assert_eq!(Checkpoint::load(directory.path()).unwrap(), sample());
    }

    #[test]
    fn every_flipped_byte_is_noticed() {
        each_file(&[3, 2], |directory, path, bytes| {
            for at in 0..bytes.len() {
                let mut damaged = bytes.to_vec();
                damaged[at] ^= 1 << (at % 8);
                fs::write(path, damaged).unwrap();
                let loaded = Checkpoint::load(directory);
                assert!(loaded.is_err(), "byte {at} of {}", path.display());
            }
        });
    }

    #[test]
    fn every_truncation_and_extension_is_refused() {
        each_file(&[3, 2], |directory, path, bytes| {
            for length in 0..bytes.len() {
                fs::write(path, &bytes[..length]).unwrap();
                let loaded = Checkpoint::load(directory);
                assert!(loaded.is_err(), "{length} bytes of {}", path.display());
            }
            fs::write(path, [bytes, b"\n"].concat()).unwrap();
            assert!(Checkpoint::load(directory).is_err());
            fs::remove_file(path).unwrap();
            assert!(Checkpoint::load(directory).is_err());
        });
    }

    #[test]
    fn files_replace_others_whole_and_leave_nothing_behind() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        for text in ["first", "second"] {
            write_atomically(&path, text.as_bytes()).unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), text);
        }
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }
}
