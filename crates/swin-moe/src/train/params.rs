//! A model's float parameters by name, in a fixed order.
//!
//! Burn keys parameters by random identifiers that change when a model is built anew. A parameter's
//! path in the module tree does not, and neither does the order of a visit: checkpoints and the
//! optimizer rely on these two alone.

use std::collections::BTreeMap;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::backend::Backend;
use burn::tensor::{Tensor, TensorData};

/// The path of the module that a visit has reached.
#[derive(Debug, Default)]
pub(crate) struct ModulePath(Vec<String>);

impl ModulePath {
    pub(crate) fn enter(&mut self, name: &str) {
        self.0.push(name.to_owned());
    }

    pub(crate) fn exit(&mut self) {
        self.0.pop();
    }

    pub(crate) fn name(&self) -> String {
        self.0.join(".")
    }
}

/// A tensor on the host, as checkpoints hold it.
#[derive(Debug, Clone, PartialEq)]
pub struct HostTensor {
    /// Length of each dimension.
    pub shape: Vec<usize>,
    /// Row-major values.
    pub values: Vec<f32>,
}

/// Tensors on the host by name.
pub type HostTensors = BTreeMap<String, HostTensor>;

/// Copies every float parameter of `module` to the host.
///
/// # Errors
/// The back-end's words, if a read fails.
pub fn read_params<B: Backend, M: Module<B>>(module: &M) -> Result<HostTensors, String> {
    let mut reader = Reader {
        path: ModulePath::default(),
        tensors: HostTensors::new(),
        failure: None,
    };
    module.visit(&mut reader);
    match reader.failure {
        Some(failure) => Err(failure),
        None => Ok(reader.tensors),
    }
}

struct Reader {
    path: ModulePath,
    tensors: HostTensors,
    failure: Option<String>,
}

impl<B: Backend> ModuleVisitor<B> for Reader {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.enter(name);
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.exit();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        match read_tensor(param.val()) {
            Ok(tensor) => {
                self.tensors.insert(self.path.name(), tensor);
            }
            Err(reason) => self.failure = Some(reason),
        }
    }
}

/// Copies one tensor to the host as f32.
pub(crate) fn read_tensor<B: Backend, const D: usize>(
    tensor: Tensor<B, D>,
) -> Result<HostTensor, String> {
    if tensor.shape().num_elements() == 0 {
        return Ok(HostTensor {
            shape: tensor.dims().to_vec(),
            values: Vec::new(),
        });
    }
    let data = tensor.try_into_data().map_err(|error| error.to_string())?;
    let shape = data.shape.to_vec();
    let values = data
        .convert::<f32>()
        .into_vec::<f32>()
        .map_err(|error| format!("{error:?}"))?;
    Ok(HostTensor { shape, values })
}

/// Replaces every float parameter of `module` by the tensor of its name.
///
/// # Errors
/// Every missing, unexpected and mis-shaped tensor, in one sentence.
pub fn write_params<B: Backend, M: Module<B>>(
    module: M,
    tensors: HostTensors,
) -> Result<M, String> {
    let mut writer = Writer {
        path: ModulePath::default(),
        tensors,
        missing: Vec::new(),
        misshaped: Vec::new(),
    };
    let module = module.map(&mut writer);
    let unexpected: Vec<String> = writer.tensors.into_keys().collect();
    let mut faults = Vec::new();
    for (what, names) in [
        ("missing", writer.missing),
        ("unexpected", unexpected),
        ("of another shape", writer.misshaped),
    ] {
        if !names.is_empty() {
            faults.push(format!("{what}: {}", names.join(", ")));
        }
    }
    if faults.is_empty() {
        Ok(module)
    } else {
        Err(format!(
            "tensors do not fit the model ({})",
            faults.join("; ")
        ))
    }
}

struct Writer {
    path: ModulePath,
    tensors: HostTensors,
    missing: Vec<String>,
    misshaped: Vec<String>,
}

impl<B: Backend> ModuleMapper<B> for Writer {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.enter(name);
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.exit();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        let (id, old, mapper) = param.consume();
        let name = self.path.name();
        let value = match self.tensors.remove(&name) {
            None => {
                self.missing.push(name);
                old
            }
            Some(tensor) if tensor.shape != old.dims() => {
                self.misshaped.push(format!(
                    "{name} (got {:?}, allowed {:?})",
                    tensor.shape,
                    old.dims()
                ));
                old
            }
            Some(HostTensor { shape, values }) => {
                let data = TensorData::new(values, shape);
                Tensor::from_data(data, &old.device()).set_require_grad(old.is_require_grad())
            }
        };
        Param::from_mapped_value(id, value, mapper)
    }
}
