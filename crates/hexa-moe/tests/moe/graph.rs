//! The whole layer under burn-fusion and under both checkpointing strategies.

use burn::backend::Autodiff;
use burn::backend::autodiff::checkpoint::strategy::BalancedCheckpointing;
use hexa_moe::{Activation, BalanceConfig, MoeConfig, RouterConfig, TrainingBackend};
use hexa_ops::testing::compare::host;
use hexa_ops::{ExpertKernels, backend_test};

use crate::support::{Named, Rng, assert_near, gradients, layer, tensor};

const TOKENS: usize = 23;
const D: usize = 7;

/// Both routers, plain and gated experts, biases trained, frozen and absent, a shared expert.
fn configs() -> [MoeConfig; 3] {
    let base = MoeConfig::new(D, 11, 5).with_top_k(2);
    let cosine = RouterConfig::Cosine {
        dim: 3,
        init_temperature: 0.5,
    };
    [
        base.clone()
            .with_balance(BalanceConfig::load_importance(0.5).with_z_loss(0.1)),
        base.clone()
            .with_router(cosine)
            .with_normalize_gate(true)
            .with_activation(Activation::SwiGlu)
            .with_train_fc2_bias(false)
            .with_balance(BalanceConfig::gshard(0.5)),
        base.with_bias(false)
            .with_shared_d_ff(5)
            .with_activation(Activation::Silu),
    ]
}

/// Everything that a training step computes, by name, between operations that a back-end may fuse
/// or recompute.
fn step<B: TrainingBackend>(config: &MoeConfig) -> Named {
    let (moe, _) = layer::<B>(config, 31);
    let moe = moe.without_noise();
    let values = Rng::new(32).vec(TOKENS * D);
    let x = tensor::<B, 2>(&values, [TOKENS, D]).require_grad();
    let out = moe.forward(x.clone().mul_scalar(1.5).add_scalar(0.25));
    let counts = out.load.read().unwrap().tokens_per_expert;
    let output = host(out.output.clone());
    let aux_loss = host(out.aux_loss.clone());
    let grads = (out.output.tanh().sum() + out.aux_loss).backward();

    let mut named = gradients::<B, _>(&moe, &grads);
    named.insert("dx".into(), host(x.grad(&grads).expect("x is tracked")));
    named.insert("output".into(), output);
    named.insert("aux_loss".into(), aux_loss);
    let counts = counts.into_iter().map(|count| count as f64).collect();
    named.insert("tokens_per_expert".into(), counts);
    named
}

/// Fused operations may round differently in the last place, expert operators may not be fused.
fn same_numbers_with_fusion<P: ExpertKernels, F: ExpertKernels>() {
    for config in configs() {
        let plain = step::<Autodiff<P>>(&config);
        let fused = step::<Autodiff<F>>(&config);
        assert!(plain.keys().eq(fused.keys()), "{:?}", fused.keys());
        assert_eq!(plain["tokens_per_expert"], fused["tokens_per_expert"]);
        for (name, plain) in &plain {
            assert_near(&format!("{name}: {config:?}"), &fused[name], plain, 1e-5);
        }
    }
}
backend_test!(fusion fusion_gives_the_same_numbers, same_numbers_with_fusion);

/// What is recomputed is what would have been kept, to the bit.
fn same_bits_with_checkpointing<K: ExpertKernels>() {
    for config in configs() {
        let kept = step::<Autodiff<K>>(&config);
        let recomputed = step::<Autodiff<K, BalancedCheckpointing>>(&config);
        assert_eq!(kept, recomputed, "{config:?}");
    }
}
backend_test!(kernels checkpointing_changes_no_bit, same_bits_with_checkpointing);
