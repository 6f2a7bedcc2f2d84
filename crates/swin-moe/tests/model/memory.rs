//! Predicted peak memory of training steps against what the device counts.

use hexa_ops::memory::device_memory;
use hexa_ops::testing::backend::{TestBackend, skip};
use hexa_ops::{TrainingBackend, backend_test};
use swin_moe::backend::BackendKind;
use swin_moe::config::Config;
use swin_moe::train::{DeviceFaults, ProbeRequest, probe_on};

use crate::alone;

/// Experts in both stages, two passes a step, a moving average; activations are most of it.
const SETTINGS: &str = r#"
[model]
image_size = 24
patch_size = 2
embed_dim = 24
depths = [2, 1]
num_heads = [2, 4]
window_size = 6

[moe]
blocks = [[1], [0]]
num_experts = 3
top_k = 2
"#;

fn config(overrides: &[&str]) -> Config {
    Config::from_toml(SETTINGS, "the test's settings", overrides).unwrap()
}

fn prediction_is_near_the_measured_peak<B: TrainingBackend>() {
    let _alone = alone();
    let device = B::Device::default();
    if device_memory::<B>(&device).is_none() {
        skip("predicted_peak_memory", "the CPU does not count");
        return;
    }
    let backend = match TestBackend::selected().unwrap() {
        TestBackend::Cpu => BackendKind::Cpu,
        TestBackend::Cuda | TestBackend::FusionCuda => BackendKind::Cuda,
        TestBackend::Wgpu | TestBackend::FusionWgpu => BackendKind::Wgpu,
    };
    let cases: [&[&str]; 4] = [
        &["train.batch_size=16"],
        &["train.batch_size=28", "train.accumulation_steps=2"],
        &["train.batch_size=28", "train.activation_checkpointing=true"],
        &[
            "train.batch_size=4",
            "train.ema_decay=0.9",
            "model.embed_dim=72",
        ],
    ];
    for overrides in cases {
        let request = ProbeRequest {
            config: config(overrides),
            num_classes: 7,
            backend,
            steps: 2,
            faults: DeviceFaults::default(),
        };
        let probe = probe_on::<B>(&request, &device).unwrap();
        let error = probe.relative_error.unwrap();
        assert!(
            error.abs() < 0.1,
            "{overrides:?}: off by {error}: {probe:?}"
        );
    }
}

backend_test!(predicted_peak_memory, prediction_is_near_the_measured_peak);
