//! Several ranks do what one does: losses, evaluations, checkpoints. On the CPU, ranks as threads.

use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::harness::{succeed, train_tiny, words};

/// Nothing random in the model: ranks draw noise of their own.
pub const QUIET: [&str; 4] = [
    "model.drop_path_rate=0",
    "moe.dropout=0",
    "moe.aux_loss=gshard",
    "moe.gate_noise=0",
];

pub fn train_quiet(output: &Path, settings: &[&str], line: &str) {
    let settings: Vec<&str> = QUIET.iter().chain(settings).copied().collect();
    train_tiny(output, &settings, line);
}

pub fn resume(run: &Path, line: &str) {
    succeed(&words(&format!("train --resume {} {line}", run.display())));
}

/// The records of a kind.
fn records(run: &Path, kind: &str) -> Vec<Value> {
    let text = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    text.lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap())
        .filter(|record| record["kind"] == kind)
        .collect()
}

/// Compares the losses of all steps from `first` on, and what else the global batch determines.
#[track_caller]
pub fn assert_close(a: &Path, b: &Path, first: usize, tolerance: f64) {
    let (a, b) = (records(a, "step"), records(b, "step"));
    assert_eq!(a.len(), b.len());
    assert!(a.len() > first);
    for (a, b) in a.iter().zip(&b).skip(first) {
        assert_eq!(a["step"], b["step"]);
        assert_eq!(a["lr"], b["lr"]);
        for key in ["loss", "ce_loss", "aux_loss", "grad_norm"] {
            let (x, y) = (a[key].as_f64().unwrap(), b[key].as_f64().unwrap());
            let bound = tolerance * y.abs().max(1.0);
            assert!(
                (x - y).abs() <= bound,
                "step {} {key}: {x} and {y}",
                a["step"]
            );
        }
        for (a, b) in a["layers"]
            .as_array()
            .unwrap()
            .iter()
            .zip(b["layers"].as_array().unwrap())
        {
            let tokens = |layer: &Value| -> u64 {
                let counts = layer["tokens_per_expert"].as_array().unwrap();
                counts.iter().map(|count| count.as_u64().unwrap()).sum()
            };
            assert_eq!(tokens(a), tokens(b));
            for key in ["entropy_nats", "gate_weight", "z"] {
                let mean = |layer: &Value| layer["router"][key].as_f64().unwrap();
                let (x, y) = (mean(a), mean(b));
                let bound = tolerance * y.abs().max(1.0);
                assert!((x - y).abs() <= bound, "router's {key}: {x} and {y}");
            }
        }
    }
}

#[test]
fn losses_are_those_of_one_rank() {
    let dir = tempfile::tempdir().unwrap();
    let one = dir.path().join("one");
    train_quiet(&one, &[], "");
    for (name, line) in [
        ("2-data", "--ranks 2"),
        ("3-data-split", "--ranks 3 --split 5,2,1"),
        ("3-model-split", "--ranks 3 --mode model --split 5,2,1"),
        ("2-data-all-on-one", "--ranks 2 --split 1,0"),
        ("2-model-all-on-one", "--ranks 2 --split 0,1 --mode model"),
    ] {
        let several = dir.path().join(name);
        train_quiet(&several, &[], line);
        assert_close(&several, &one, 0, 1e-4);
        let log = fs::read_to_string(several.join("rank-1.log")).unwrap();
        assert!(
            log.starts_with("rank 1 of ") && log.contains("step 15/15"),
            "{log}"
        );
        for (a, b) in records(&several, "eval").iter().zip(records(&one, "eval")) {
            assert_eq!(a["images"], b["images"]);
            for key in ["loss", "train_ce_loss", "train_aux_loss"] {
                let (x, y) = (a[key].as_f64().unwrap(), b[key].as_f64().unwrap());
                assert!((x - y).abs() <= 1e-4, "{name} {key}: {x} and {y}");
            }
        }
    }
}

/// Batches so small that some ranks have no image in some of them, or ever.
#[test]
fn ranks_without_images_take_part() {
    let dir = tempfile::tempdir().unwrap();
    let small = ["train.batch_size=3", "train.epochs=1"];
    let one = dir.path().join("one");
    train_quiet(&one, &small, "--max-steps 12");
    for (name, line) in [
        ("data", "--max-steps 12 --ranks 4 --split 5,2,1,0"),
        ("model", "--max-steps 12 --ranks 5 --mode model"),
    ] {
        let several = dir.path().join(name);
        train_quiet(&several, &small, line);
        assert_close(&several, &one, 0, 1e-4);
    }
}

