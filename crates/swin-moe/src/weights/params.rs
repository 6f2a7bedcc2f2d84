//! Walking the parameters under their published names.

use burn::module::{Module, ModuleVisitor, Param, ParamId};
use burn::tensor::backend::{AutodiffBackend, Backend};
use burn::tensor::{Tensor, TensorData};

use super::error::WeightsError;
use super::names::{Names, Published};
use super::tensors::{HostTensor, TensorMap};
use crate::model::SwinMoe;

/// A parameter and what it is called in the published model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamedParam {
    /// The published name, such as `layers.0.blocks.1.attn.qkv.weight`.
    pub name: String,
    /// Burn's identifier, by which gradients and optimizer states are found.
    pub id: ParamId,
    /// Our shape, which may be the transpose of the published one.
    pub shape: Vec<usize>,
    /// Whether it is trained.
    pub trained: bool,
}

/// Where a walk through the module tree is.
pub(super) struct Walk {
    names: Names,
    path: Vec<String>,
}

impl Walk {
    pub(super) fn new(names: Names) -> Self {
        Self {
            names,
            path: Vec::new(),
        }
    }

    pub(super) fn enter(&mut self, name: &str, container: &str) {
        if !is_enum(container) {
            self.path.push(name.to_string());
        }
    }

    pub(super) fn exit(&mut self, container: &str) {
        if !is_enum(container) {
            self.path.pop();
        }
    }

    pub(super) fn published(&self) -> Published {
        self.names.published(&self.path)
    }
}

/// The variant of an enum is not part of a published name.
fn is_enum(container: &str) -> bool {
    container.starts_with("Enum:")
}

/// All parameters, in the order of the module tree.
pub fn named_parameters<B: Backend>(model: &SwinMoe<B>, names: Names) -> Vec<NamedParam> {
    struct Collect {
        walk: Walk,
        params: Vec<NamedParam>,
    }
    impl<B: Backend> ModuleVisitor<B> for Collect {
        fn enter_module(&mut self, name: &str, container_type: &str) {
            self.walk.enter(name, container_type);
        }
        fn exit_module(&mut self, _name: &str, container_type: &str) {
            self.walk.exit(container_type);
        }
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
            self.params.push(NamedParam {
                name: self.walk.published().name,
                id: param.id,
                shape: param.lazy_shape().to_vec(),
                trained: param.is_require_grad(),
            });
        }
    }
    let mut collect = Collect {
        walk: Walk::new(names),
        params: Vec::new(),
    };
    model.visit(&mut collect);
    collect.params
}

/// All parameters' values, in the published layout.
pub(super) fn parameter_values<B: Backend>(
    model: &SwinMoe<B>,
    names: Names,
) -> Result<TensorMap, WeightsError> {
    struct Read {
        walk: Walk,
        out: Result<TensorMap, WeightsError>,
    }
    impl<B: Backend> ModuleVisitor<B> for Read {
        fn enter_module(&mut self, name: &str, container_type: &str) {
            self.walk.enter(name, container_type);
        }
        fn exit_module(&mut self, _name: &str, container_type: &str) {
            self.walk.exit(container_type);
        }
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
            insert(&mut self.out, self.walk.published(), &param.val());
        }
    }
    let mut read = Read {
        walk: Walk::new(names),
        out: Ok(TensorMap::new()),
    };
    model.visit(&mut read);
    read.out
}

/// The gradients of all trained parameters that have one, in the published layout.
///
/// # Errors
/// [`WeightsError::Device`] if the back-end fails.
pub fn named_gradients<B: AutodiffBackend>(
    model: &SwinMoe<B>,
    gradients: &B::Gradients,
    names: Names,
) -> Result<TensorMap, WeightsError> {
    struct Read<'a, B: AutodiffBackend> {
        walk: Walk,
        gradients: &'a B::Gradients,
        out: Result<TensorMap, WeightsError>,
    }
    impl<B: AutodiffBackend> ModuleVisitor<B> for Read<'_, B> {
        fn enter_module(&mut self, name: &str, container_type: &str) {
            self.walk.enter(name, container_type);
        }
        fn exit_module(&mut self, _name: &str, container_type: &str) {
            self.walk.exit(container_type);
        }
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
            if let Some(grad) = param.val().grad(self.gradients) {
                insert(&mut self.out, self.walk.published(), &grad);
            }
        }
    }
    let mut read = Read::<B> {
        walk: Walk::new(names),
        gradients,
        out: Ok(TensorMap::new()),
    };
    model.visit(&mut read);
    read.out
}

/// Adds a tensor in the published layout, unless an earlier one failed.
fn insert<B: Backend, const D: usize>(
    out: &mut Result<TensorMap, WeightsError>,
    published: Published,
    tensor: &Tensor<B, D>,
) {
    let Ok(map) = out else { return };
    let Published { name, layout } = published;
    let shape = tensor.dims();
    match read_floats(tensor) {
        Ok(values) => {
            let tensor = HostTensor::float(
                layout.published_shape(&shape),
                layout.to_published(&shape, values),
            );
            map.insert(name, tensor);
        }
        Err(reason) => *out = Err(WeightsError::Device { name, reason }),
    }
}

/// A tensor's values as f32.
fn read_floats<B: Backend, const D: usize>(tensor: &Tensor<B, D>) -> Result<Vec<f32>, String> {
    let data: TensorData = tensor.clone().try_into_data().map_err(|e| e.to_string())?;
    data.convert::<f32>()
        .into_vec::<f32>()
        .map_err(|e| format!("{e:?}"))
}

/// A tensor's values, on the host.
pub(crate) fn read_device<B: Backend, const D: usize>(
    name: &str,
    tensor: &Tensor<B, D>,
) -> Result<HostTensor, WeightsError> {
    let values = read_floats(tensor).map_err(|reason| WeightsError::Device {
        name: name.to_string(),
        reason,
    })?;
    Ok(HostTensor::float(tensor.dims(), values))
}
