//! What makes the layer a Burn module: records, conversions, displays, initial values.

use burn::module::{AutodiffModule, Module};
use burn::record::{BinBytesRecorder, FullPrecisionSettings, Recorder};
use hexa_moe::{Moe, MoeConfig, RouterConfig, TrainingBackend};
use hexa_ops::backend_test;
use hexa_ops::testing::compare::host;

use crate::support::{Rng, generator_lock, gradients, layer, tensor};

fn config() -> MoeConfig {
    MoeConfig::new(6, 9, 5)
        .with_top_k(2)
        .with_router(RouterConfig::Cosine {
            dim: 4,
            init_temperature: 0.5,
        })
        .with_shared_d_ff(3)
        .with_train_fc2_bias(false)
}

fn input<B: TrainingBackend>() -> burn::Tensor<B, 2> {
    tensor(&Rng::new(9).vec(7 * 6), [7, 6])
}

/// Names of the parameters that receive gradients.
fn trained<B: TrainingBackend>(moe: &Moe<B>) -> Vec<String> {
    let out = moe.clone().without_noise().forward(input::<B>());
    let grads = (out.output.sum() + out.aux_loss).backward();
    gradients::<B, _>(moe, &grads).into_keys().collect()
}

fn record<B: TrainingBackend>() {
    let device = B::Device::default();
    let (saved, params) = layer::<B>(&config(), 1);
    let recorder = BinBytesRecorder::<FullPrecisionSettings>::default();
    let bytes = recorder.record(saved.clone().into_record(), ()).unwrap();

    let _lock = generator_lock();
    let fresh = config().init::<B>(&device).unwrap();
    let loaded = fresh.load_record(recorder.load(bytes, &device).unwrap());
    assert_eq!(
        loaded.num_params(),
        params.values().map(Vec::len).sum::<usize>()
    );
    let output = |moe: &Moe<B>| host(moe.valid().forward(input::<B>().inner()).output);
    assert_eq!(output(&loaded), output(&saved));
    assert_eq!(trained(&loaded), trained(&saved));
}
backend_test!(a_record_gives_the_layer_back, record);

/// Burn loads a record of other shapes without complaint; the layer then says what is wrong.
fn foreign_record<B: TrainingBackend>() {
    let device = B::Device::default();
    let (wide, _) = layer::<B>(&MoeConfig::new(8, 9, 5), 1);
    let narrow = MoeConfig::new(6, 9, 5).init::<B>(&device).unwrap();
    let error = narrow
        .load_record(wide.into_record())
        .try_forward(input::<B>())
        .unwrap_err();
    assert!(error.to_string().contains("shape"), "{error}");
}
backend_test!(a_record_of_other_shapes_is_an_error, foreign_record);

fn conversions<B: TrainingBackend>() {
    let (moe, _) = layer::<B>(&config().with_expert_dropout(0.5), 1);
    let valid = moe.valid();
    let quiet = moe.clone().without_noise().forward(input::<B>());
    let out = valid.forward(input::<B>().inner());
    assert_eq!(host(out.output), host(quiet.output));
    assert_eq!(host(out.aux_loss), host(quiet.aux_loss));

    let names = trained(&moe);
    assert!(!names.iter().any(|name| name.ends_with(".b2")), "{names:?}");
    assert!(names.iter().any(|name| name == "experts.b1"), "{names:?}");
    let back = Moe::<B>::from_inner(valid);
    assert_eq!(trained(&back), names);
    assert_eq!(back.experts.dropout, 0.5);
}
backend_test!(valid_and_back_keeps_everything, conversions);

/// A layer that was never used is still lazy; its frozen bias must stay frozen, too.
fn lazy_conversions<B: TrainingBackend>() {
    let _lock = generator_lock();
    let moe = config().init::<B>(&B::Device::default()).unwrap();
    let back = Moe::<B>::from_inner(moe.valid());
    assert!(!trained(&back).iter().any(|name| name.ends_with(".b2")));
}
backend_test!(a_lazy_frozen_bias_stays_frozen, lazy_conversions);

fn initial_values<B: TrainingBackend>() {
    let _lock = generator_lock();
    let device = B::Device::default();
    B::seed(&device, 11);
    let moe = MoeConfig::new(32, 64, 5)
        .with_init_std(0.005)
        .with_router_init_std(0.3)
        .with_router(RouterConfig::cosine())
        .init::<B>(&device)
        .unwrap();
    let std =
        |values: Vec<f64>| (values.iter().map(|v| v * v).sum::<f64>() / values.len() as f64).sqrt();
    for weight in [&moe.experts.w1, &moe.experts.w2] {
        assert!((std(host(weight.val())) / 0.005 - 1.0).abs() < 0.05);
    }
    for bias in [&moe.experts.b1, &moe.experts.b2] {
        assert!(host(bias.as_ref().unwrap().val()).iter().all(|&b| b == 0.0));
    }
    let hexa_moe::Scorer::Cosine(cosine) = &moe.router.scorer else {
        panic!("a cosine router was asked for");
    };
    assert!((std(host(cosine.cosine_projector.weight.val())) / 0.3 - 1.0).abs() < 0.05);
    let log_scale = host(cosine.temperature.val());
    assert!((log_scale[0] - 2f64.ln()).abs() < 1e-6, "{log_scale:?}");
}
backend_test!(initial_values_follow_the_configuration, initial_values);

fn display<B: TrainingBackend>() {
    let (moe, _) = layer::<B>(&config(), 1);
    let text = format!("{moe}");
    for part in ["experts", "router", "shared", "params"] {
        assert!(text.contains(part), "{part} is not in {text}");
    }
}
backend_test!(the_layer_can_be_printed, display);
