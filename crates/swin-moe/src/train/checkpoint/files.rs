//! The files of a checkpoint: one for each rank that saved it, and a manifest, written last.
//!
//! `rank-NNNN.safetensors` holds that rank's slices of the experts and of their moments, rank 0's
//! also everything that all ranks have. `manifest.jsonl` has two lines: what the files are, their
//! lengths and CRC-32s, how tensors were cut, and where the run stands; then the first line's own
//! CRC-32. No bit of any of them can change unnoticed.

use std::borrow::Cow;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde::{Deserialize, Serialize};

use super::{Checkpoint, RunState};
use crate::train::error::{Result, TrainError};
use crate::train::params::{HostTensor, HostTensors};
use crate::train::ranks::{Cut, Cuts};

/// Version of the layout described here.
const FORMAT: u32 = 2;
const MANIFEST: &str = "manifest.jsonl";

/// Length and checksum of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::train) struct Seal {
    pub bytes: u64,
    pub crc32: u32,
}

impl Seal {
    fn of(bytes: &[u8]) -> Self {
        Seal {
            bytes: bytes.len() as u64,
            crc32: crc32fast::hash(bytes),
        }
    }

    fn check(self, name: &str, bytes: &[u8]) -> std::result::Result<(), String> {
        let found = Seal::of(bytes);
        if found.bytes != self.bytes {
            return Err(format!(
                "{name} has {} bytes, written were {}",
                found.bytes, self.bytes
            ));
        }
        if found.crc32 != self.crc32 {
            return Err(format!(
                "{name} has the checksum {:08x}, written was {:08x}",
                found.crc32, self.crc32
            ));
        }
        Ok(())
    }
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Manifest<'a> {
    format: u32,
    files: Vec<Seal>,
    cuts: Cow<'a, Cuts>,
    state: Cow<'a, RunState>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ManifestSeal {
    crc32: u32,
}

fn file_name(rank: usize) -> String {
    format!("rank-{rank:04}.safetensors")
}

/// Writes one rank's file: `keep` says which tensors are its own to write.
pub(in crate::train) fn write_part(
    directory: &Path,
    rank: usize,
    model: &HostTensors,
    optimizer: &HostTensors,
    keep: impl Fn(&str) -> bool,
) -> Result<Seal> {
    let path = directory.join(file_name(rank));
    let groups = [("model", model), ("optimizer", optimizer)];
    let mut views = Vec::new();
    for (group, tensors) in groups {
        for (name, tensor) in tensors {
            if tensor.values.is_empty() || !keep(parameter(group, name)) {
                continue;
            }
            let bytes = as_bytes(&tensor.values);
            let view = TensorView::new(Dtype::F32, tensor.shape.clone(), bytes);
            views.push((
                format!("{group}.{name}"),
                view.map_err(|e| defect(&path, e))?,
            ));
        }
    }
    let bytes = safetensors::serialize(views, None).map_err(|e| defect(&path, e))?;
    write_durably(&path, &bytes)?;
    Ok(Seal::of(&bytes))
}

/// Writes the manifest, which makes the files a checkpoint.
pub(in crate::train) fn write_manifest(
    directory: &Path,
    files: Vec<Seal>,
    cuts: &Cuts,
    state: &RunState,
) -> Result<()> {
    let path = directory.join(MANIFEST);
    let manifest = Manifest {
        format: FORMAT,
        files,
        cuts: Cow::Borrowed(cuts),
        state: Cow::Borrowed(state),
    };
    let mut text = serde_json::to_vec(&manifest).map_err(|e| defect(&path, e))?;
    let seal = ManifestSeal {
        crc32: crc32fast::hash(&text),
    };
    text.push(b'\n');
    text.extend(serde_json::to_vec(&seal).map_err(|e| defect(&path, e))?);
    text.push(b'\n');
    write_durably(&path, &text)?;
    sync_directory(directory)
}

/// Reads a checkpoint and checks every byte of it.
pub(super) fn read(directory: &Path) -> std::result::Result<Checkpoint, ReadError> {
    let manifest_path = directory.join(MANIFEST);
    let text = fs::read(&manifest_path).map_err(|e| ReadError::Io(manifest_path, e))?;
    let manifest = parse_manifest(&text)?;
    let world_size = manifest.files.len();
    manifest.cuts.check(world_size)?;
    let mut parts: Vec<HostTensors> = Vec::with_capacity(world_size);
    for (rank, seal) in manifest.files.iter().enumerate() {
        let name = file_name(rank);
        let path = directory.join(&name);
        let bytes = fs::read(&path).map_err(|e| ReadError::Io(path, e))?;
        seal.check(&name, &bytes)?;
        parts.push(tensors(&name, &bytes)?);
    }
    let mut checkpoint = Checkpoint {
        state: manifest.state.into_owned(),
        model: HostTensors::new(),
        optimizer: HostTensors::new(),
    };
    for (name, tensor) in join(parts, &manifest.cuts)? {
        let (group, name) = name.split_once('.').unwrap_or(("", &name));
        let tensors = match group {
            "model" => &mut checkpoint.model,
            "optimizer" => &mut checkpoint.optimizer,
            _ => return Err(format!("it holds the unexpected tensor {name:?}").into()),
        };
        tensors.insert(name.to_owned(), tensor);
    }
    Ok(checkpoint)
}

