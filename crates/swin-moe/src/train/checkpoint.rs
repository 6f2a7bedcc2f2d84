//! The checkpoint file: a safetensors file whose metadata holds the run's state and a checksum.
//!
//! Any safetensors reader can open it; ours also refuses a file in which a single bit has changed.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde::{Deserialize, Serialize};

use super::error::{Result, TrainError};
use super::params::{HostTensor, HostTensors};
use crate::backend::BackendKind;

/// Version of the layout described here.
const FORMAT: u32 = 1;
/// The metadata key that holds [`Header`].
const HEADER_KEY: &str = "swin_moe";
const REMEDY_DAMAGED: &str =
    "the file is damaged or not one of ours; take the run's other checkpoint (best or last)";

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

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    format: u32,
    checksum: String,
    state: RunState,
}

impl Checkpoint {
    /// Writes the checkpoint so that `path` holds either the old or the new one, never a part.
    ///
    /// # Errors
    /// [`TrainError::Io`] if the file cannot be written.
    pub fn save(&self, path: &Path) -> Result<()> {
        let bytes = self.to_bytes().map_err(|reason| TrainError::Checkpoint {
            path: path.to_path_buf(),
            reason,
            remedy: "this is a bug, please report it",
        })?;
        write_atomically(path, &bytes)
    }

    /// Reads a checkpoint and checks every byte of it.
    ///
    /// # Errors
    /// [`TrainError::Io`] if the file cannot be read, [`TrainError::Checkpoint`] if it is damaged.
    pub fn load(path: &Path) -> Result<Self> {
        let bytes = fs::read(path).map_err(TrainError::io("read", path))?;
        Self::from_bytes(&bytes).map_err(|reason| TrainError::Checkpoint {
            path: path.to_path_buf(),
            reason,
            remedy: REMEDY_DAMAGED,
        })
    }

    /// The file's content.
    fn to_bytes(&self) -> std::result::Result<Vec<u8>, String> {
        let mut named: Vec<(String, &HostTensor)> = Vec::new();
        named.extend(self.model.iter().map(|(n, t)| (format!("model.{n}"), t)));
        named.extend(
            self.optimizer
                .iter()
                .map(|(n, t)| (format!("optimizer.{n}"), t)),
        );

        let mut views = Vec::with_capacity(named.len());
        for (name, tensor) in &named {
            let view = TensorView::new(Dtype::F32, tensor.shape.clone(), as_bytes(&tensor.values))
                .map_err(|error| format!("tensor {name}: {error}"))?;
            views.push((name.clone(), view));
        }
        let header = Header {
            format: FORMAT,
            checksum: format!("{:016x}", checksum(&self.state, &views)?),
            state: self.state.clone(),
        };
        let header = serde_json::to_string(&header).map_err(|error| error.to_string())?;
        let metadata = HashMap::from([(HEADER_KEY.to_owned(), header)]);
        safetensors::serialize(views, Some(metadata)).map_err(|error| error.to_string())
    }

    fn from_bytes(bytes: &[u8]) -> std::result::Result<Self, String> {
        let file = SafeTensors::deserialize(bytes).map_err(|error| describe(&error))?;
        let (_, metadata) = SafeTensors::read_metadata(bytes).map_err(|error| describe(&error))?;
        let header = metadata
            .metadata()
            .as_ref()
            .and_then(|entries| entries.get(HEADER_KEY))
            .ok_or_else(|| format!("its metadata has no entry {HEADER_KEY:?}"))?;
        let header: Header =
            serde_json::from_str(header).map_err(|error| format!("its header: {error}"))?;
        if header.format != FORMAT {
            return Err(format!(
                "its format is {}, this program reads {FORMAT}",
                header.format
            ));
        }
        let mut views: Vec<(String, TensorView)> = file.tensors();
        views.sort_by(|a, b| a.0.cmp(&b.0));
        let found = format!("{:016x}", checksum(&header.state, &views)?);
        if found != header.checksum {
            return Err(format!(
                "its checksum is {found}, recorded is {}",
                header.checksum
            ));
        }
        let mut checkpoint = Checkpoint {
            state: header.state,
            model: HostTensors::new(),
            optimizer: HostTensors::new(),
        };
        for (name, view) in views {
            let tensor = host_tensor(&name, &view)?;
            if let Some(name) = name.strip_prefix("model.") {
                checkpoint.model.insert(name.to_owned(), tensor);
            } else if let Some(name) = name.strip_prefix("optimizer.") {
                checkpoint.optimizer.insert(name.to_owned(), tensor);
            } else {
                return Err(format!("it holds the unexpected tensor {name:?}"));
            }
        }
        Ok(checkpoint)
    }
}

fn describe(error: &safetensors::SafeTensorError) -> String {
    format!("not a whole safetensors file ({error})")
}

fn host_tensor(name: &str, view: &TensorView) -> std::result::Result<HostTensor, String> {
    if view.dtype() != Dtype::F32 {
        return Err(format!(
            "tensor {name} is {:?}, allowed is F32",
            view.dtype()
        ));
    }
    let values = view
        .data()
        .chunks_exact(4)
        .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
        .collect();
    Ok(HostTensor {
        shape: view.shape().to_vec(),
        values,
    })
}

