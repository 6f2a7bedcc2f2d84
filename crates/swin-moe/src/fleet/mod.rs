//! Training on unequal devices: what a model is to the cost model, and measuring it.

mod measure;

use hexa_moe::parallel::Mode;
use hexa_moe::parallel::fleet::{
    FfnShape, Fleet, FleetError, LayerShape, Prediction, Workload, balanced_plan, choose, predict,
};

pub use measure::{CalibrateRequest, calibrate};
pub(crate) use measure::{RankSetting, measure_rank};

use crate::backend::BackendError;
use crate::info::ModelInfo;
use crate::model::{ModelError, SwinMoeConfig};

/// Why a fleet could not be measured or planned for.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FleetJobError {
    /// The model's settings do not fit together, or the model not into memory.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// A rank's back-end cannot be used.
    #[error("rank {rank}: {error}")]
    Backend {
        /// The rank.
        rank: usize,
        /// Why.
        error: BackendError,
    },
    /// The fleet, or a rank while it was measured.
    #[error(transparent)]
    Fleet(#[from] FleetError),
    /// A rank's thread ended without a word.
    #[error("rank {rank} panicked; set SWIN_MOE_DEBUG=1 to see where, and report it")]
    Panicked {
        /// The rank.
        rank: usize,
    },
}

/// The model and its batch, as the cost model sees them.
///
/// # Errors
/// [`ModelError`] if the configuration is not valid.
pub fn workload(model: &SwinMoeConfig, batch: usize) -> Result<Workload, ModelError> {
    let info = ModelInfo::new(model, 1)?;
    let mut sliced = 0;
    let mut kept_by_experts = 0;
    let mut layers = Vec::new();
    for block in model.geometry()?.stages.iter().flat_map(|s| &s.blocks) {
        if !block.is_moe {
            continue;
        }
        let ffn = FfnShape::of(&model.moe_layer(block.dim, block.hidden));
        let tokens = block.layout.grid * block.layout.grid;
        sliced += ffn.params(ffn.d_ff);
        // As `ModelInfo` counts it: the pre-activation, gate weights and ids.
        let width = ffn.activation.hidden_width(ffn.d_ff);
        kept_by_experts += (4 * tokens * ffn.top_k * (width + 2)) as u64;
        layers.push(LayerShape {
            ffn,
            tokens_per_sample: tokens,
        });
    }
    let trained: u64 = info.layers.iter().map(|layer| layer.trained_params).sum();
    let kept = info.memory().activation_bytes;
    Ok(Workload {
        layers,
        batch,
        replicated_params: trained.saturating_sub(sliced),
        activation_bytes_per_sample: kept.saturating_sub(kept_by_experts),
    })
}

/// The plan for a model on a fleet: with the mode that is given, or with the fastest choice that
/// fits into memory.
///
/// # Errors
/// [`FleetJobError`] if the fleet was measured on another model, or nothing fits.
pub fn plan(
    model: &SwinMoeConfig,
    batch: usize,
    fleet: &Fleet,
    mode: Option<Mode>,
) -> Result<Prediction, FleetJobError> {
    let workload = workload(model, batch)?;
    Ok(match mode {
        None => choose(fleet, &workload)?,
        Some(mode) => {
            let modes = vec![mode; workload.layers.len()];
            predict(fleet, &workload, &balanced_plan(fleet, &workload, &modes)?)?
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_workload_is_the_model() {
        let model = SwinMoeConfig {
            image_size: 32,
            window_size: 4,
            embed_dim: 12,
            depths: vec![2, 2],
            num_heads: vec![2, 4],
            pretrained_window_sizes: vec![0, 0],
            moe_blocks: vec![vec![1], vec![0, 1]],
            num_classes: 10,
            ..SwinMoeConfig::default()
        };
        let work = workload(&model, 6).unwrap();
        let tokens: Vec<_> = work.layers.iter().map(|l| l.tokens_per_sample).collect();
        assert_eq!(tokens, [64, 16, 16]);
        let widths: Vec<_> = work
            .layers
            .iter()
            .map(|l| (l.ffn.d_model, l.ffn.d_ff))
            .collect();
        assert_eq!(widths, [(12, 48), (24, 96), (24, 96)]);

        // Counted on the model itself.
        use burn::backend::Autodiff;
        use burn::module::{Module, ModuleVisitor, Param};
        use burn::tensor::Tensor;
        struct Trained(u64);
        impl<B: burn::tensor::backend::Backend> ModuleVisitor<B> for Trained {
            fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
                let tensor = param.val();
                if tensor.is_require_grad() {
                    self.0 += tensor.shape().num_elements() as u64;
                }
            }
        }
        type B = Autodiff<hexa_ops::backends::Cpu>;
        let _lock = crate::testing::generator_lock();
        let net = model.init::<B>(&Default::default()).unwrap();
        let mut all = Trained(0);
        net.visit(&mut all);
        let mut sliced = 0;
        for block in net.layers.iter().flat_map(|stage| &stage.blocks) {
            if let crate::model::block::FeedForward::Moe(moe) = &block.mlp {
                let b1 = moe
                    .experts
                    .b1
                    .as_ref()
                    .map_or(0, |b1| b1.shape().num_elements());
                let w =
                    moe.experts.w1.shape().num_elements() + moe.experts.w2.shape().num_elements();
                sliced += (w + b1) as u64;
            }
        }
        assert_eq!(work.replicated_params, all.0 - sliced);
    }
}
