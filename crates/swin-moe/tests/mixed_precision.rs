//! Mixed precision against f32: one model, one batch, outputs and every gradient.

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{DType, Distribution, Tensor};
use hexa_ops::testing::backend::skip;
use hexa_ops::testing::compare::relative_error;
use hexa_ops::{MatmulPrecision, TrainingBackend, backend_test, supports_precision};
use swin_moe::model::{MoeSettings, SwinMoe, SwinMoeConfig};
use swin_moe::weights::{Names, named_gradients};

/// Dense and expert MLPs, shifted windows, merging; all experts chosen, so that no token changes
/// its expert because of a rounding.
fn config(precision: MatmulPrecision) -> SwinMoeConfig {
    SwinMoeConfig {
        image_size: 24,
        patch_size: 3,
        in_chans: 3,
        num_classes: 5,
        embed_dim: 12,
        depths: vec![2, 2],
        num_heads: vec![2, 3],
        window_size: 4,
        mlp_ratio: 2.0,
        init_std: 0.15,
        drop_path: 0.0,
        pretrained_window_sizes: vec![0, 0],
        moe_blocks: vec![vec![1], vec![0]],
        moe: MoeSettings {
            num_experts: 3,
            top_k: 3,
            shared_d_ff: 9,
            ..MoeSettings::default()
        },
        precision,
        ..SwinMoeConfig::default()
    }
}

struct Step {
    logits: Vec<f64>,
    gradients: Vec<(String, Vec<f64>)>,
}

/// Weights and their gradients, whatever the products between them are in.
struct AllF32<'a, B: TrainingBackend>(&'a B::Gradients);

impl<B: TrainingBackend> ModuleVisitor<B> for AllF32<'_, B> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        let value = param.val();
        assert_eq!(value.dtype(), DType::F32);
        if let Some(gradient) = value.grad(self.0) {
            assert_eq!(gradient.dtype(), DType::F32);
        }
    }
}

fn step<B: TrainingBackend>(precision: MatmulPrecision, device: &B::Device) -> Step {
    let config = config(precision);
    B::seed(device, 3);
    let model: SwinMoe<B> = config.init::<B>(device).unwrap().without_noise();
    let images = Tensor::random([3, 3, 24, 24], Distribution::Normal(0.0, 1.0), device);
    let output = model.forward(images).unwrap();
    assert_eq!(output.logits.dtype(), DType::F32);
    assert_eq!(output.aux_loss.dtype(), DType::F32);
    let loss = output.logits.clone().powi_scalar(2).mean() + output.aux_loss;
    let names = Names::new(&config);
    let gradients = loss.backward();
    model.visit(&mut AllF32(&gradients));
    let gradients = named_gradients(&model, &gradients, names).unwrap();
    let wide = |values: &[f32]| values.iter().map(|&v| f64::from(v)).collect();
    Step {
        logits: output.logits.into_data().iter::<f64>().collect(),
        gradients: gradients
            .into_iter()
            .map(|(name, values)| (name, wide(values.as_floats().unwrap())))
            .collect(),
    }
}

/// A rounding to bf16 errs by at most 2⁻⁹. A dozen of them in a row, of random signs, leave 1 %;
/// gradients have gone through twice as many.
fn gradients_stay_near<B: TrainingBackend>() {
    let device = Default::default();
    for (precision, unit) in [
        (MatmulPrecision::Bf16, 1.0 / 512.0),
        (MatmulPrecision::F16, 1.0 / 4096.0),
    ] {
        if !supports_precision::<B>(&device, precision) {
            skip("mixed_precision", &format!("no {precision:?} here"));
            continue;
        }
        let exact = step::<B>(MatmulPrecision::Strict, &device);
        let mixed = step::<B>(precision, &device);
        let error = relative_error(&mixed.logits, &exact.logits);
        assert!(error < 6.0 * unit, "{precision:?} logits: {error:.2e}");
        assert!(error > unit / 50.0, "nothing was rounded: {error:.2e}");
        for ((name, got), (_, expected)) in mixed.gradients.iter().zip(&exact.gradients) {
            let error = relative_error(got, expected);
            assert!(error < 12.0 * unit, "{precision:?} {name}: {error:.2e}");
        }
    }
}

backend_test!(mixed_precision_is_near_f32, gradients_stay_near);
