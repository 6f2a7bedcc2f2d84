//! Training: what is random, what is repeatable, and that it learns.

use burn::module::AutodiffModule;
use burn::optim::{AdamConfig, GradientsParams, Optimizer};
use hexa_moe::{MoeConfig, TrainingBackend};
use hexa_ops::backend_test;
use hexa_ops::testing::compare::host;

use crate::support::{Named, Rng, assert_near, generator_lock, gradients, layer, tensor};

const TOKENS: usize = 13;
const D: usize = 6;

fn input<B: TrainingBackend>() -> burn::Tensor<B, 2> {
    tensor(&Rng::new(9).vec(TOKENS * D), [TOKENS, D])
}

/// Output, auxiliary loss and gradients of one step of a freshly made layer.
fn step<B: TrainingBackend>(seed: u64) -> (Vec<f64>, Vec<f64>, Named) {
    let device = B::Device::default();
    B::seed(&device, seed);
    let config = MoeConfig::new(D, 9, 4)
        .with_top_k(2)
        .with_expert_dropout(0.3)
        .with_init_std(0.4);
    let moe = config.init::<B>(&device).unwrap();
    let out = moe.forward(input::<B>());
    let (output, aux_loss) = (host(out.output.clone()), host(out.aux_loss.clone()));
    let grads = (out.output.sum() + out.aux_loss).backward();
    (output, aux_loss, gradients::<B, _>(&moe, &grads))
}

fn seeds<B: TrainingBackend>() {
    let _lock = generator_lock();
    assert_eq!(step::<B>(3), step::<B>(3));
    assert_ne!(step::<B>(3).0, step::<B>(4).0);
}
backend_test!(one_seed_gives_the_same_bits, seeds);

/// Dropout is drawn anew in every step, is absent in evaluation, and keeps the mean.
fn dropout<B: TrainingBackend>() {
    let _lock = generator_lock();
    B::seed(&B::Device::default(), 17);
    let config = MoeConfig::new(D, 9, 3)
        .with_expert_dropout(0.5)
        .with_gate_noise(0.0);
    for config in [config.clone(), config.with_shared_d_ff(8)] {
        let (moe, _) = layer::<B>(&config, 21);
        let run = || host(moe.forward(input::<B>()).output);
        let plain = host(moe.valid().forward(input::<B>().inner()).output);
        let again = host(moe.valid().forward(input::<B>().inner()).output);
        assert_eq!(plain, again);
        assert_ne!(run(), run());
        assert_ne!(run(), plain);

        const RUNS: usize = 600;
        let mut mean = vec![0.0; plain.len()];
        for _ in 0..RUNS {
            for (mean, y) in mean.iter_mut().zip(run()) {
                *mean += y / RUNS as f64;
            }
        }
        // The outputs' deviation is of their own size, and falls by √600 ≈ 24.
        assert_near("mean under dropout", &mean, &plain, 0.1);
    }
}
backend_test!(dropout_is_unbiased_and_only_in_training, dropout);

/// The router learns from the task alone, through the gate weights.
fn router_learns<B: TrainingBackend>() {
    let config = MoeConfig::new(D, 9, 4)
        .with_top_k(2)
        .with_balance(hexa_moe::BalanceConfig::NONE);
    let (moe, _) = layer::<B>(&config, 5);
    let moe = moe.without_noise();
    let out = moe.forward(input::<B>());
    assert_eq!(host(out.aux_loss), [0.0]);
    let grads = gradients::<B, _>(&moe, &out.output.sum().backward());
    assert!(
        grads["router.scorer.Linear.weight"]
            .iter()
            .any(|&g| g != 0.0)
    );
}
backend_test!(gate_weights_carry_gradients_to_the_router, router_learns);

/// Fits a fixed map; the loss must fall far below that of the best constant.
fn fit<B: TrainingBackend>() {
    let (mut moe, _) = layer::<B>(&MoeConfig::new(D, 16, 4).with_top_k(2), 8);
    let _lock = generator_lock();
    let mut optimizer = AdamConfig::new().init();
    let x = input::<B>();
    let target = (x.clone() * 2.0).sin();
    let mut losses = Vec::new();
    for _ in 0..150 {
        let out = moe.forward(x.clone());
        let error = out.output - target.clone();
        let loss = (error.clone() * error).mean();
        losses.push(host(loss.clone())[0]);
        let grads = GradientsParams::from_grads((loss + out.aux_loss).backward(), &moe);
        moe = optimizer.step(0.02, moe, grads);
    }
    let (first, last) = (losses[0], losses[losses.len() - 1]);
    assert!(last < 0.05 && last < first / 5.0, "{first} -> {last}");
}
backend_test!(a_layer_learns, fit);
