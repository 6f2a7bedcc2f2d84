//! Upcycled layers against the dense network that they were made of.

use hexa_moe::{
    Activation, DenseFfn, ExpertNoise, MoeConfig, MoeError, RouterConfig, TrainingBackend,
};
use hexa_ops::backend_test;
use hexa_ops::testing::compare::host;

use crate::host::HostMoe;
use crate::support::{Named, Rng, assert_near, generator_lock, gradients, layer, tensor};

/// A dense network, which is a layer of one expert, and its values.
fn dense<B: TrainingBackend>(config: &MoeConfig, seed: u64) -> (DenseFfn<B>, MoeConfig, Named) {
    let one = MoeConfig {
        num_experts: 1,
        top_k: 1,
        shared_d_ff: 0,
        router: RouterConfig::Linear,
        ..config.clone()
    };
    let (moe, params) = layer::<B>(&one, seed);
    let experts = moe.experts;
    let [_, d_model, hidden] = experts.w1.dims();
    let [_, d_ff, _] = experts.w2.dims();
    let dense = DenseFfn {
        w1: experts.w1.val().reshape([d_model, hidden]),
        b1: experts.b1.map(|b1| b1.val().reshape([hidden])),
        w2: experts.w2.val().reshape([d_ff, d_model]),
        b2: experts.b2.map(|b2| b2.val().reshape([d_model])),
    };
    (dense, one, params)
}

fn copies<B: TrainingBackend>() {
    // Routers are drawn when they are first used.
    let _lock = generator_lock();
    let base = MoeConfig::new(5, 7, 4).with_normalize_gate(true);
    let cosine = RouterConfig::Cosine {
        dim: 3,
        init_temperature: 0.5,
    };
    let cases = [
        (base.clone(), 11),
        (base.clone().with_top_k(2).with_router(cosine), 13),
        // The softmax over all experts sums to one by itself.
        (base.clone().with_normalize_gate(false).with_top_k(4), 1),
        (base.clone().with_bias(false).with_top_k(3), 6),
        (base.clone().with_activation(Activation::SwiGlu), 9),
        (
            base.clone().with_shared_d_ff(3).with_train_fc2_bias(false),
            7,
        ),
    ];
    for (seed, (config, tokens)) in cases.iter().enumerate() {
        let what = format!("{config:?}");
        let (dense, one, params) = dense::<B>(config, 70 + seed as u64);
        let moe = config.upcycle(dense, None).unwrap().without_noise();
        let values = Rng::new(seed as u64).vec(tokens * config.d_model);
        let oracle = HostMoe {
            config: &one,
            params: &params,
        };
        let x = tensor::<B, 2>(&values, [*tokens, config.d_model]);
        let output = moe.try_forward(x).unwrap().output;
        let want = oracle.forward(&values).output;
        assert_near(&what, &host(output.clone()), &want, 1e-5);

        // All of it trains, but for a second bias that the configuration freezes.
        let got = gradients::<B, _>(&moe, &output.sum().backward());
        assert!(got.contains_key("experts.w1") && got.contains_key("experts.w2"));
        let has_b2 = config.bias && config.train_fc2_bias;
        assert_eq!(got.contains_key("experts.b2"), has_b2, "{what}");
        assert_eq!(got.contains_key("shared.w2"), config.shared_d_ff > 0);
    }
}
backend_test!(copies_compute_the_dense_network, copies);

/// Gate weights that do not sum to one scale the dense output, token by token.
fn scaled<B: TrainingBackend>() {
    // Routers are drawn when they are first used.
    let _lock = generator_lock();
    let config = MoeConfig::new(5, 7, 4).with_top_k(2);
    let (dense, one, params) = dense::<B>(&config, 5);
    let moe = config.upcycle(dense, None).unwrap().without_noise();
    let values = Rng::new(6).vec(11 * 5);
    let x = tensor::<B, 2>(&values, [11, 5]);
    let gates = moe.router.route(x.clone()).unwrap().gating.weights;
    let gates = host(gates.sum_dim(1));
    let oracle = HostMoe {
        config: &one,
        params: &params,
    };
    let mut want = oracle.forward(&values).output;
    for (row, gate) in want.chunks_mut(5).zip(&gates) {
        assert!(*gate < 0.9, "{gate}");
        row.iter_mut().for_each(|y| *y *= gate);
    }
    assert_near("y", &host(moe.forward(x).output), &want, 1e-5);
}
backend_test!(plain_gates_scale_the_dense_output, scaled);

fn noise<B: TrainingBackend>() {
    let config = MoeConfig::new(31, 37, 3);
    let (dense, ..) = dense::<B>(&config, 5);
    let upcycle = |std, seed| {
        let noise = ExpertNoise { std, seed };
        config.upcycle(dense.clone(), Some(noise)).unwrap().experts
    };
    let (a, same, other) = (upcycle(0.1, 1), upcycle(0.1, 1), upcycle(0.1, 2));
    let copy = host(dense.w1.clone());
    let values = host(a.w1.val());
    assert_eq!(values, host(same.w1.val()));
    assert_ne!(values, host(other.w1.val()));
    assert_eq!(host(upcycle(0.0, 1).w1.val())[..copy.len()], copy);
    // Relative deviations: mean 0 and standard deviation 0.1, expert by expert and across them.
    let mut all = Vec::new();
    for expert in values.chunks(copy.len()) {
        let pairs = expert.iter().zip(&copy).filter(|(_, w)| w.abs() > 1e-3);
        let relative: Vec<f64> = pairs.map(|(got, w)| got / w - 1.0).collect();
        let n = relative.len() as f64;
        let mean = relative.iter().sum::<f64>() / n;
        let std = (relative.iter().map(|r| r * r).sum::<f64>() / n).sqrt();
        assert!(
            mean.abs() < 0.015 && (std - 0.1).abs() < 0.01,
            "{mean} {std}"
        );
        all.push(relative);
    }
    assert!(all[0] != all[1] && all[1] != all[2]);
    let b1 = host(dense.b1.clone().unwrap());
    assert_eq!(host(a.b1.unwrap().val()), b1.repeat(3));
}
backend_test!(noise_is_relative_and_seeded, noise);

fn refused<B: TrainingBackend>() {
    let config = MoeConfig::new(5, 7, 4);
    let (dense, ..) = dense::<B>(&config, 5);
    let says = |config: &MoeConfig, dense: DenseFfn<B>, noise: Option<ExpertNoise>, text: &str| {
        let error: MoeError = config.upcycle(dense, noise).unwrap_err();
        assert!(error.to_string().contains(text), "{error}");
    };
    let device = B::Device::default();
    let transposed = DenseFfn {
        w1: dense.w1.clone().transpose(),
        ..dense.clone()
    };
    says(
        &config,
        transposed,
        None,
        "w1 has shape [7, 5], expected [5, 7]",
    );
    let wide = DenseFfn {
        b2: Some(burn::tensor::Tensor::zeros([7], &device)),
        ..dense.clone()
    };
    says(&config, wide, None, "b2 has shape [7], expected [5]");
    let gated = config.clone().with_activation(Activation::GeGlu);
    says(&gated, dense.clone(), None, "expected [5, 14]");
    let plain = config.clone().with_bias(false);
    says(&plain, dense.clone(), None, "dense feed-forward has b1");
    for std in [-0.1, f64::NAN, f64::INFINITY] {
        let noise = ExpertNoise { std, seed: 0 };
        says(&config, dense.clone(), Some(noise), "finite number >= 0");
    }
}
backend_test!(what_does_not_fit_is_an_error, refused);
