//! The model equals the published one, on the back-end that `HEXA_TEST_BACKEND` names.
//!
//! The reference numbers are compiled in, so that the executable can be carried to another machine.

use std::path::Path;

use hexa_ops::testing::backend::TestBackend;
use hexa_ops::{TrainingBackend, backend_test};
use swin_moe::parity::run_parity;
use swin_moe::weights::{Values, read_safetensors, write_safetensors};

/// A case's files by name.
type Files = &'static [(&'static str, &'static [u8])];

macro_rules! files {
    ($case:literal, $($file:literal),+) => {
        &[$(($file, include_bytes!(concat!("fixtures/", $case, "/", $file)).as_slice())),+]
    };
}

const TOP1_LINEAR: Files = files!(
    "top1_linear",
    "config.json",
    "io.safetensors",
    "checkpoint.pth"
);
const TOP2_COSINE: Files = files!(
    "top2_cosine",
    "config.json",
    "io.safetensors",
    "weights.safetensors"
);

fn write(files: Files, dir: &Path) {
    for (name, bytes) in files {
        std::fs::write(dir.join(name), bytes).unwrap();
    }
}

/// The CPU sums in the order of a loop over f32; GPUs sum by tiles.
fn tolerance() -> f64 {
    match TestBackend::selected().unwrap() {
        TestBackend::Cpu => 1e-4,
        _ => 1e-3,
    }
}

fn check<B: TrainingBackend>(files: Files) {
    let dir = tempfile::tempdir().unwrap();
    write(files, dir.path());
    let report = run_parity::<B>(dir.path(), &Default::default(), tolerance()).unwrap();
    println!("{report}");
    assert!(report.passed(), "{report}");
    assert!(report.rows.len() > 60, "{} rows", report.rows.len());
}

fn top1_linear<B: TrainingBackend>() {
    check::<B>(TOP1_LINEAR);
}

fn top2_cosine<B: TrainingBackend>() {
    check::<B>(TOP2_COSINE);
}

/// A model that differs in one weight must fail, or passing would mean nothing.
fn damaged<B: TrainingBackend>() {
    let dir = tempfile::tempdir().unwrap();
    write(TOP2_COSINE, dir.path());
    let path = dir.path().join("weights.safetensors");
    let mut tensors = read_safetensors(&path).unwrap();
    let weight = tensors.get_mut("layers.1.blocks.0.attn.proj.bias").unwrap();
    let Values::Float(values) = &mut weight.values else {
        panic!("not of floats");
    };
    values[7] += 0.05;
    write_safetensors(&path, &tensors).unwrap();
    let report = run_parity::<B>(dir.path(), &Default::default(), tolerance()).unwrap();
    assert!(!report.passed(), "{report}");
    assert!(report.to_string().contains("FAILED"));
}

backend_test!(linear_router_top_1, top1_linear);
backend_test!(cosine_router_top_2, top2_cosine);
backend_test!(a_changed_weight_is_noticed, damaged);
