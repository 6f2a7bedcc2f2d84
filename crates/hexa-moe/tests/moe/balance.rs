//! The auxiliary losses: values and gradients, in f64 on the CPU's tensors and in f32.

use burn::tensor::{DType, Int, Tensor, TensorData};
use hexa_moe::TrainingBackend;
use hexa_moe::balance::{gshard_loss, load_importance_loss, z_loss};
use hexa_ops::backend_test;
use hexa_ops::host::upload;
use hexa_ops::testing::compare::host;
use hexa_ops::testing::gradcheck::central_differences;
use hexa_ops::testing::oracle::{Gating, topk_gating};

use crate::host;
use crate::support::{Rng, assert_near, tensor};

/// `[tokens, num_experts, top_k]`: one token, primes, top_k = num_experts, one expert.
const SHAPES: [[usize; 3]; 6] = [
    [1, 4, 1],
    [7, 5, 2],
    [13, 3, 3],
    [11, 1, 1],
    [2, 2, 1],
    [31, 8, 3],
];

fn ids<B: TrainingBackend>(gating: &Gating, shape: [usize; 2]) -> Tensor<B, 2, Int> {
    let ids: Vec<i64> = gating.expert_ids.iter().map(|&id| id as i64).collect();
    upload(TensorData::new(ids, shape), &B::Device::default())
}

/// Value and gradient of a loss of one `[tokens, num_experts]` tensor.
fn check<B: TrainingBackend>(
    name: &str,
    at: &[f64],
    shape: [usize; 2],
    loss: impl Fn(Tensor<B, 2>) -> Tensor<B, 1>,
    oracle: impl Fn(&[f64]) -> f64,
) {
    let x = tensor::<B, 2>(at, shape).require_grad();
    let value = loss(x.clone());
    assert_eq!(value.dims(), [1], "{name}");
    assert_eq!(value.dtype(), DType::F32, "{name}");
    let grads = value.backward();
    let grad = x
        .grad(&grads)
        .map(host)
        .unwrap_or_else(|| vec![0.0; at.len()]);
    assert_near(
        &format!("{name} {shape:?}"),
        &host(value),
        &[oracle(at)],
        1e-4,
    );
    let want = central_differences(at, 1e-5, &oracle);
    assert_near(&format!("{name} {shape:?} gradient"), &grad, &want, 1e-3);
}

fn gshard_matches<B: TrainingBackend>() {
    for (seed, [tokens, experts, top_k]) in SHAPES.into_iter().enumerate() {
        let logits = Rng::new(seed as u64).vec(tokens * experts);
        let gating = topk_gating(&logits, experts, top_k, false);
        let ids = ids::<B>(&gating, [tokens, top_k]);
        check::<B>(
            "gshard",
            &gating.probs,
            [tokens, experts],
            |probs| gshard_loss(probs, ids.clone()),
            |probs| {
                let gating = Gating {
                    probs: probs.to_vec(),
                    ..gating.clone()
                };
                host::gshard(&gating, experts)
            },
        );
    }
}
backend_test!(gshard_matches_the_oracle, gshard_matches);

/// With noise, clean and noisy logits differ, and both have a gradient.
fn load_importance_matches<B: TrainingBackend>() {
    for (seed, [tokens, experts, top_k]) in SHAPES.into_iter().enumerate() {
        let mut rng = Rng::new(100 + seed as u64);
        let (clean, noise) = (rng.vec(tokens * experts), rng.vec(tokens * experts));
        let noisy: Vec<f64> = clean.iter().zip(&noise).map(|(l, n)| l + 0.3 * n).collect();
        let gating = topk_gating(&noisy, experts, top_k, false);
        let ids = ids::<B>(&gating, [tokens, top_k]);
        let shape = [tokens, experts];
        let gate_noise = 1.7;
        let sigma = gate_noise / experts as f64;
        let chosen = &gating.expert_ids;

        let fixed = tensor::<B, 2>(&noisy, shape);
        check::<B>(
            "load + importance, clean logits",
            &clean,
            shape,
            |l| load_importance_loss(l, fixed.clone(), ids.clone(), gate_noise),
            |l| host::load_importance(l, &noisy, chosen, top_k, sigma),
        );
        let fixed = tensor::<B, 2>(&clean, shape);
        check::<B>(
            "load + importance, noisy logits",
            &noisy,
            shape,
            |n| load_importance_loss(fixed.clone(), n, ids.clone(), gate_noise),
            |n| host::load_importance(&clean, n, chosen, top_k, sigma),
        );
    }
}
backend_test!(load_importance_matches_the_oracle, load_importance_matches);

fn z_loss_matches<B: TrainingBackend>() {
    for (seed, [tokens, experts, _]) in SHAPES.into_iter().enumerate() {
        let logits = Rng::new(200 + seed as u64).vec(tokens * experts);
        check::<B>("z", &logits, [tokens, experts], z_loss, |l| {
            host::z_loss(l, experts)
        });
    }
}
backend_test!(z_loss_matches_the_oracle, z_loss_matches);

/// `exp` of these logits overflows; the loss must not.
fn z_loss_is_stable<B: TrainingBackend>() {
    let loss = host(z_loss(tensor::<B, 2>(&[300.0, 300.0], [1, 2])));
    assert_near("z", &loss, &[(300.0 + 2f64.ln()).powi(2)], 1e-5);
}
backend_test!(z_loss_of_large_logits_is_finite, z_loss_is_stable);

/// Even use of all experts is the minimum of GShard's loss, 1, and of the variations, 0.
fn even_load<B: TrainingBackend>() {
    let logits = [[2.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 2.0]].concat();
    let gating = topk_gating(&logits, 3, 1, false);
    let ids = ids::<B>(&gating, [3, 1]);
    let logits = tensor::<B, 2>(&logits, [3, 3]);
    let gshard = host(gshard_loss(
        tensor::<B, 2>(&gating.probs, [3, 3]),
        ids.clone(),
    ));
    assert_near("gshard", &gshard, &[1.0], 1e-6);
    let variation = host(load_importance_loss(logits.clone(), logits, ids, 1.0));
    assert!(variation[0].abs() < 1e-6, "{variation:?}");
}
backend_test!(even_load_is_the_minimum, even_load);
