//! The model's parts against loops, and its behaviour as a module, on the back-end that
//! `HEXA_TEST_BACKEND` names.

mod checkpointing;
mod experts;
mod memory;

use std::sync::{Mutex, MutexGuard, PoisonError};

use burn::module::AutodiffModule;
use burn::tensor::backend::Backend;
use burn::tensor::{Distribution, Tensor, TensorData, Tolerance};
use hexa_moe::{BalanceConfig, RouterConfig};
use hexa_ops::{Activation, ExpertOps, MatmulPrecision, TrainingBackend, backend_test};
use swin_moe::info::ModelInfo;
use swin_moe::model::drop_path::drop_path;
use swin_moe::model::geometry::{BlockGeometry, WindowLayout};
use swin_moe::model::position_bias::{
    CpbMlp, PairExpansion, relative_coords_table, relative_position_index,
};
use swin_moe::model::window::{attention_mask, partition, reverse};
use swin_moe::model::{ModelError, MoeSettings, SwinMoe, SwinMoeConfig};
use swin_moe::weights::{Names, named_gradients, named_parameters};

/// Odd widths, a clamped window in the last stage, experts in both stages.
fn small() -> SwinMoeConfig {
    SwinMoeConfig {
        image_size: 18,
        patch_size: 3,
        in_chans: 2,
        num_classes: 5,
        embed_dim: 6,
        depths: vec![2, 1],
        num_heads: vec![2, 3],
        window_size: 3,
        mlp_ratio: 1.5,
        pretrained_window_sizes: vec![0, 7],
        drop_path: 0.0,
        moe_blocks: vec![vec![1], vec![0]],
        moe: MoeSettings {
            num_experts: 3,
            top_k: 2,
            ..MoeSettings::default()
        },
        ..SwinMoeConfig::default()
    }
}

/// The back-end's random generator is one for the whole process: a test that seeds it and draws from
/// it twice must not run beside another that draws.
fn alone() -> MutexGuard<'static, ()> {
    static GENERATOR: Mutex<()> = Mutex::new(());
    // Another test's failure leaves nothing in disorder.
    GENERATOR.lock().unwrap_or_else(PoisonError::into_inner)
}

fn floats<B: Backend, const D: usize>(tensor: Tensor<B, D>) -> Vec<f32> {
    tensor.into_data().convert::<f32>().into_vec().unwrap()
}

fn images<B: Backend>(config: &SwinMoeConfig, batch: usize, device: &B::Device) -> Tensor<B, 4> {
    let size = config.image_size;
    let shape = [batch, config.in_chans, size, size];
    Tensor::random(shape, Distribution::Normal(0.0, 1.0), device)
}

fn windows_match_a_loop<B: Backend>() {
    let _alone = alone();
    let device = Default::default();
    for (grid, window, shifted) in [
        (6, 3, true),
        (6, 3, false),
        (10, 5, true),
        (4, 4, true),
        (4, 2, true),
        (3, 1, true),
    ] {
        let layout = WindowLayout::new(grid, window, shifted);
        let (batch, dim) = (2, 3);
        let count = batch * grid * grid * dim;
        let values: Vec<f32> = (0..count).map(|i| i as f32).collect();
        let x = Tensor::<B, 2>::from_data(
            TensorData::new(values.clone(), [batch * grid * grid, dim]),
            &device,
        );
        let mut expected = Vec::new();
        for b in 0..batch {
            for wr in 0..grid / window {
                for wc in 0..grid / window {
                    for r in 0..window {
                        for c in 0..window {
                            let row = (wr * window + r + layout.shift) % grid;
                            let col = (wc * window + c + layout.shift) % grid;
                            let token = (b * grid + row) * grid + col;
                            expected.extend_from_slice(&values[token * dim..][..dim]);
                        }
                    }
                }
            }
        }
        let cut = partition(x, layout);
        assert_eq!(floats(cut.clone()), expected, "{layout:?}");
        assert_eq!(floats(reverse(cut, layout)), values, "{layout:?}");
    }
}

