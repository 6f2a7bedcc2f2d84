//! PyTorch checkpoints: a zip archive with one pickle and one file per storage.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;

use zip::ZipArchive;

use super::error::WeightsError;
use super::pickle::{Object, Ref, StridedTensor, Unpickled, unpickle};
use super::tensors::{Element, HostTensor, TensorMap, Values};

/// Where training scripts keep the state dictionary, if the root is not one.
const STATE_KEYS: [&str; 4] = ["model", "state_dict", "model_state_dict", "module"];

/// A pickle of names and shapes; the largest published one has 100 KB.
const MAX_PICKLE_BYTES: u64 = 1 << 28;

/// Tensors may share storages; together they take at most this many times the file's size.
const MAX_SHARING: u64 = 8;

type Archive = ZipArchive<BufReader<File>>;

/// Reads all tensors of a checkpoint's state dictionary.
pub(super) fn read(path: &Path) -> Result<TensorMap, WeightsError> {
    let file = File::open(path).map_err(WeightsError::io(path))?;
    let file_bytes = file.metadata().map_err(WeightsError::io(path))?.len();
    let mut archive = ZipArchive::new(BufReader::new(file)).map_err(|e| WeightsError::Format {
        path: path.to_path_buf(),
        reason: e.to_string(),
        remedy: "save it with PyTorch 1.6 or later (a zip archive), and fetch it whole",
    })?;
    read_archive(&mut archive, file_bytes).map_err(|reason| WeightsError::format(path, reason))
}

fn read_archive(archive: &mut Archive, file_bytes: u64) -> Result<TensorMap, String> {
    let prefix = archive
        .file_names()
        .find_map(|name| name.strip_suffix("data.pkl"))
        .ok_or("the archive has no data.pkl")?
        .to_string();
    // PyTorch has written this since 2.1; before, files were little-endian in practice.
    let order = format!("{prefix}byteorder");
    if archive.index_for_name(&order).is_some() && entry(archive, &order, 16)? == b"big" {
        return Err("its numbers are big-endian, allowed are little-endian ones".into());
    }
    let pickle = entry(archive, &format!("{prefix}data.pkl"), MAX_PICKLE_BYTES)?;
    let unpickled = unpickle(&pickle)?;
    let mut reader = Storages {
        archive,
        prefix,
        cache: HashMap::new(),
        bytes_left: file_bytes.saturating_mul(MAX_SHARING),
    };
    state_entries(&unpickled)?
        .into_iter()
        .map(|(name, tensor)| {
            let tensor = reader
                .tensor(tensor)
                .map_err(|reason| format!("{name}: {reason}"))?;
            Ok((name, tensor))
        })
        .collect()
}

/// An entry of the archive, whose checksum is verified.
fn entry(archive: &mut Archive, name: &str, max_bytes: u64) -> Result<Vec<u8>, String> {
    let failed = |e: &dyn std::fmt::Display| format!("{name}: {e}");
    let file = archive.by_name(name).map_err(|e| failed(&e))?;
    let mut bytes = Vec::new();
    file.take(max_bytes.saturating_add(1))
        .read_to_end(&mut bytes)
        .map_err(|e| failed(&e))?;
    if bytes.len() as u64 > max_bytes {
        return Err(failed(&format!("larger than {max_bytes} bytes")));
    }
    Ok(bytes)
}

/// The named tensors of the state dictionary.
fn state_entries(pickle: &Unpickled) -> Result<Vec<(String, &StridedTensor)>, String> {
    let state = state_dict(pickle).ok_or("its root is not a dictionary")?;
    let Object::Dict(entries) = pickle.get(state) else {
        return Err("its state dictionary is not a dictionary".into());
    };
    Ok(entries
        .iter()
        .filter_map(|&(key, value)| match (pickle.get(key), pickle.get(value)) {
            (Object::Str(name), Object::Tensor(tensor)) => Some((name.clone(), tensor)),
            _ => None,
        })
        .collect())
}

fn state_dict(pickle: &Unpickled) -> Option<Ref> {
    let is_dict = |object: &Ref| matches!(pickle.get(*object), Object::Dict(_));
    STATE_KEYS
        .iter()
        .find_map(|key| pickle.entry(pickle.root, key).filter(is_dict))
        .or(Some(pickle.root).filter(is_dict))
}

/// The archive's storages; those that several tensors share are read once.
struct Storages<'a> {
    archive: &'a mut Archive,
    prefix: String,
    cache: HashMap<String, Vec<u8>>,
    /// What further tensors may take, in bytes of the file's types.
    bytes_left: u64,
}

