//! Checkpoints: published names, round trips, damage. On the CPU; nothing here depends on the
//! back-end.

use std::path::PathBuf;

use burn::tensor::{Tensor, TensorData};
use hexa_moe::ExpertNoise;
use hexa_ops::backends::Cpu;
use proptest::prelude::*;
use swin_moe::model::{SwinMoe, SwinMoeConfig};
use swin_moe::weights::{
    HostTensor, ImportOptions, Names, PublishedConfig, TensorMap, Values, WeightsError,
    export_safetensors, import_file, import_tensors, named_parameters, published_tensors,
    read_file, upcycle_tensors, write_safetensors,
};
use tempfile::TempDir;

const STRICT: ImportOptions = ImportOptions {
    allow_partial: false,
};
const PARTIAL: ImportOptions = ImportOptions {
    allow_partial: true,
};

/// Configuration, name of the weight file and weights of a case, compiled in so that the
/// executable runs on any machine.
fn fixture(case: &str) -> (&'static [u8], &'static str, &'static [u8]) {
    match case {
        "top1_linear" => (
            include_bytes!("fixtures/top1_linear/config.json"),
            "checkpoint.pth",
            include_bytes!("fixtures/top1_linear/checkpoint.pth"),
        ),
        _ => (
            include_bytes!("fixtures/top2_cosine/config.json"),
            "weights.safetensors",
            include_bytes!("fixtures/top2_cosine/weights.safetensors"),
        ),
    }
}

fn config(case: &str) -> SwinMoeConfig {
    let (_dir, path) = scratch("config.json", fixture(case).0);
    PublishedConfig::read(&path).unwrap().to_model().unwrap()
}

fn model(case: &str) -> SwinMoe<Cpu> {
    config(case).init(&Default::default()).unwrap()
}

/// A case's weights as a file.
fn weights(case: &str) -> (TempDir, PathBuf) {
    let (_, name, bytes) = fixture(case);
    scratch(name, bytes)
}

const CASES: [&str; 2] = ["top1_linear", "top2_cosine"];

fn scratch(name: &str, bytes: &[u8]) -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(name);
    std::fs::write(&path, bytes).unwrap();
    (dir, path)
}

#[test]
fn an_export_is_the_published_state_dictionary() {
    for case in CASES {
        let (_dir, path) = weights(case);
        let published = read_file(&path).unwrap();
        let (model, report) = import_file(model(case), &path, STRICT).unwrap();
        assert!(report.is_exact(), "{report}");
        assert_eq!(report.loaded + report.buffers.len(), published.len());

        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("export.safetensors");
        export_safetensors(&model, &path).unwrap();
        let exported = read_file(&path).unwrap();
        let names = |map: &TensorMap| map.keys().cloned().collect::<Vec<_>>();
        assert_eq!(names(&exported), names(&published));
        for (name, tensor) in &published {
            assert_eq!(tensor.shape, exported[name].shape, "{name}");
            // The table of offsets is computed, the rest is copied.
            if !name.ends_with("relative_coords_table") {
                assert_eq!(*tensor, exported[name], "{name}");
            }
        }
        let (again, _) = import_file(self::model(case), &path, STRICT).unwrap();
        assert_eq!(published_tensors(&again).unwrap(), exported);
    }
}

#[test]
fn every_parameter_has_its_own_published_name() {
    for case in CASES {
        // What is trained is known with autodiff only.
        let model = model(case)
            .config()
            .init::<burn::backend::Autodiff<hexa_ops::backends::Cpu>>(&Default::default())
            .unwrap();
        let params = named_parameters(&model, Names::new(model.config()));
        let (_dir, path) = weights(case);
        let published = read_file(&path).unwrap();
        let mut names: Vec<&str> = params.iter().map(|p| p.name.as_str()).collect();
        names.sort_unstable();
        let before = names.len();
        names.dedup();
        assert_eq!(names.len(), before);
        for param in &params {
            let theirs = &published[&param.name];
            let elements = |shape: &[usize]| shape.iter().product::<usize>();
            assert_eq!(
                elements(&param.shape),
                elements(&theirs.shape),
                "{}",
                param.name
            );
        }
        let frozen: Vec<&str> = params
            .iter()
            .filter(|p| !p.trained)
            .map(|p| p.name.as_str())
            .collect();
        if case == "top1_linear" {
            assert_eq!(frozen.len(), 2, "{frozen:?}");
            assert!(
                frozen
                    .iter()
                    .all(|name| name.ends_with("experts.batched_fc2_bias"))
            );
        } else {
            assert_eq!(frozen, [""; 0]);
        }
    }
}