fn pairs_match_a_gather<B: ExpertOps>() {
    let _alone = alone();
    let device = Default::default();
    for (window, pretrained) in [(1, 0), (2, 0), (3, 12), (5, 0)] {
        let block = BlockGeometry {
            dim: 6,
            num_heads: 3,
            hidden: 9,
            pretrained_window: pretrained,
            layout: WindowLayout::new(2 * window, window, false),
            is_moe: false,
            drop_path: 0.0,
        };
        let mlp = CpbMlp::<B>::new(3, 0.5, MatmulPrecision::Strict, &device);
        let pairs = PairExpansion::new(&block, MatmulPrecision::Strict, &device);
        let side = 2 * window - 1;
        let coords = relative_coords_table(window, pretrained);
        let table = mlp
            .forward(Tensor::from_data(
                TensorData::new(coords, [side * side, 2]),
                &device,
            ))
            .unwrap();
        let table = floats(table);
        let n = window * window;
        let mut expected = Vec::new();
        for head in 0..3 {
            for &entry in &relative_position_index(window) {
                expected.push(table[entry as usize * 3 + head]);
            }
        }
        let bias = pairs.bias(&mlp).unwrap();
        assert_eq!(bias.dims(), [3, n, n]);
        bias.into_data().assert_approx_eq::<f32>(
            &TensorData::new(expected, [3, n, n]),
            Tolerance::absolute(1e-6),
        );
    }
}

fn masks_separate_regions() {
    assert_eq!(attention_mask(WindowLayout::new(8, 4, false)), None);
    assert_eq!(attention_mask(WindowLayout::new(4, 4, true)), None);
    let layout = WindowLayout::new(6, 3, true);
    let mask = attention_mask(layout).unwrap();
    let n = 9;
    for window in 0..4 {
        for query in 0..n {
            for key in 0..n {
                // Two tokens of a window belong together iff neither axis wraps between them.
                let place = |token: usize| {
                    let row = window / 2 * 3 + token / 3 + layout.shift;
                    let col = window % 2 * 3 + token % 3 + layout.shift;
                    (row / 6, col / 6)
                };
                let expected = if place(query) == place(key) {
                    0.0
                } else {
                    -100.0
                };
                assert_eq!(mask[(window * n + query) * n + key], expected);
            }
        }
    }
}

fn every_trained_parameter_learns<B: TrainingBackend>() {
    let _alone = alone();
    let device = Default::default();
    B::seed(&device, 3);
    for (router, balance, activation, shared) in [
        (
            RouterConfig::Linear,
            BalanceConfig::gshard(0.1),
            Activation::Gelu,
            0,
        ),
        (
            RouterConfig::Cosine {
                dim: 5,
                init_temperature: 0.5,
            },
            BalanceConfig::load_importance(0.1).with_z_loss(0.01),
            Activation::SwiGlu,
            7,
        ),
    ] {
        let mut config = small();
        config.moe.router = router;
        config.moe.balance = balance;
        config.moe.activation = activation;
        config.moe.shared_d_ff = shared;
        config.moe.dropout = 0.2;
        config.drop_path = 0.1;
        config.init_std = 0.3;
        let model: SwinMoe<B> = config.init(&device).unwrap();
        let output = model.forward(images(&config, 4, &device)).unwrap();
        assert_eq!(output.logits.dims(), [4, 5]);
        assert_eq!(output.loads.len(), 2);
        let loss = output.logits.powi_scalar(2).sum() + output.aux_loss;
        let names = Names::new(&config);
        let grads = named_gradients(&model, &loss.backward(), names).unwrap();
        let params = named_parameters(&model, names);
        assert_eq!(params.iter().filter(|p| p.trained).count(), grads.len());
        for (name, grad) in &grads {
            let grad = grad.as_floats().unwrap();
            assert!(grad.iter().all(|g| g.is_finite()), "{name}");
            assert!(grad.iter().any(|&g| g != 0.0), "{name}");
        }

        let elements: usize = params
            .iter()
            .map(|p| p.shape.iter().product::<usize>())
            .sum();
        let info = ModelInfo::new(&config, 4).unwrap();
        assert_eq!(info.params(), elements as u64);
        let trained: usize = params
            .iter()
            .filter(|p| p.trained)
            .map(|p| p.shape.iter().product::<usize>())
            .sum();
        assert_eq!(info.memory().gradients_bytes, 4 * trained as u64);
    }
}

