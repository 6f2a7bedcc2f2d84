//! The layer against the naive loop: output, losses, load and every gradient.

use burn::tensor::{DType, FloatDType};
use hexa_moe::{
    Activation, BalanceConfig, Moe, MoeConfig, MoeError, RouterConfig, TrainingBackend,
};
use hexa_ops::backend_test;
use hexa_ops::testing::backend::{TestBackend, skip};
use hexa_ops::testing::compare::host;

use crate::host::HostMoe;
use crate::support::{Rng, assert_near, gradients, layer, tensor};

fn check<B: TrainingBackend>(config: &MoeConfig, tokens: usize, seed: u64) {
    let what = format!("{config:?}, {tokens} tokens");
    let d = config.d_model;
    let (moe, params) = layer::<B>(config, seed);
    let moe = moe.without_noise();
    let mut rng = Rng::new(seed ^ 0xabcd);
    let (values, direction) = (rng.vec(tokens * d), rng.vec(tokens * d));

    let x = tensor::<B, 2>(&values, [tokens, d]).require_grad();
    let out = moe.try_forward(x.clone()).unwrap();
    let oracle = HostMoe {
        config,
        params: &params,
    };
    let want = oracle.forward(&values);
    assert_near(
        &format!("y: {what}"),
        &host(out.output.clone()),
        &want.output,
        2e-5,
    );
    assert_near(
        &format!("aux: {what}"),
        &host(out.aux_loss.clone()),
        &[want.aux_loss],
        1e-4,
    );
    let mut counts = vec![0; config.num_experts];
    want.gating
        .expert_ids
        .iter()
        .for_each(|&id| counts[id] += 1);
    assert_eq!(out.load.read().unwrap().tokens_per_expert, counts, "{what}");

    let task = (out.output * tensor::<B, 2>(&direction, [tokens, d])).sum();
    let grads = (task + out.aux_loss).backward();
    let (want_x, want) = oracle.gradients(&values, &direction);
    let grad_x = host(x.grad(&grads).unwrap());
    assert_near(&format!("dx: {what}"), &grad_x, &want_x, 5e-4);
    let got = gradients::<B, _>(&moe, &grads);
    for (name, want) in &want {
        let frozen = name.ends_with(".b2") && !config.train_fc2_bias;
        assert_eq!(got.contains_key(name), !frozen, "{name}: {what}");
        if let Some(got) = got.get(name) {
            assert_near(&format!("d {name}: {what}"), got, want, 2e-3);
        }
    }
    unused_experts_have_zero_gradients(&moe, &grads, &counts);
}

/// Exactly zero without tokens.
fn unused_experts_have_zero_gradients<B: TrainingBackend>(
    moe: &Moe<B>,
    grads: &B::Gradients,
    counts: &[u64],
) {
    for weight in [&moe.experts.w1, &moe.experts.w2] {
        let [_, rows, columns] = weight.dims();
        let grad = host(weight.val().grad(grads).unwrap());
        for (expert, grad) in grad.chunks(rows * columns).enumerate() {
            // With tokens it may vanish too, if a ReLU is off for all of them; that it does not
            // otherwise is a test of the operators.
            let is_zero = grad.iter().all(|&g| g == 0.0);
            assert!(
                counts[expert] > 0 || is_zero,
                "expert {expert} of {counts:?}"
            );
        }
    }
}

fn named_cases<B: TrainingBackend>() {
    let all = BalanceConfig {
        gshard: 0.3,
        load_importance: 0.7,
        z_loss: 0.2,
    };
    let cosine = RouterConfig::Cosine {
        dim: 3,
        init_temperature: 0.5,
    };
    let base = MoeConfig::new(5, 7, 4).with_balance(all);
    let cases = [
        // The published top-1 model: linear router, untrained fc2 bias, load + importance.
        (
            base.clone()
                .with_train_fc2_bias(false)
                .with_balance(BalanceConfig::load_importance(0.5)),
            11,
        ),
        // The published top-2 model: cosine router, normalised gates, GShard.
        (
            base.clone()
                .with_top_k(2)
                .with_router(cosine)
                .with_normalize_gate(true)
                .with_balance(BalanceConfig::gshard(0.5)),
            11,
        ),
        // Every token to every expert.
        (
            base.clone()
                .with_top_k(4)
                .with_activation(Activation::SwiGlu),
            6,
        ),
        // One token; most experts empty.
        (base.clone().with_top_k(2).with_router(cosine), 1),
        // One expert.
        (MoeConfig::new(3, 2, 1).with_balance(all), 5),
        // A shared expert, no biases.
        (
            base.clone()
                .with_shared_d_ff(3)
                .with_bias(false)
                .with_activation(Activation::GeGlu),
            9,
        ),
        (
            base.with_shared_d_ff(11)
                .with_top_k(3)
                .with_train_fc2_bias(false)
                .with_normalize_gate(true),
            13,
        ),
    ];
    for (seed, (config, tokens)) in cases.iter().enumerate() {
        check::<B>(config, *tokens, 1000 + seed as u64);
    }
}
backend_test!(named_cases_match_the_naive_loop, named_cases);