impl Storages<'_> {
    fn tensor(&mut self, tensor: &StridedTensor) -> Result<HostTensor, String> {
        let storage = &tensor.storage;
        if !self.cache.contains_key(&storage.key) {
            // Large models have many storages, of which few are shared: keep the last only.
            self.cache.clear();
            let name = format!("{}data/{}", self.prefix, storage.key);
            let bytes = entry(self.archive, &name, u64::MAX)?;
            self.cache.insert(storage.key.clone(), bytes);
        }
        let bytes = self.cache.get(&storage.key).map_or(&[][..], Vec::as_slice);
        let elements = tensor.shape.iter().map(|&d| d as u64);
        let taken = elements.fold(storage.element.size() as u64, u64::saturating_mul);
        self.bytes_left = self
            .bytes_left
            .checked_sub(taken)
            .ok_or("its tensors are many times larger than the file")?;
        Ok(HostTensor {
            shape: tensor.shape.clone(),
            values: gather(tensor, bytes)?,
        })
    }
}

/// The elements of a view, row-major.
fn gather(tensor: &StridedTensor, bytes: &[u8]) -> Result<Values, String> {
    let StridedTensor {
        storage,
        offset,
        shape,
        strides,
    } = tensor;
    let size = storage.element.size();
    let available = bytes.len() / size;
    let too_small = || {
        format!(
            "its storage has {available} elements, too few for shape {shape:?} at offset {offset}"
        )
    };
    // Elements of the view, and the last one's place, without overflow.
    let count = shape
        .iter()
        .try_fold(1usize, |n, &d| n.checked_mul(d))
        .ok_or_else(too_small)?;
    if count == 0 {
        return Ok(storage.element.decode(&[]));
    }
    let last = shape
        .iter()
        .zip(strides)
        .try_fold(*offset, |last, (&d, &s)| {
            last.checked_add(s.checked_mul(d - 1)?)
        })
        .ok_or_else(too_small)?;
    if last >= available || count > available {
        return Err(too_small());
    }
    if is_contiguous(shape, strides) {
        return Ok(storage
            .element
            .decode(&bytes[offset * size..(offset + count) * size]));
    }
    Ok(storage.element.decode(&strided(tensor, bytes, count)))
}

fn is_contiguous(shape: &[usize], strides: &[usize]) -> bool {
    let mut expected = 1;
    shape.iter().zip(strides).rev().all(|(&d, &s)| {
        let fits = d == 1 || s == expected;
        expected *= d;
        fits
    })
}

/// Copies a view whose bounds are checked.
fn strided(tensor: &StridedTensor, bytes: &[u8], count: usize) -> Vec<u8> {
    let size = Element::size(tensor.storage.element);
    let mut out = Vec::with_capacity(count * size);
    let mut index = vec![0; tensor.shape.len()];
    for _ in 0..count {
        let place = index
            .iter()
            .zip(&tensor.strides)
            .map(|(i, s)| i * s)
            .sum::<usize>();
        let at = (tensor.offset + place) * size;
        out.extend_from_slice(&bytes[at..at + size]);
        for (i, &d) in index.iter_mut().zip(&tensor.shape).rev() {
            *i += 1;
            if *i < d {
                break;
            }
            *i = 0;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::super::pickle::Storage;
    use super::*;

    fn view(offset: usize, shape: &[usize], strides: &[usize]) -> Result<Values, String> {
        let bytes: Vec<u8> = (0..12).collect();
        let tensor = StridedTensor {
            storage: Storage {
                element: Element::U8,
                key: String::new(),
            },
            offset,
            shape: shape.to_vec(),
            strides: strides.to_vec(),
        };
        gather(&tensor, &bytes)
    }

    #[test]
    fn views_are_gathered_row_major() {
        assert_eq!(
            view(2, &[2, 3], &[3, 1]),
            Ok(Values::Int(vec![2, 3, 4, 5, 6, 7]))
        );
        assert_eq!(
            view(0, &[3, 2], &[1, 3]),
            Ok(Values::Int(vec![0, 3, 1, 4, 2, 5]))
        );
        assert_eq!(view(5, &[], &[]), Ok(Values::Int(vec![5])));
        assert_eq!(view(99, &[0, 3], &[3, 1]), Ok(Values::Int(vec![])));
    }

    #[test]
    fn views_outside_their_storage_are_refused() {
        for (offset, shape, strides) in [
            (12, &[1][..], &[1][..]),
            (0, &[13], &[1]),
            (7, &[2, 3], &[3, 1]),
            (usize::MAX, &[2], &[usize::MAX]),
            (0, &[usize::MAX, usize::MAX], &[1, 1]),
            (0, &[1 << 40], &[0]),
        ] {
            let error = view(offset, shape, strides).unwrap_err();
            assert!(error.contains("too few"), "{error}");
        }
    }
}