/// Why a checkpoint cannot be read.
pub(super) enum ReadError {
    Io(PathBuf, io::Error),
    Damaged(String),
}

impl From<String> for ReadError {
    fn from(reason: String) -> Self {
        ReadError::Damaged(reason)
    }
}

fn parse_manifest(text: &[u8]) -> std::result::Result<Manifest<'static>, String> {
    let mut lines = text.split(|&byte| byte == b'\n');
    let (Some(content), Some(seal), Some(b""), None) =
        (lines.next(), lines.next(), lines.next(), lines.next())
    else {
        return Err(format!("{MANIFEST} is not whole"));
    };
    let sealed = |error: serde_json::Error| format!("{MANIFEST}'s second line: {error}");
    let seal: ManifestSeal = serde_json::from_slice(seal).map_err(sealed)?;
    let found = crc32fast::hash(content);
    if found != seal.crc32 {
        return Err(format!(
            "{MANIFEST} has the checksum {found:08x}, written was {:08x}",
            seal.crc32
        ));
    }
    let manifest: Manifest<'static> =
        serde_json::from_slice(content).map_err(|error| format!("{MANIFEST}: {error}"))?;
    if manifest.format != FORMAT {
        return Err(format!(
            "its format is {}, this program reads {FORMAT}",
            manifest.format
        ));
    }
    Ok(manifest)
}

/// A file's tensors by name.
fn tensors(file: &str, bytes: &[u8]) -> std::result::Result<HostTensors, String> {
    let read = SafeTensors::deserialize(bytes)
        .map_err(|error| format!("{file} is not a whole safetensors file ({error})"))?;
    let mut tensors = HostTensors::new();
    for (name, view) in read.tensors() {
        if view.dtype() != Dtype::F32 {
            let dtype = view.dtype();
            return Err(format!("{file}: {name} is {dtype:?}, allowed is F32"));
        }
        let values = view
            .data()
            .chunks_exact(4)
            .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
            .collect();
        let shape = view.shape().to_vec();
        tensors.insert(name, HostTensor { shape, values });
    }
    Ok(tensors)
}

/// Whole tensors from all ranks' parts.
fn join(mut parts: Vec<HostTensors>, cuts: &Cuts) -> std::result::Result<HostTensors, String> {
    let mut whole = HostTensors::new();
    for rank in 0..parts.len() {
        while let Some((name, tensor)) = parts[rank].pop_first() {
            let tensor = match cut_of(&name, cuts) {
                None => tensor,
                // Ranks in front of this one have empty slices.
                Some(cut) => {
                    let mut slices = tensor.values;
                    for part in &mut parts[rank + 1..] {
                        slices.extend(part.remove(&name).into_iter().flat_map(|t| t.values));
                    }
                    if slices.len() != cut.shape.iter().product::<usize>() {
                        return Err(format!("slices of {name} do not make up the whole"));
                    }
                    cut.join(&slices)
                }
            };
            if whole.insert(name.clone(), tensor).is_some() {
                return Err(format!("{name} is there twice"));
            }
        }
    }
    Ok(whole)
}

/// How the tensor `group.name` was cut.
fn cut_of<'a>(name: &str, cuts: &'a Cuts) -> Option<&'a Cut> {
    let (group, name) = name.split_once('.')?;
    cuts.get(parameter(group, name))
}

/// The parameter that a tensor belongs to: moments are named `kind.parameter`.
fn parameter<'a>(group: &str, name: &'a str) -> &'a str {
    match (group, name.split_once('.')) {
        ("optimizer", Some((_, parameter))) => parameter,
        _ => name,
    }
}

fn as_bytes(values: &[f32]) -> &[u8] {
    // Only little-endian targets have the file's byte order in memory.
    const _: () = assert!(cfg!(target_endian = "little"));
    bytemuck::cast_slice(values)
}

fn defect(path: &Path, error: impl std::fmt::Display) -> TrainError {
    TrainError::Checkpoint {
        path: path.to_path_buf(),
        reason: error.to_string(),
        remedy: "this is a bug, please report it",
    }
}

fn write_durably(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = File::create(path).map_err(TrainError::io("create", path))?;
    file.write_all(bytes)
        .and_then(|()| file.sync_all())
        .map_err(TrainError::io("write", path))
}

/// Names are on disk once their directory is. Not every system can open a directory.
pub(in crate::train) fn sync_directory(path: &Path) -> Result<()> {
    match File::open(path) {
        Ok(directory) => directory
            .sync_all()
            .map_err(TrainError::io("synchronise the directory", path)),
        Err(_) => Ok(()),
    }
}
