//! What an import found.

use core::fmt;

use serde::Serialize;

/// A tensor that is there, but of another shape or kind.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ShapeMismatch {
    /// The tensor's published name.
    pub name: String,
    /// Shape that the model has, in the published layout.
    pub expected: Vec<usize>,
    /// Shape that the file has.
    pub got: Vec<usize>,
    /// Element type in the file, if it is not a float.
    pub dtype: Option<String>,
}

/// Every tensor that did not simply fit.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct ImportReport {
    /// Number of parameters set from the file.
    pub loaded: usize,
    /// Parameters of the model that the file lacks.
    pub missing: Vec<String>,
    /// Tensors of the file that the model lacks.
    pub unexpected: Vec<String>,
    /// Tensors of another shape, or that are not floats.
    pub mismatched: Vec<ShapeMismatch>,
    /// Tables of the published model that follow from the configuration, and were not read.
    pub buffers: Vec<String>,
}

impl ImportReport {
    /// Whether the file has exactly the model's parameters.
    pub fn is_exact(&self) -> bool {
        self.missing.is_empty() && self.unexpected.is_empty() && self.mismatched.is_empty()
    }
}

impl fmt::Display for ImportReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} parameters loaded, {} missing, {} unexpected, {} mis-shaped, {} buffers recognised",
            self.loaded,
            self.missing.len(),
            self.unexpected.len(),
            self.mismatched.len(),
            self.buffers.len()
        )?;
        for name in &self.missing {
            write!(f, "\n  missing     {name}")?;
        }
        for name in &self.unexpected {
            write!(f, "\n  unexpected  {name}")?;
        }
        for ShapeMismatch {
            name,
            expected,
            got,
            dtype,
        } in &self.mismatched
        {
            write!(f, "\n  mis-shaped  {name}: file {got:?}")?;
            if let Some(dtype) = dtype {
                write!(f, " of {dtype}")?;
            }
            write!(f, ", model {expected:?}")?;
        }
        Ok(())
    }
}
