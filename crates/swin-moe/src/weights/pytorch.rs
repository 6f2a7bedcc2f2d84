//! PyTorch files.
use super::error::WeightsError;
use super::tensors::TensorMap;
use std::path::Path;
pub(super) fn read(path: &Path) -> Result<TensorMap, WeightsError> {
    Err(WeightsError::Extension {
        path: path.to_path_buf(),
    })
}