fn as_bytes(values: &[f32]) -> &[u8] {
    // Only little-endian targets have the file's byte order in memory.
    const _: () = assert!(cfg!(target_endian = "little"));
    bytemuck::cast_slice(values)
}

/// A hash of all that a checkpoint means: state, names, shapes and values.
///
/// Each round is a bijection of the running value, so that two files that differ in one place
/// never agree.
fn checksum(state: &RunState, views: &[(String, TensorView)]) -> std::result::Result<u64, String> {
    let mut sorted: Vec<&(String, TensorView)> = views.iter().collect();
    sorted.sort_by(|a, b| a.0.cmp(&b.0));
    let state = serde_json::to_vec(state).map_err(|error| error.to_string())?;
    let mut hash = Hasher::new();
    hash.bytes(&state);
    for (name, view) in sorted {
        hash.bytes(name.as_bytes());
        hash.bytes(format!("{:?}", view.dtype()).as_bytes());
        hash.word(view.shape().len() as u64);
        for dim in view.shape() {
            hash.word(*dim as u64);
        }
        hash.bytes(view.data());
    }
    Ok(hash.0)
}

struct Hasher(u64);

impl Hasher {
    fn new() -> Self {
        Hasher(0xcbf2_9ce4_8422_2325)
    }

    /// FNV-1a on words, with a shift so that high bits reach low ones.
    fn word(&mut self, word: u64) {
        let mixed = (self.0 ^ word).wrapping_mul(0x0000_0100_0000_01b3);
        self.0 = mixed ^ (mixed >> 29);
    }

    fn bytes(&mut self, bytes: &[u8]) {
        self.word(bytes.len() as u64);
        let mut words = bytes.chunks_exact(8);
        for word in &mut words {
            let mut buffer = [0; 8];
            buffer.copy_from_slice(word);
            self.word(u64::from_le_bytes(buffer));
        }
        let mut rest = [0; 8];
        rest[..words.remainder().len()].copy_from_slice(words.remainder());
        self.word(u64::from_le_bytes(rest));
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
    use rand::{RngExt, SeedableRng};

    use super::*;

    fn sample() -> Checkpoint {
        let tensor = |shape: &[usize], offset: f32| HostTensor {
            shape: shape.to_vec(),
            values: (0..shape.iter().product::<usize>())
                .map(|i| i as f32 * 0.37 - offset)
                .collect(),
        };
        let model = HostTensors::from([
            ("blocks.0.weight".to_owned(), tensor(&[5, 7], 3.0)),
            ("blocks.0.bias".to_owned(), tensor(&[7], 0.5)),
            ("scale".to_owned(), tensor(&[1], 9.0)),
        ]);
        let optimizer = HostTensors::from([("m.scale".to_owned(), tensor(&[1], 2.0))]);
        let state = RunState {
            name: "digits".to_owned(),
            step: 41,
            epoch: 3,
            batch: 5,
            ce_sum_bits: 1.5f32.to_bits(),
            aux_sum_bits: 0.25f32.to_bits(),
            best_top1: Some(97.25),
            metrics_bytes: 1234,
            backend: BackendKind::Wgpu,
            seed: 7,
            config: "[train]\nlr = 0.001\n".to_owned(),
            class_names: vec!["zero".to_owned(), "eins \u{00e4}".to_owned()],
        };
        Checkpoint {
            state,
            model,
            optimizer,
        }
    }

    #[test]
    fn survives_a_round_trip_through_a_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("last.safetensors");
        sample().save(&path).unwrap();
        sample().save(&path).unwrap();
        assert_eq!(Checkpoint::load(&path).unwrap(), sample());
        let left: Vec<_> = fs::read_dir(directory.path()).unwrap().collect();
        assert_eq!(left.len(), 1, "temporary files stay behind: {left:?}");
    }

    #[test]
    fn same_content_gives_the_same_bytes() {
        assert_eq!(sample().to_bytes().unwrap(), sample().to_bytes().unwrap());
    }

    #[test]
    fn every_flipped_bit_is_noticed() {
        let bytes = sample().to_bytes().unwrap();
        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            // A flip may turn one spelling of a value into another of the same value.
            if let Ok(read) = Checkpoint::from_bytes(&damaged) {
                assert_eq!(read, sample(), "bit {bit}");
            }
        }
    }

    #[test]
    fn every_truncation_and_extension_is_refused() {
        let bytes = sample().to_bytes().unwrap();
        for length in 0..bytes.len() {
            assert!(
                Checkpoint::from_bytes(&bytes[..length]).is_err(),
                "{length}"
            );
        }
        let longer = [bytes, vec![0; 3]].concat();
        assert!(Checkpoint::from_bytes(&longer).is_err());
    }

    #[test]
    fn random_bytes_are_refused() {
        let mut rng = rand::rngs::StdRng::seed_from_u64(5);
        for length in [0, 1, 7, 8, 9, 100, 4096] {
            let bytes: Vec<u8> = (0..length).map(|_| rng.random()).collect();
            assert!(Checkpoint::from_bytes(&bytes).is_err());
        }
    }
}