fn random_layers<B: TrainingBackend>() {
    let small = TestBackend::selected().is_ok_and(TestBackend::prefers_small_shapes);
    for seed in 0..if small { 8 } else { 60 } {
        let mut rng = Rng::new(seed);
        let experts = 1 + rng.below(6);
        let config = MoeConfig::new(1 + rng.below(9), 1 + rng.below(9), experts)
            .with_top_k(1 + rng.below(experts))
            .with_activation(Activation::ALL[rng.below(Activation::ALL.len())])
            .with_router(if rng.coin() {
                RouterConfig::Linear
            } else {
                RouterConfig::Cosine {
                    dim: 2 + rng.below(5),
                    init_temperature: 0.5,
                }
            })
            .with_normalize_gate(rng.coin())
            .with_bias(rng.coin())
            .with_train_fc2_bias(rng.coin())
            .with_shared_d_ff(rng.below(3))
            .with_balance(BalanceConfig {
                gshard: rng.signed().abs(),
                load_importance: rng.signed().abs(),
                z_loss: rng.signed().abs(),
            });
        check::<B>(&config, 1 + rng.below(14), seed);
    }
}
backend_test!(random_layers_match_the_naive_loop, random_layers);

/// Any rank: the leading dimensions are tokens.
fn ranks<B: TrainingBackend>() {
    let (moe, _) = layer::<B>(&MoeConfig::new(4, 6, 3).with_top_k(2), 7);
    let moe = moe.without_noise();
    let values = Rng::new(8).vec(2 * 3 * 5 * 4);
    let flat = moe.forward(tensor::<B, 2>(&values, [30, 4]));
    let image = moe.forward(tensor::<B, 4>(&values, [2, 3, 5, 4]));
    assert_eq!(image.output.dims(), [2, 3, 5, 4]);
    assert_eq!(host(image.output), host(flat.output));
    let vector = moe.forward(tensor::<B, 1>(&values[..4], [4]));
    assert_eq!(vector.output.dims(), [4]);
}
backend_test!(leading_dimensions_are_tokens, ranks);

fn no_tokens<B: TrainingBackend>() {
    let config = MoeConfig::new(4, 6, 3).with_top_k(2).with_shared_d_ff(5);
    let (moe, _) = layer::<B>(&config, 7);
    let out = moe.try_forward(tensor::<B, 3>(&[], [2, 0, 4])).unwrap();
    assert_eq!(out.output.dims(), [2, 0, 4]);
    assert_eq!(host(out.aux_loss), [0.0]);
    let load = out.load.read().unwrap();
    assert_eq!(load.tokens_per_expert, [0, 0, 0]);
    assert_eq!(
        (load.load_entropy, load.router, load.tile_waste),
        (1.0, None, 0.0)
    );
}
backend_test!(zero_tokens_are_an_ordinary_input, no_tokens);

fn bad_width<B: TrainingBackend>() {
    let (moe, _) = layer::<B>(&MoeConfig::new(4, 6, 3), 7);
    let error = moe
        .try_forward(tensor::<B, 2>(&[0.0; 10], [2, 5]))
        .unwrap_err();
    assert_eq!(
        error,
        MoeError::Input {
            got: vec![2, 5],
            d_model: 4
        }
    );
    assert!(error.to_string().contains("[2, 5]"), "{error}");
}
backend_test!(a_wrong_token_width_is_an_error, bad_width);

fn bf16<B: TrainingBackend>() {
    if !B::supports_dtype(&B::Device::default(), DType::BF16) {
        skip("bf16_tokens_keep_their_type", "no BF16 here");
        return;
    }
    let (moe, _) = layer::<B>(
        &MoeConfig::new(8, 16, 3).with_top_k(2).with_shared_d_ff(4),
        7,
    );
    let moe = moe.without_noise();
    let values: Vec<f64> = Rng::new(8)
        .vec(40)
        .iter()
        .map(|v| (v * 64.0).round() / 64.0)
        .collect();
    let full = moe.forward(tensor::<B, 2>(&values, [5, 8]));
    let half = moe.forward(tensor::<B, 2>(&values, [5, 8]).cast(FloatDType::BF16));
    assert_eq!(half.output.dtype(), DType::BF16);
    assert_eq!(half.aux_loss.dtype(), DType::F32);
    // The router is the same to the bit.
    assert_eq!(host(half.aux_loss), host(full.aux_loss));
    assert_near(
        "bf16 output",
        &host(half.output.clone()),
        &host(full.output),
        2e-2,
    );
    // Gradients come back in the parameters' own type.
    let grads = half.output.sum().backward();
    assert_eq!(
        moe.experts.w1.val().grad(&grads).unwrap().dtype(),
        DType::F32
    );
}
backend_test!(bf16_tokens_keep_their_type, bf16);