#[test]
fn every_misfit_is_reported() {
    let (_dir, path) = weights("top2_cosine");
    let mut tensors = read_file(&path).unwrap();
    let gone = tensors.remove("layers.1.downsample.norm.bias").unwrap();
    tensors.insert("layers.1.downsample.norm.offset".into(), gone);
    tensors.insert(
        "head.weight".into(),
        HostTensor::float([72, 7], vec![0.0; 504]),
    );
    tensors.insert("norm.bias".into(), HostTensor::int([72], vec![0; 72]));

    let (_, report) = import_tensors(model("top2_cosine"), tensors.clone());
    assert!(!report.is_exact());
    assert_eq!(report.missing, ["layers.1.downsample.norm.bias"]);
    assert_eq!(report.unexpected, ["layers.1.downsample.norm.offset"]);
    let names: Vec<&str> = report.mismatched.iter().map(|m| m.name.as_str()).collect();
    assert_eq!(names, ["norm.bias", "head.weight"]);
    assert_eq!(report.mismatched[1].expected, [7, 72]);
    assert_eq!(report.mismatched[1].got, [72, 7]);

    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("other.safetensors");
    write_safetensors(&path, &tensors).unwrap();
    let error = import_file(model("top2_cosine"), &path, STRICT).unwrap_err();
    let message = error.to_string();
    for part in [
        "missing     layers.1.downsample.norm.bias",
        "unexpected  layers.1.downsample.norm.offset",
        "mis-shaped  head.weight: file [72, 7], model [7, 72]",
        "mis-shaped  norm.bias: file [72] of integers, model [72]",
        "allow a partial import",
    ] {
        assert!(message.contains(part), "{message}");
    }

    let fresh = model("top2_cosine");
    let before = published_tensors(&fresh).unwrap();
    let (partial, _) = import_file(fresh, &path, PARTIAL).unwrap();
    let after = published_tensors(&partial).unwrap();
    assert_eq!(after["head.weight"], before["head.weight"]);
    assert_eq!(after["head.bias"], tensors["head.bias"]);
}

#[test]
fn the_configuration_of_another_model_does_not_fit() {
    let (_dir, path) = weights("top2_cosine");
    let error = import_file(model("top1_linear"), &path, STRICT).unwrap_err();
    assert!(matches!(error, WeightsError::Mismatch { .. }), "{error}");
}

#[test]
fn files_of_other_kinds_are_refused() {
    for (name, bytes, expected) in [
        ("weights.onnx", &b"x"[..], "unknown kind of checkpoint"),
        ("weights", b"x", "unknown kind of checkpoint"),
        ("weights.safetensors", b"", "not a readable checkpoint"),
        (
            "weights.safetensors",
            b"\xff\xff\xff\xff\xff\xff\xff\x7f{}",
            "not a readable checkpoint",
        ),
        ("weights.pth", b"", "not a readable checkpoint"),
        ("weights.pth", b"\x80\x02}q\x00.", "PyTorch 1.6"),
    ] {
        let (_dir, path) = scratch(name, bytes);
        let message = read_file(&path).unwrap_err().to_string();
        assert!(message.contains(expected), "{name}: {message}");
    }
    let dir = tempfile::tempdir().unwrap();
    let missing = dir.path().join("missing.pth");
    assert!(matches!(read_file(&missing), Err(WeightsError::Io { .. })));
    assert!(read_file(dir.path()).is_err());
    let unwritable = dir.path().join("no/such/folder/x.safetensors");
    assert!(write_safetensors(&unwritable, &TensorMap::new()).is_err());
}

