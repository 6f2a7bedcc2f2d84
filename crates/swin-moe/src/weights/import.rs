//! Setting a model's parameters from published tensors.

use std::path::Path;

use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::backend::Backend;
use burn::tensor::{Tensor, TensorData};
use hexa_ops::ExpertOps;

use super::error::WeightsError;
use super::names::{Names, is_buffer};
use super::params::Walk;
use super::report::{ImportReport, ShapeMismatch};
use super::tensors::{HostTensor, TensorMap, Values, read_file};
use crate::model::SwinMoe;

/// How much an import forgives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ImportOptions {
    /// Keep the model's own values where the file has none that fit, rather than failing.
    pub allow_partial: bool,
}

/// Sets the parameters from a checkpoint file.
///
/// # Errors
/// [`WeightsError`] if the file cannot be read, or, unless `allow_partial`, does not have
/// exactly the model's parameters.
pub fn import_file<B: ExpertOps>(
    model: SwinMoe<B>,
    path: &Path,
    options: ImportOptions,
) -> Result<(SwinMoe<B>, ImportReport), WeightsError> {
    let (model, report) = import_tensors(model, read_file(path)?);
    if report.is_exact() || options.allow_partial {
        return Ok((model, report));
    }
    Err(WeightsError::Mismatch {
        path: path.to_path_buf(),
        report: Box::new(report),
    })
}

/// Sets all parameters for which there is a tensor that fits.
pub fn import_tensors<B: ExpertOps>(
    model: SwinMoe<B>,
    tensors: TensorMap,
) -> (SwinMoe<B>, ImportReport) {
    let mut import = Import {
        walk: Walk::new(Names::new(model.config())),
        tensors,
        report: ImportReport::default(),
    };
    let model = model.map(&mut import);
    let Import {
        tensors,
        mut report,
        ..
    } = import;
    (report.buffers, report.unexpected) = tensors.into_keys().partition(|name| is_buffer(name));
    (model, report)
}

struct Import {
    walk: Walk,
    tensors: TensorMap,
    report: ImportReport,
}

impl Import {
    /// The values for a parameter of this shape, in our layout.
    fn take(&mut self, ours: &[usize]) -> Option<Vec<f32>> {
        let published = self.walk.published();
        let Some(HostTensor { shape, values }) = self.tensors.remove(&published.name) else {
            self.report.missing.push(published.name);
            return None;
        };
        let expected = published.layout.published_shape(ours);
        match values {
            Values::Float(values) if shape == expected => {
                self.report.loaded += 1;
                Some(published.layout.to_ours(ours, values))
            }
            other => {
                self.report.mismatched.push(ShapeMismatch {
                    name: published.name,
                    expected,
                    got: shape,
                    dtype: matches!(other, Values::Int(_)).then(|| "integers".to_string()),
                });
                None
            }
        }
    }
}

impl<B: Backend> ModuleMapper<B> for Import {
    fn enter_module(&mut self, name: &str, container_type: &str) {
        self.walk.enter(name, container_type);
    }

    fn exit_module(&mut self, _name: &str, container_type: &str) {
        self.walk.exit(container_type);
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        let shape = param.lazy_shape().to_vec();
        let Some(values) = self.take(&shape) else {
            return param;
        };
        param.map(|old| {
            let data = TensorData::new(values, shape).convert_dtype(old.dtype());
            Tensor::from_data(data, (&old.device(), old.dtype()))
                .set_require_grad(old.is_require_grad())
        })
    }
}
