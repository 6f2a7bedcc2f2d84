//! The published recipe's parts in the trainer: repeats, restarts, averages, accumulation.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde_json::Value;
use swin_moe::config::Config;

use crate::harness::{succeed, train_tiny, words};

/// Everything random that a recipe has, on grey digits.
const RECIPE: [&str; 11] = [
    "augment.rand_augment=rand-m9-mstd0.5-inc1",
    "augment.random_erasing=0.25",
    "augment.mixup=0.8",
    "augment.cutmix=1.0",
    "augment.mix_probability=0.8",
    "train.label_smoothing=0.1",
    "train.ema_decay=0.9",
    "train.accumulation_steps=3",
    "train.epochs=2",
    "train.precision=bf16",
    "augment.flip=true",
];

type Tensors = BTreeMap<String, Vec<f32>>;

fn tensors(run: &Path) -> Tensors {
    let bytes = fs::read(run.join("checkpoints/last.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    file.iter()
        .map(|(name, view)| {
            let values = view.data().chunks_exact(4);
            let values = values.map(|b| f32::from_le_bytes(b.try_into().unwrap()));
            (name.to_owned(), values.collect())
        })
        .collect()
}

fn bits(tensors: &Tensors) -> Vec<(&String, Vec<u32>)> {
    let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect();
    tensors.iter().map(|(name, v)| (name, bits(v))).collect()
}

fn records(run: &Path) -> Vec<Value> {
    let text = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

#[test]
fn the_whole_recipe_repeats_and_resumes() {
    let dir = tempfile::tempdir().unwrap();
    let [unbroken, broken] = ["unbroken", "broken"].map(|name| dir.path().join(name));
    let with_workers = |workers| [&RECIPE[..], &[workers]].concat();
    train_tiny(&unbroken, &with_workers("data.workers=1"), "");
    train_tiny(&broken, &with_workers("data.workers=2"), "--max-steps 3");
    for line in ["--max-steps 7", ""] {
        let resume = format!("train --resume {} {line}", broken.display());
        succeed(&words(&resume));
    }
    let (ours, theirs) = (tensors(&unbroken), tensors(&broken));
    assert!(ours.keys().any(|name| name.contains("average.")));
    assert!(bits(&ours) == bits(&theirs));
    assert!(ours.values().flatten().all(|v| v.is_finite()));
}

/// What evaluation during training has said, a later one says, of the averaged weights.
#[test]
fn averages_follow_their_rule_and_are_what_is_evaluated() {
    let dir = tempfile::tempdir().unwrap();
    let settings = ["train.ema_decay=0.3", "train.epochs=1"];
    let run = |steps: usize| {
        let run = dir.path().join(steps.to_string());
        train_tiny(&run, &settings, &format!("--max-steps {steps}"));
        tensors(&run)
    };
    let states = [1, 2, 3].map(run);
    for step in [2, 3] {
        let decay = f64::min(0.3, (1.0 + step as f64) / (10.0 + step as f64));
        let (before, after) = (&states[step - 2], &states[step - 1]);
        let mut compared = 0;
        for (name, averages) in after {
            let Some(name) = name.strip_prefix("optimizer.average.") else {
                continue;
            };
            let old = &before[&format!("optimizer.average.{name}")];
            let params = &after[&format!("model.{name}")];
            for ((&got, &old), &new) in averages.iter().zip(old).zip(params) {
                let expected = decay * f64::from(old) + (1.0 - decay) * f64::from(new);
                assert!((f64::from(got) - expected).abs() < 1e-6, "{name}");
                compared += usize::from(old != new);
            }
        }
        assert!(compared > 1000, "{compared}");
    }

    let whole = dir.path().join("whole");
    train_tiny(&whole, &settings, "");
    let last = records(&whole).pop().unwrap();
    let top1 = last["top1"].as_f64().unwrap();
    let loss = last["loss"].as_f64().unwrap();
    let said = succeed(&words(&format!("eval --run {}", whole.display())));
    let expected = format!("top-1 {top1:.2} %");
    assert!(
        said.stdout.contains(&expected),
        "{} {expected}",
        said.stdout
    );
    assert!(
        said.stdout.contains(&format!("loss {loss:.4}")),
        "{}",
        said.stdout
    );
}

/// Without anything that depends on the whole batch, the parts' gradients add up to its own.
#[test]
fn accumulated_gradients_are_those_of_the_whole() {
    let dir = tempfile::tempdir().unwrap();
    let mut first = Vec::new();
    for parts in [1, 7] {
        let run = dir.path().join(parts.to_string());
        let parts = format!("train.accumulation_steps={parts}");
        let settings = [
            "moe.gate_noise=0.0",
            "moe.dropout=0.0",
            "moe.aux_loss_weight=0.0",
            "model.drop_path_rate=0.0",
            "augment.mixup=0.8",
            &parts,
        ];
        train_tiny(&run, &settings, "--max-steps 2");
        first.push(records(&run));
    }
    for (whole, parts) in first[0].iter().zip(&first[1]) {
        for key in ["ce_loss", "grad_norm"] {
            let [whole, parts] = [whole, parts].map(|record| record[key].as_f64().unwrap());
            assert!(
                (whole - parts).abs() < 1e-4 * whole.abs(),
                "{key}: {whole} {parts}"
            );
        }
    }
}

/// Every configuration of the project is valid, and what a run writes down reads back the same.
#[test]
fn the_configurations_are_valid() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs");
    let mut seen = 0;
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let config = Config::load::<&str>(Some(&path), &[]).unwrap();
        let again = Config::from_toml::<&str>(&config.to_toml(), "written", &[]).unwrap();
        assert_eq!(config, again, "{}", path.display());
        seen += 1;
    }
    assert!(seen >= 6, "{seen}");
}