#[test]
fn the_published_configuration_is_checked() {
    for (text, expected) in [
        ("{", "EOF"),
        (r#"{"embed_dims": 3}"#, "unknown field `embed_dims`"),
        (r#"{"depths": "2"}"#, "invalid type"),
    ] {
        let (_dir, path) = scratch("config.json", text.as_bytes());
        let message = PublishedConfig::read(&path).unwrap_err().to_string();
        assert!(message.contains(expected), "{message}");
    }
}

/// A dense model with random parameters, biases included, and the case's model with experts.
fn dense_and_experts(case: &str) -> (SwinMoe<Cpu>, SwinMoeConfig) {
    let mut experts = config(case);
    experts.fc2_bias = true;
    experts.moe.normalize_gate = true;
    let mut dense = experts.clone();
    dense.moe_blocks = vec![vec![]; dense.depths.len()];
    let model: SwinMoe<Cpu> = dense.init(&Default::default()).unwrap();
    let mut tensors = published_tensors(&model).unwrap();
    for (number, tensor) in tensors.values_mut().enumerate() {
        if let Values::Float(values) = &mut tensor.values {
            for (i, value) in values.iter_mut().enumerate() {
                *value += 0.05 * ((i * 37 + number * 11) as f32).sin();
            }
        }
    }
    let (model, report) = import_tensors(model, tensors);
    assert!(report.is_exact(), "{report}");
    (model, experts)
}

/// Scores of a few images.
fn logits(model: &SwinMoe<Cpu>) -> Vec<f32> {
    let config = model.config();
    let shape = [3, config.in_chans, config.image_size, config.image_size];
    let pixels = (0..shape.iter().product()).map(|i: usize| (i as f32 * 0.7).sin());
    let data = TensorData::new(pixels.collect::<Vec<f32>>(), shape);
    let images = Tensor::from_data(data, &Default::default());
    let logits = model.forward(images).unwrap().logits;
    logits.into_data().to_vec().unwrap()
}

#[test]
fn an_upcycled_model_computes_what_the_dense_one_does() {
    for case in CASES {
        let (dense, config) = dense_and_experts(case);
        let want = logits(&dense);
        let spread = want.iter().fold(0f32, |m, v| m.max((v - want[0]).abs()));
        assert!(spread > 0.1, "{want:?}");
        let tensors = published_tensors(&dense).unwrap();
        let upcycle = |noise| {
            let source = std::path::Path::new("dense.pth");
            let tensors = tensors.clone();
            upcycle_tensors::<Cpu>(&config, tensors, noise, source, &Default::default())
        };
        let (model, report) = upcycle(None).unwrap();
        assert_eq!(report.loaded + report.buffers.len(), tensors.len());
        let farthest = |got: &[f32]| {
            let pairs = got.iter().zip(&want);
            pairs
                .map(|(got, want)| (got - want).abs())
                .fold(0f32, f32::max)
        };
        let error = farthest(&logits(&model));
        assert!(error <= 1e-5, "{case}: {error:e}");

        // Noise of the same seed gives the same experts; each layer has draws of its own.
        let noise = |seed| Some(ExpertNoise { std: 0.2, seed });
        let experts = |noise| {
            let (model, _) = upcycle(noise).unwrap();
            assert!(farthest(&logits(&model)) > 1e-3);
            let mut all = published_tensors(&model).unwrap();
            all.retain(|name, _| name.ends_with("batched_fc1_w"));
            all
        };
        let noisy = experts(noise(1));
        assert_eq!(noisy.len(), config.num_moe_layers());
        assert_eq!(noisy, experts(noise(1)));
        assert_ne!(noisy, experts(noise(2)));
    }
}

#[test]
fn what_cannot_be_upcycled_is_said() {
    let (dense, config) = dense_and_experts("top1_linear");
    let tensors = published_tensors(&dense).unwrap();
    let refused = |config: &SwinMoeConfig, tensors: &TensorMap, says: &[&str]| {
        let source = std::path::Path::new("dense.pth");
        let device = Default::default();
        let error = upcycle_tensors::<Cpu>(config, tensors.clone(), None, source, &device);
        let message = error.unwrap_err().to_string();
        for says in says {
            assert!(message.contains(says), "{says}: {message}");
        }
    };
    let mut without = config.clone();
    without.moe_blocks = vec![vec![]; 2];
    refused(&without, &tensors, &["dense.pth", "moe.blocks"]);
    let mut relu = config.clone();
    relu.moe.activation = hexa_moe::Activation::Relu;
    refused(&relu, &tensors, &["moe.activation"]);
    let (_dir, path) = weights("top1_linear");
    refused(&config, &read_file(&path).unwrap(), &["experts already"]);

    let block = "layers.1.blocks.1.mlp";
    let mut fewer = tensors.clone();
    fewer.retain(|name, _| !name.starts_with(block));
    let [weight, bias] =
        ["fc1.weight", "fc2.bias"].map(|leaf| format!("missing     {block}.{leaf}"));
    refused(&config, &fewer, &["does not fit the model", &weight, &bias]);
    let mut wide = config.clone();
    wide.mlp_ratio = 2.0;
    refused(
        &wide,
        &tensors,
        &[&format!("mis-shaped  {block}.fc1.weight")],
    );
    let mut unbiased = config.clone();
    unbiased.fc2_bias = false;
    refused(
        &unbiased,
        &tensors,
        &[&format!("unexpected  {block}.fc2.bias")],
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    /// Neither format may be cut anywhere without an error, and never with a panic.
    #[test]
    fn truncated_checkpoints_are_errors(part in 0.0f64..1.0) {
        for case in CASES {
            let (_, name, bytes) = fixture(case);
            let end = (bytes.len() as f64 * part) as usize;
            let (_dir, cut) = scratch(name, &bytes[..end]);
            prop_assert!(read_file(&cut).is_err(), "{name} cut at {end}");
        }
    }

    /// Damaged bytes are an error or other numbers, never a panic; the zip's checksums notice
    /// damaged numbers, too.
    #[test]
    fn damaged_checkpoints_do_not_panic(part in 0.0f64..1.0, run in 1usize..64, value: u8) {
        for case in CASES {
            let (_, name, bytes) = fixture(case);
            let mut bytes = bytes.to_vec();
            // Both formats keep their index within a few kilobytes of an end.
            for region in [0..16_384, bytes.len() - 16_384..bytes.len(), 0..bytes.len()] {
                let at = region.start + (region.len() as f64 * part) as usize;
                let end = (at + run).min(bytes.len());
                bytes[at..end].fill(value);
                let (_dir, damaged) = scratch(name, &bytes);
                if let Ok(tensors) = read_file(&damaged) {
                    import_tensors(model(case), tensors);
                }
            }
        }
    }
}
