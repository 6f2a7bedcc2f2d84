//! The router: noise, temperature, element types.

use burn::tensor::{DType, FloatDType, Tensor};
use hexa_moe::{MoeConfig, RouterConfig, Scorer, TrainingBackend};
use hexa_ops::backend_test;
use hexa_ops::testing::backend::skip;
use hexa_ops::testing::compare::host;

use crate::host::HostMoe;
use crate::support::{Rng, assert_near, generator_lock, layer, tensor};

fn noise<B: TrainingBackend>() {
    let _lock = generator_lock();
    B::seed(&B::Device::default(), 5);
    let (experts, tokens, gate_noise) = (4, 3000, 2.0);
    let config = MoeConfig::new(6, 5, experts).with_gate_noise(gate_noise);
    let (moe, _) = layer::<B>(&config, 1);
    let x = tensor::<B, 2>(&Rng::new(2).vec(tokens * 6), [tokens, 6]);
    let routing = moe.router.route(x).unwrap();
    let noise = host(routing.noisy_logits - routing.logits);
    let mean = noise.iter().sum::<f64>() / noise.len() as f64;
    let std = (noise.iter().map(|n| n * n).sum::<f64>() / noise.len() as f64).sqrt();
    let sigma = gate_noise / experts as f64;
    // Standard errors of 12,000 draws: 0.0046 and 0.0032.
    assert!(mean.abs() < 0.025, "mean {mean}");
    assert!((std - sigma).abs() < 0.02, "std {std}, wanted {sigma}");
}
backend_test!(noise_in_training_has_its_scale, noise);

fn no_noise<B: TrainingBackend>() {
    let config = MoeConfig::new(6, 5, 4).with_gate_noise(2.0);
    let (quiet, _) = layer::<B>(&config, 1);
    let x = Rng::new(2).vec(7 * 6);

    let routing = quiet
        .clone()
        .without_noise()
        .router
        .route(tensor::<B, 2>(&x, [7, 6]))
        .unwrap();
    assert_eq!(host(routing.noisy_logits), host(routing.logits));

    let (inner, _) = layer::<B::InnerBackend>(&config, 1);
    let routing = inner.router.route(tensor(&x, [7, 6])).unwrap();
    assert_eq!(host(routing.noisy_logits), host(routing.logits));
}
backend_test!(there_is_no_noise_in_evaluation, no_noise);

/// Above the clamp the scale is 100 and its logarithm gets no gradient.
fn clamp<B: TrainingBackend>() {
    let config = MoeConfig::new(5, 3, 4).with_router(RouterConfig::Cosine {
        dim: 3,
        init_temperature: 0.5,
    });
    let (moe, mut params) = layer::<B>(&config, 3);
    let Scorer::Cosine(mut cosine) = moe.router.scorer else {
        panic!("a cosine router was asked for");
    };
    let x = Rng::new(4).vec(6 * 5);
    for (log_scale, trained) in [(2.0, true), (7.0, false)] {
        cosine.temperature = cosine
            .temperature
            .map(|t| Tensor::from_inner(t.inner() * 0.0 + log_scale).require_grad());
        params.insert("router.scorer.Cosine.temperature".into(), vec![log_scale]);
        let host_moe = HostMoe {
            config: &config,
            params: &params,
        };
        let scorer = Scorer::Cosine(cosine.clone());
        let logits = scorer
            .logits(tensor::<B, 2>(&x, [6, 5]), config.precision)
            .unwrap();
        assert_near("logits", &host(logits.clone()), &host_moe.logits(&x), 1e-5);
        let grads = logits.abs().sum().backward();
        let grad = cosine
            .temperature
            .val()
            .grad(&grads)
            .map(host)
            .unwrap_or(vec![0.0]);
        assert_eq!(
            grad[0] != 0.0,
            trained,
            "log scale {log_scale}: gradient {grad:?}"
        );
    }
}
backend_test!(the_learned_scale_is_clamped_at_100, clamp);

/// A zero token has no direction: its logits are zero and its gradients finite.
fn zero_vector<B: TrainingBackend>() {
    let config = MoeConfig::new(5, 3, 4).with_router(RouterConfig::Cosine {
        dim: 3,
        init_temperature: 0.5,
    });
    let device = B::Device::default();
    // Straight from `init` the projector has no bias, so that a zero token projects to zero.
    let _lock = generator_lock();
    let moe = config.init::<B>(&device).unwrap().without_noise();
    let x = Tensor::<B, 2>::zeros([2, 5], &device).require_grad();
    let logits = moe.router.route(x.clone()).unwrap().logits;
    assert_eq!(host(logits.clone()), vec![0.0; 8]);
    let grads = logits.sum().backward();
    let grad = host(x.grad(&grads).unwrap());
    assert!(grad.iter().all(|g| g.is_finite()), "{grad:?}");
}
backend_test!(a_zero_token_has_finite_gradients, zero_vector);

fn half_tokens<B: TrainingBackend>() {
    if !B::supports_dtype(&B::Device::default(), DType::BF16) {
        skip("the_router_computes_in_f32_for_bf16_tokens", "no BF16 here");
        return;
    }
    let config = MoeConfig::new(6, 5, 4).with_top_k(2);
    let (moe, params) = layer::<B>(&config, 1);
    // Multiples of 1/64 are exact in bf16, so that only a bf16 router could differ.
    let x: Vec<f64> = Rng::new(2)
        .vec(7 * 6)
        .iter()
        .map(|v| (v * 64.0).round() / 64.0)
        .collect();
    let tokens = tensor::<B, 2>(&x, [7, 6]).cast(FloatDType::BF16);
    let routing = moe.without_noise().router.route(tokens).unwrap();
    assert_eq!(routing.logits.dtype(), DType::F32);
    assert_eq!(routing.gating.weights.dtype(), DType::F32);
    let host_moe = HostMoe {
        config: &config,
        params: &params,
    };
    assert_near("logits", &host(routing.logits), &host_moe.logits(&x), 1e-5);
}
backend_test!(the_router_computes_in_f32_for_bf16_tokens, half_tokens);
