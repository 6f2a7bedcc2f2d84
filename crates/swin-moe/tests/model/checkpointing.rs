//! Activations that are computed a second time, against those that are kept.

use std::collections::BTreeMap;

use burn::tensor::{Tensor, TensorData};
use hexa_moe::{BalanceConfig, RouterConfig};
use hexa_ops::{TrainingBackend, backend_test};
use swin_moe::config::Freeze;
use swin_moe::model::{SwinMoe, SwinMoeConfig};
use swin_moe::train::pass::{LossWeights, Pass, by_segments, whole};
use swin_moe::train::{Targets, cross_entropy};
use swin_moe::weights::{Names, named_gradients};

use crate::{alone, floats, images, small};

const WEIGHTS: LossWeights = LossWeights {
    label_smoothing: 0.1,
    ce: 0.75,
    aux: 0.5,
    scale: 8.0,
};

fn noisy() -> SwinMoeConfig {
    let mut config = small();
    config.moe.router = RouterConfig::Cosine {
        dim: 5,
        init_temperature: 0.5,
    };
    config.moe.balance = BalanceConfig::load_importance(0.3);
    config.moe.dropout = 0.2;
    config.drop_path = 0.4;
    config.init_std = 0.3;
    config
}

fn targets<B: TrainingBackend>(device: &B::Device) -> Targets<B> {
    let classes = |labels: [i32; 5]| Tensor::from_data(TensorData::from(labels), device);
    Targets {
        labels: classes([4, 0, 2, 2, 1]),
        mixed: Some((classes([1, 3, 0, 2, 4]), 0.3)),
    }
}

fn seed(segment: usize) -> u64 {
    17 * segment as u64 + 3
}

/// One graph of the whole model, each segment with the seed that the second pass will have.
fn one_graph<B: TrainingBackend>(
    model: &SwinMoe<B>,
    images: Tensor<B, 4>,
    targets: Targets<B>,
) -> Pass<B> {
    let (device, batch) = (images.device(), images.dims()[0]);
    let mut x = model.embed(images).unwrap();
    let mut aux_loss = Tensor::<B, 1>::zeros([1], &device);
    let mut loads = Vec::new();
    for (number, segment) in model.segments().enumerate() {
        B::seed(&device, seed(number));
        let (y, report) = segment.forward(x).unwrap();
        x = y;
        if let Some(report) = report {
            aux_loss = aux_loss + report.aux_loss;
            loads.push(report.load);
        }
    }
    let logits = model.classify(model.pool(x, batch)).unwrap();
    let ce_loss = cross_entropy(logits, targets, WEIGHTS.label_smoothing) * WEIGHTS.ce;
    let aux_loss = aux_loss * WEIGHTS.aux;
    Pass {
        gradients: vec![((ce_loss.clone() + aux_loss.clone()) * WEIGHTS.scale).backward()],
        ce_loss: ce_loss.inner(),
        aux_loss: aux_loss.inner(),
        loads,
    }
}

/// Every trained parameter's gradient; it is in one of the containers alone.
fn gradients<B: TrainingBackend>(
    model: &SwinMoe<B>,
    found: &[B::Gradients],
) -> BTreeMap<String, Vec<f32>> {
    let mut all = BTreeMap::new();
    for part in found {
        for (name, tensor) in named_gradients(model, part, Names::new(model.config())).unwrap() {
            let values = tensor.as_floats().unwrap().to_vec();
            assert!(all.insert(name.clone(), values).is_none(), "{name} twice");
        }
    }
    all
}

#[track_caller]
fn assert_near(what: &str, got: &[f32], want: &[f32]) {
    let largest = want.iter().fold(0f32, |most, v| most.max(v.abs()));
    assert_eq!(got.len(), want.len(), "{what}");
    for (a, b) in got.iter().zip(want) {
        assert!((a - b).abs() <= 1e-5 * largest + 1e-9, "{what}: {a} {b}");
    }
}

fn compare<B: TrainingBackend>(model: &SwinMoe<B>, got: Pass<B>, want: Pass<B>) {
    assert_near("ce", &floats(got.ce_loss), &floats(want.ce_loss));
    assert_near("aux", &floats(got.aux_loss), &floats(want.aux_loss));
    let loads = |pass: &[hexa_moe::LoadStats<B>]| -> Vec<_> {
        let reports = pass.iter().map(|load| load.read().unwrap());
        reports.map(|report| report.tokens_per_expert).collect()
    };
    assert_eq!(loads(&got.loads), loads(&want.loads));
    let want = gradients(model, &want.gradients);
    let got = gradients(model, &got.gradients);
    assert!(got.keys().eq(want.keys()));
    assert!(got.len() > 40);
    for (name, values) in &got {
        assert_near(name, values, &want[name]);
    }
}

fn what_is_dropped_is_dropped_twice<B: TrainingBackend>() {
    let _alone = alone();
    let device = Default::default();
    B::seed(&device, 8);
    let config = noisy();
    let model: SwinMoe<B> = config.init(&device).unwrap();
    let x = images::<B>(&config, 5, &device);
    let want = one_graph(&model, x.clone(), targets(&device));
    let got = by_segments(&model, x, targets(&device), WEIGHTS, seed).unwrap();
    compare(&model, got, want);
}

fn without_noise_it_is_the_whole_pass<B: TrainingBackend>() {
    let _alone = alone();
    let device = Default::default();
    B::seed(&device, 9);
    let mut config = noisy();
    config.moe.balance = BalanceConfig::gshard(0.2);
    let model: SwinMoe<B> = config.init(&device).unwrap();
    let model = model.without_noise();
    let x = images::<B>(&config, 5, &device);
    let want = whole(&model, x.clone(), targets(&device), WEIGHTS, Freeze::None).unwrap();
    let got = by_segments(&model, x, targets(&device), WEIGHTS, seed).unwrap();
    compare(&model, got, want);
}

backend_test!(
    activation_checkpointing_with_noise,
    what_is_dropped_is_dropped_twice
);
backend_test!(activation_checkpointing, without_noise_it_is_the_whole_pass);