/// Two builds from one seed are equal; noise is on with autodiff, and off without.
fn noise_follows_the_back_end<B: TrainingBackend>() {
    let _alone = alone();
    let device = Default::default();
    let mut config = small();
    config.drop_path = 0.5;
    config.moe.dropout = 0.5;
    config.init_std = 0.3;
    let build = || {
        B::seed(&device, 11);
        config.init::<B>(&device).unwrap()
    };
    let model = build();
    let x = images::<B>(&config, 3, &device);
    let logits = |model: &SwinMoe<B>| floats(model.forward(x.clone()).unwrap().logits);

    let quiet = model.clone().without_noise();
    assert_eq!(logits(&quiet), logits(&quiet));
    let valid = model.valid().forward(x.clone().inner()).unwrap();
    // With autodiff other, equally right, kernels run: equal up to rounding.
    for (a, b) in logits(&quiet).iter().zip(floats(valid.logits)) {
        assert!((a - b).abs() < 1e-5, "{a} {b}");
    }
    assert_eq!(logits(&build().without_noise()), logits(&quiet));
    assert_ne!(logits(&model), logits(&model));
}

fn dropped_samples_are_zero_and_the_mean_is_kept<B: TrainingBackend>() {
    let _alone = alone();
    let device = Default::default();
    B::seed(&device, 5);
    let (batch, tokens, dim) = (512, 3, 2);
    let x = Tensor::<B, 2>::ones([batch * tokens, dim], &device);
    let y = floats(drop_path(x.clone(), batch, 0.25));
    let mut kept = 0;
    for sample in y.chunks(tokens * dim) {
        assert!(sample.iter().all(|&v| v == sample[0]));
        if sample[0] != 0.0 {
            assert!((sample[0] - 4.0 / 3.0).abs() < 1e-6);
            kept += 1;
        }
    }
    // 384 expected, standard deviation 9.8.
    assert!((330..440).contains(&kept), "{kept}");
    assert_eq!(
        floats(drop_path(x.inner(), batch, 0.25)),
        vec![1.0; batch * tokens * dim]
    );
}

fn other_images_are_refused<B: TrainingBackend>() {
    let _alone = alone();
    let device = Default::default();
    let config = small();
    let model: SwinMoe<B> = config.init(&device).unwrap();
    for shape in [[1, 2, 18, 17], [1, 2, 36, 36], [1, 3, 18, 18]] {
        let result = model.forward(Tensor::zeros(shape, &device));
        assert!(
            matches!(result, Err(ModelError::Images { .. })),
            "{shape:?}"
        );
    }
}

/// A grid that shrinks to one token, whose window has no offset but zero.
fn a_single_token_is_a_window<B: TrainingBackend>() {
    let _alone = alone();
    let device = Default::default();
    let mut config = small();
    config.image_size = 6;
    config.moe.num_experts = 1;
    config.moe.top_k = 1;
    let model: SwinMoe<B> = config.init(&device).unwrap();
    let logits = floats(model.forward(images(&config, 1, &device)).unwrap().logits);
    assert!(logits.iter().all(|v| v.is_finite()), "{logits:?}");
}