/// The optimizer packs small tensors together, and which slices are small differs between ranks.
#[test]
fn slices_may_be_large_on_some_ranks_only() {
    let dir = tempfile::tempdir().unwrap();
    // 12 experts of 32 × 2,048 weights, so that 2^18 lies between the two shares, and in front of
    // an MLP of as many weights.
    let wide = [
        "moe.blocks=[[0],[-1]]",
        "moe.num_experts=12",
        "model.embed_dim=32",
        "model.mlp_ratio=64",
        "train.batch_size=8",
    ];
    let one = dir.path().join("one");
    train_quiet(&one, &wide, "--max-steps 3");
    for (name, line) in [
        ("model", "--max-steps 3 --ranks 2 --mode model --split 3,1"),
        ("data", "--max-steps 3 --ranks 2 --split 1,3"),
    ] {
        let several = dir.path().join(name);
        train_quiet(&several, &wide, line);
        assert_close(&several, &one, 0, 1e-4);
    }
}

/// Parts of a step, mixed images and averaged weights: what is mixed with what does not depend on
/// ranks. The balance loss does depend on what is a part, and is left out.
#[test]
fn the_recipe_is_that_of_one_rank() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = [
        "moe.aux_loss_weight=0",
        "train.accumulation_steps=3",
        "train.ema_decay=0.99",
        "train.label_smoothing=0.1",
        "train.batch_size=40",
        "train.epochs=1",
        "augment.mixup=0.8",
        "augment.cutmix=1.0",
    ];
    let one = dir.path().join("one");
    train_quiet(&one, &recipe, "--max-steps 12");
    let several = dir.path().join("several");
    train_quiet(&several, &recipe, "--max-steps 7 --ranks 3 --split 20,19,1");
    resume(&several, "--ranks 2 --mode model --max-steps 12");
    assert_close(&several, &one, 0, 1e-4);
}

/// What a run that was never broken would have said next, whoever goes on with it.
#[test]
fn a_checkpoint_is_one_for_any_number_of_ranks() {
    let dir = tempfile::tempdir().unwrap();
    let unbroken = dir.path().join("unbroken");
    train_quiet(&unbroken, &[], "--ranks 3 --split 5,2,1");
    let broken = dir.path().join("broken");
    train_quiet(&broken, &[], "--ranks 3 --split 5,2,1 --max-steps 4");
    resume(&broken, "--ranks 2 --max-steps 7");
    resume(&broken, "--ranks 1 --max-steps 9");
    resume(&broken, "--ranks 2 --mode model --split 1,0 --max-steps 11");
    resume(&broken, "--ranks 3 --split 1,3,2 --mode data");
    assert_close(&broken, &unbroken, 0, 1e-5);
}

#[test]
fn an_evaluation_depends_on_neither_ranks_nor_batches() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("run");
    train_quiet(&run, &[], "--max-steps 5");
    let eval = |line: &str| {
        let line = format!("eval --run {} {line}", run.display());
        succeed(&words(&line)).stdout
    };
    let whole = eval("");
    assert!(whole.contains("359 images"), "{whole}");
    for batch_size in [1, 7, 64] {
        for ranks in ["1", "2", "3 --split 5,2,1", "3 --mode model"] {
            let line = format!("--batch-size {batch_size} --ranks {ranks}");
            assert_eq!(eval(&line), whole, "{line}");
        }
    }
}

#[test]
fn jobs_that_cannot_be_are_refused() {
    for (line, reason) in [
        ("train --ranks 0", "parallel.ranks is 0"),
        (
            "train --ranks 2 --split 1,2,3",
            "parallel.split is 3 numbers long",
        ),
        ("train --ranks 2 --split 0,0", "at least one weight above 0"),
        ("train --ranks 2 --split 1,-1", "parallel.split[1] is -1"),
        ("train --ranks 2 --split 1,nan", "parallel.split[1] is NaN"),
        ("train --ranks 2 --mode tokens", "data, model"),
        ("train --engine threads", "local, mpi"),
        (
            "train --ranks 2 --mode auto --split 1,2",
            "leave the split out, or choose the mode data or model",
        ),
        ("train --ranks 2 --rebalance always", "off, auto"),
        (
            "train --ranks 2 --set train.activation_checkpointing=true",
            "train.activation_checkpointing is true and there are 2 ranks",
        ),
        (
            "train --ranks 2 --rebalance auto --rebalance-threshold=-0.1",
            "parallel.rebalance_threshold is -0.1",
        ),
    ] {
        let said = crate::harness::run(&words(line));
        assert!(said.stderr.contains(reason), "{line}: {}", said.stderr);
        assert!(matches!(said.status, Some(1 | 2)), "{line}: {said:?}");
    }
}
