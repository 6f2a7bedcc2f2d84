//! Named tensors on the host, and their files.

use std::collections::BTreeMap;
use std::path::Path;

use safetensors::tensor::{Dtype, SafeTensors, TensorView};

use super::error::WeightsError;
use super::pytorch;

/// A tensor's elements, widened to the host's types.
#[derive(Debug, Clone, PartialEq)]
pub enum Values {
    /// f64, f32, f16 or bf16 in the file.
    Float(Vec<f32>),
    /// Any integer in the file.
    Int(Vec<i64>),
}

/// A tensor on the host, row-major.
#[derive(Debug, Clone, PartialEq)]
pub struct HostTensor {
    /// Its shape; empty for a scalar.
    pub shape: Vec<usize>,
    /// Its elements.
    pub values: Values,
}

/// Tensors by name.
pub type TensorMap = BTreeMap<String, HostTensor>;

impl HostTensor {
    /// A float tensor.
    pub fn float(shape: impl Into<Vec<usize>>, values: Vec<f32>) -> Self {
        Self {
            shape: shape.into(),
            values: Values::Float(values),
        }
    }

    /// An integer tensor.
    pub fn int(shape: impl Into<Vec<usize>>, values: Vec<i64>) -> Self {
        Self {
            shape: shape.into(),
            values: Values::Int(values),
        }
    }

    /// The elements, if they are floats.
    pub fn as_floats(&self) -> Option<&[f32]> {
        match &self.values {
            Values::Float(values) => Some(values),
            Values::Int(_) => None,
        }
    }

    /// The elements, if they are integers.
    pub fn as_ints(&self) -> Option<&[i64]> {
        match &self.values {
            Values::Int(values) => Some(values),
            Values::Float(_) => None,
        }
    }
}

/// Element types that checkpoints contain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Element {
    F64,
    F32,
    F16,
    Bf16,
    I64,
    I32,
    I16,
    I8,
    U8,
    Bool,
}

impl Element {
    /// Bytes of one element.
    pub(super) fn size(self) -> usize {
        match self {
            Element::F64 | Element::I64 => 8,
            Element::F32 | Element::I32 => 4,
            Element::F16 | Element::Bf16 | Element::I16 => 2,
            Element::I8 | Element::U8 | Element::Bool => 1,
        }
    }

    /// Little-endian bytes, whole elements, to values.
    pub(super) fn decode(self, bytes: &[u8]) -> Values {
        fn each<const N: usize, T>(bytes: &[u8], f: impl Fn([u8; N]) -> T) -> Vec<T> {
            bytes.as_chunks::<N>().0.iter().map(|&b| f(b)).collect()
        }
        match self {
            Element::F64 => Values::Float(each(bytes, |b| f64::from_le_bytes(b) as f32)),
            Element::F32 => Values::Float(each(bytes, f32::from_le_bytes)),
            Element::F16 => Values::Float(each(bytes, |b| half::f16::from_le_bytes(b).to_f32())),
            Element::Bf16 => Values::Float(each(bytes, |b| half::bf16::from_le_bytes(b).to_f32())),
            Element::I64 => Values::Int(each(bytes, i64::from_le_bytes)),
            Element::I32 => Values::Int(each(bytes, |b| i32::from_le_bytes(b).into())),
            Element::I16 => Values::Int(each(bytes, |b| i16::from_le_bytes(b).into())),
            Element::I8 => Values::Int(each(bytes, |b| i8::from_le_bytes(b).into())),
            Element::U8 | Element::Bool => Values::Int(each(bytes, |[b]| b.into())),
        }
    }
}

/// Reads a checkpoint; its format follows from the file's extension.
///
/// # Errors
/// [`WeightsError`] if the file cannot be read or is damaged.
pub fn read_file(path: &Path) -> Result<TensorMap, WeightsError> {
    let extension = path
        .extension()
        .and_then(|e| e.to_str())
        .map(str::to_ascii_lowercase);
    match extension.as_deref() {
        Some("safetensors") => read_safetensors(path),
        Some("pth" | "pt" | "bin") => pytorch::read(path),
        _ => Err(WeightsError::Extension {
            path: path.to_path_buf(),
        }),
    }
}

/// Reads all tensors of a safetensors file.
///
/// # Errors
/// [`WeightsError`] if the file cannot be read, is damaged, or has element types that no
/// checkpoint of the model has.
pub fn read_safetensors(path: &Path) -> Result<TensorMap, WeightsError> {
    let bytes = std::fs::read(path).map_err(WeightsError::io(path))?;
    let file = SafeTensors::deserialize(&bytes).map_err(|e| WeightsError::format(path, e))?;
    file.iter()
        .map(|(name, view)| {
            let element = element_of(view.dtype()).ok_or_else(|| {
                WeightsError::format(
                    path,
                    format!("{name} has element type {:?}, allowed are f16, bf16, f32, f64 and integers", view.dtype()),
                )
            })?;
            let tensor = HostTensor {
                shape: view.shape().to_vec(),
                values: element.decode(view.data()),
            };
            Ok((name.to_string(), tensor))
        })
        .collect()
}

fn element_of(dtype: Dtype) -> Option<Element> {
    Some(match dtype {
        Dtype::F64 => Element::F64,
        Dtype::F32 => Element::F32,
        Dtype::F16 => Element::F16,
        Dtype::BF16 => Element::Bf16,
        Dtype::I64 => Element::I64,
        Dtype::I32 => Element::I32,
        Dtype::I16 => Element::I16,
        Dtype::I8 => Element::I8,
        Dtype::U8 => Element::U8,
        Dtype::BOOL => Element::Bool,
        _ => return None,
    })
}

/// Writes tensors as f32 and i64. The file appears whole or not at all.
///
/// # Errors
/// [`WeightsError`] if the file cannot be written.
pub fn write_safetensors(path: &Path, tensors: &TensorMap) -> Result<(), WeightsError> {
    let encoded: Vec<(&str, Dtype, &[usize], Vec<u8>)> = tensors
        .iter()
        .map(|(name, tensor)| {
            let (dtype, bytes) = match &tensor.values {
                Values::Float(v) => (Dtype::F32, v.iter().flat_map(|x| x.to_le_bytes()).collect()),
                Values::Int(v) => (Dtype::I64, v.iter().flat_map(|x| x.to_le_bytes()).collect()),
            };
            (name.as_str(), dtype, tensor.shape.as_slice(), bytes)
        })
        .collect();
    let views = encoded
        .iter()
        .map(|(name, dtype, shape, bytes)| {
            TensorView::new(*dtype, shape.to_vec(), bytes).map(|view| (*name, view))
        })
        .collect::<Result<Vec<_>, _>>()
        .map_err(|e| WeightsError::format(path, e))?;
    let bytes = safetensors::serialize(views, None).map_err(|e| WeightsError::format(path, e))?;
    write_atomically(path, &bytes).map_err(WeightsError::io(path))
}

fn write_atomically(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    use std::io::Write;
    let folder = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let mut file = tempfile::NamedTempFile::new_in(folder)?;
    file.write_all(bytes)?;
    file.as_file().sync_all()?;
    file.persist(path).map_err(|e| e.error)?;
    Ok(())
}