backend_test!(kernels windows_are_cut_and_joined, windows_match_a_loop);
backend_test!(kernels position_bias_of_pairs, pairs_match_a_gather);
backend_test!(
    gradients_reach_every_parameter,
    every_trained_parameter_learns
);
backend_test!(noise_only_with_autodiff, noise_follows_the_back_end);
backend_test!(
    stochastic_depth,
    dropped_samples_are_zero_and_the_mean_is_kept
);
backend_test!(image_shapes_are_checked, other_images_are_refused);
backend_test!(one_token_grids, a_single_token_is_a_window);

#[test]
fn masks_of_shifted_windows() {
    masks_separate_regions();
}

#[test]
fn impossible_configurations_are_refused() {
    type Change = fn(&mut SwinMoeConfig);
    let cases: [(&str, Change); 26] = [
        ("image_size is 0", |c| c.image_size = 0),
        ("image_size is 19", |c| c.image_size = 19),
        ("image_size is 9", |c| c.image_size = 9),
        ("image_size is 99999999", |c| c.image_size = 99_999_999),
        ("patch_size is 0", |c| c.patch_size = 0),
        ("in_chans is 0", |c| c.in_chans = 0),
        ("num_classes is 0", |c| c.num_classes = 0),
        ("embed_dim is 0", |c| c.embed_dim = 0),
        ("window_size is 0", |c| c.window_size = 0),
        ("window_size is 4", |c| c.window_size = 4),
        ("mlp_ratio is -1", |c| c.mlp_ratio = -1.0),
        ("mlp_ratio is NaN", |c| c.mlp_ratio = f64::NAN),
        ("mlp_ratio is 0.01", |c| c.mlp_ratio = 0.01),
        ("depths is 0 stages", |c| c.depths = vec![]),
        ("depths[1] is 0", |c| c.depths[1] = 0),
        ("num_heads is 1 entries", |c| c.num_heads = vec![2]),
        ("num_heads[0] is 4", |c| c.num_heads[0] = 4),
        ("num_heads[1] is 0", |c| c.num_heads[1] = 0),
        ("pretrained_window_sizes[1] is 1", |c| {
            c.pretrained_window_sizes[1] = 1
        }),
        ("moe_blocks is 3 entries", |c| c.moe_blocks.push(vec![])),
        ("moe_blocks[1] is 1", |c| c.moe_blocks[1] = vec![1]),
        ("drop_path is 1", |c| c.drop_path = 1.0),
        ("init_std is inf", |c| c.init_std = f64::INFINITY),
        ("num_experts is 0", |c| c.moe.num_experts = 0),
        ("top_k (4)", |c| c.moe.top_k = 4),
        ("gate_noise is 0", |c| {
            c.moe.gate_noise = 0.0;
            c.moe.balance = BalanceConfig::load_importance(0.01);
        }),
    ];
    assert_eq!(small().validate(), Ok(()));
    for (expected, change) in cases {
        let mut config = small();
        change(&mut config);
        let message = config.validate().unwrap_err().to_string();
        assert!(
            message.contains(expected),
            "expected {expected:?} in: {message}"
        );
    }
}

#[test]
fn the_published_sizes() {
    let small = SwinMoeConfig {
        image_size: 192,
        num_classes: 21_841,
        depths: vec![2, 2, 18, 2],
        window_size: 12,
        fc2_bias: false,
        moe_blocks: vec![vec![], vec![], (0..9).map(|i| 2 * i + 1).collect(), vec![1]],
        ..SwinMoeConfig::default()
    };
    let info = ModelInfo::new(&small, 1).unwrap();
    // The published table: 173 M parameters with 8 experts, 36.8 M without them but for one.
    let millions = info.params() as f64 / 1e6;
    assert!((millions - 173.0).abs() < 10.0, "{millions} M");
    println!("{info}");
    assert_eq!(small.num_moe_layers(), 10);
    let rates: Vec<f64> = small
        .geometry()
        .unwrap()
        .blocks()
        .map(|b| b.drop_path)
        .collect();
    assert_eq!(rates.first(), Some(&0.0));
    assert_eq!(rates.last(), Some(&0.1));
}
