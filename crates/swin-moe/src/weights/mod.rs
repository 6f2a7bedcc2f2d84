//! Checkpoints of the published model: import by its own names, export in its own layout.

mod error;
mod export;
mod import;
mod names;
mod params;
mod pickle;
mod published_config;
mod pytorch;
mod report;
mod tensors;
mod upcycle;

pub use error::WeightsError;
pub use export::{export_safetensors, published_tensors};
pub use import::{ImportOptions, import_file, import_tensors};
pub use names::{Layout, Names, Published};
pub(crate) use params::read_device;
pub use params::{NamedParam, named_gradients, named_parameters};
pub use published_config::PublishedConfig;
pub use report::{ImportReport, ShapeMismatch};
pub use tensors::{HostTensor, TensorMap, Values, read_file, read_safetensors, write_safetensors};
pub use upcycle::upcycle_tensors;
