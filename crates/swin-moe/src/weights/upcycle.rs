//! From a dense model's tensors to a model whose experts start as copies of its MLPs.

use std::path::Path;

use burn::tensor::{Tensor, TensorData};
use hexa_moe::{Activation, DenseFfn, ExpertNoise};
use hexa_ops::ExpertOps;

use super::error::WeightsError;
use super::import::import_tensors;
use super::names::{Layout, MOE_LAYER};
use super::report::{ImportReport, ShapeMismatch};
use super::tensors::{HostTensor, TensorMap, Values};
use crate::model::block::FeedForward;
use crate::model::{ModelError, SwinMoe, SwinMoeConfig};

/// Builds the model of `config` with the parameters of a dense model, whose tensors have published
/// names and layout. The experts of each Mixture-of-Experts block are copies of the dense block's
/// MLP, with `noise` if given; each layer's noise has a seed of its own. Routers, and the first
/// layer of shared experts, are drawn from the back-end's generator.
///
/// [`hexa_moe::upcycle`] says when the outputs are those of the dense model. `source` names the
/// tensors' origin in messages.
///
/// # Errors
/// [`WeightsError::Upcycle`] if the tensors have experts already, or the configuration has none or
/// experts that are no copies of an MLP; [`WeightsError::Mismatch`] unless the file has exactly the
/// dense model's parameters; [`WeightsError::Model`] if the configuration or the noise is refused.
pub fn upcycle_tensors<B: ExpertOps>(
    config: &SwinMoeConfig,
    mut tensors: TensorMap,
    noise: Option<ExpertNoise>,
    source: &Path,
    device: &B::Device,
) -> Result<(SwinMoe<B>, ImportReport), WeightsError> {
    check(config, &tensors, source)?;
    let mut mlps = Vec::new();
    let mut found = ImportReport::default();
    for (stage, &depth) in config.depths.iter().enumerate() {
        let sizes = [config.stage_dim(stage), config.hidden_dim(stage)];
        for block in (0..depth).filter(|&block| config.is_moe(stage, block)) {
            let prefix = format!("layers.{stage}.blocks.{block}.mlp");
            let mlp = DenseMlp::take(&mut tensors, &prefix, sizes, config.fc2_bias, &mut found);
            mlps.push((stage, block, mlp));
        }
    }
    let (mut model, mut report) = import_tensors(config.init::<B>(device)?, tensors);
    report.missing.retain(|name| !name.contains(MOE_LAYER));
    report.loaded += found.loaded;
    report.missing.append(&mut found.missing);
    report.mismatched.append(&mut found.mismatched);
    if !report.is_exact() {
        return Err(WeightsError::Mismatch {
            path: source.to_path_buf(),
            report: Box::new(report),
        });
    }
    for (number, (stage, block, mlp)) in mlps.into_iter().enumerate() {
        // A whole report means that all of them are there.
        let Some(mlp) = mlp else { continue };
        let layer = config.moe_layer(config.stage_dim(stage), config.hidden_dim(stage));
        let noise = noise.map(|noise| ExpertNoise {
            seed: noise.seed.wrapping_add(number as u64),
            ..noise
        });
        let moe = layer
            .upcycle(mlp.on_device::<B>(device), noise)
            .map_err(ModelError::from)?;
        model.layers[stage].blocks[block].mlp = FeedForward::Moe(moe);
    }
    Ok((model, report))
}

fn check(config: &SwinMoeConfig, tensors: &TensorMap, source: &Path) -> Result<(), WeightsError> {
    let refuse = |reason: String, remedy| {
        Err(WeightsError::Upcycle {
            path: source.to_path_buf(),
            reason,
            remedy,
        })
    };
    if let Some(name) = tensors.keys().find(|name| name.contains(MOE_LAYER)) {
        return refuse(
            format!("it has experts already ({name}), allowed is a dense model"),
            "use swin-moe import for a file with experts, or train the run on",
        );
    }
    if !config.has_moe() {
        return refuse(
            "the settings have no Mixture-of-Experts block to make of it".to_owned(),
            "list blocks with --set moe.blocks=[[…],…], one list for each stage",
        );
    }
    if config.moe.activation != Activation::Gelu {
        return refuse(
            format!(
                "moe.activation is {:?}, and the dense MLPs have gelu",
                config.moe.activation
            ),
            "set moe.activation to \"gelu\"",
        );
    }
    Ok(())
}

/// The MLP of a dense block on the host, in our layout.
struct DenseMlp {
    sizes: [usize; 2],
    w1: Vec<f32>,
    b1: Vec<f32>,
    w2: Vec<f32>,
    b2: Option<Vec<f32>>,
}

impl DenseMlp {
    /// Takes the MLP's tensors out of the map; what is missing or does not fit is reported.
    fn take(
        tensors: &mut TensorMap,
        prefix: &str,
        sizes @ [dim, hidden]: [usize; 2],
        fc2_bias: bool,
        report: &mut ImportReport,
    ) -> Option<Self> {
        let mut take = |leaf: &str, ours: &[usize], layout: Layout| {
            let name = format!("{prefix}.{leaf}");
            let expected = layout.published_shape(ours);
            match tensors.remove(&name) {
                None => report.missing.push(name),
                Some(HostTensor {
                    shape,
                    values: Values::Float(values),
                }) if shape == expected => {
                    report.loaded += 1;
                    return Some(layout.to_ours(ours, values));
                }
                Some(HostTensor { shape, values }) => report.mismatched.push(ShapeMismatch {
                    name,
                    expected,
                    got: shape,
                    dtype: matches!(values, Values::Int(_)).then(|| "integers".to_owned()),
                }),
            }
            None
        };
        // All of them, before the first that is missing ends it: the report is to be complete.
        let w1 = take("fc1.weight", &[dim, hidden], Layout::Transposed);
        let b1 = take("fc1.bias", &[hidden], Layout::Same);
        let w2 = take("fc2.weight", &[hidden, dim], Layout::Transposed);
        let b2 = fc2_bias.then(|| take("fc2.bias", &[dim], Layout::Same));
        Some(Self {
            sizes,
            w1: w1?,
            b1: b1?,
            w2: w2?,
            b2: match b2 {
                Some(b2) => Some(b2?),
                None => None,
            },
        })
    }

    fn on_device<B: ExpertOps>(self, device: &B::Device) -> DenseFfn<B> {
        let [dim, hidden] = self.sizes;
        let matrix = |values, shape: [usize; 2]| {
            Tensor::<B, 2>::from_data(TensorData::new(values, shape), device)
        };
        let vector = |values: Vec<f32>| Tensor::<B, 1>::from_data(values.as_slice(), device);
        DenseFfn {
            w1: matrix(self.w1, [dim, hidden]),
            b1: Some(vector(self.b1)),
            w2: matrix(self.w2, [hidden, dim]),
            b2: self.b2.map(vector),
        }
    }
}
