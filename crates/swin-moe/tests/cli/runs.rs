//! A run repeats to the bit, goes on after a stop as if there had been none, and leaves what it
//! should. On the CPU.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::harness::{TINY, last_checkpoint, run, sets, succeed, train_tiny, words};

/// Steps of an epoch of [`TINY`]: 1,437 digits in batches of 240, the last partial one left out.
const STEPS_PER_EPOCH: usize = 5;
const EPOCHS: usize = 3;

pub fn records(run: &Path) -> Vec<Value> {
    fs::read_to_string(run.join("metrics.jsonl"))
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

/// All records, but for the time and memory that steps took. Numbers are written so that they read back
/// equal to the bit: equal text is equal numbers.
pub fn numbers(run: &Path) -> Vec<String> {
    records(run)
        .into_iter()
        .map(|mut record| {
            if let Some(fields) = record.as_object_mut() {
                fields.remove("images_per_s");
                fields.remove("memory");
                fields.remove("loader_wait");
            }
            record.to_string()
        })
        .collect()
}

/// The bytes of every tensor of a checkpoint: weights and moments.
pub fn tensors(run: &Path) -> BTreeMap<String, Vec<u8>> {
    let bytes = fs::read(last_checkpoint(run).join("rank-0000.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    file.iter()
        .map(|(name, view)| (name.to_owned(), view.data().to_vec()))
        .collect()
}

#[track_caller]
fn assert_same(a: &Path, b: &Path) {
    let (ours, theirs) = (numbers(a), numbers(b));
    for (line, (x, y)) in ours.iter().zip(&theirs).enumerate() {
        assert_eq!(x, y, "line {}", line + 1);
    }
    assert_eq!(ours.len(), theirs.len());
    assert_eq!(ours.len(), EPOCHS * (STEPS_PER_EPOCH + 1));
    let (ours, theirs) = (tensors(a), tensors(b));
    assert!(ours.keys().eq(theirs.keys()));
    for (name, bytes) in &ours {
        assert!(bytes == &theirs[name], "{name} differs");
    }
    let has = |prefix: &str| ours.keys().any(|name| name.starts_with(prefix));
    assert!(has("model.") && has("optimizer."));
}

fn resume(run: &Path, line: &str) {
    let resume = format!("train --resume {} {line}", run.display());
    succeed(&words(&resume));
}

#[test]
fn one_seed_gives_one_run_and_another_gives_another() {
    let dir = tempfile::tempdir().unwrap();
    let [a, b, c] = ["a", "b", "c"].map(|name| dir.path().join(name));
    train_tiny(&a, &["data.workers=1"], "--seed 5");
    train_tiny(&b, &["data.workers=2"], "--seed 5");
    train_tiny(&c, &[], "--seed 6");
    assert_same(&a, &b);
    assert_ne!(numbers(&a), numbers(&c));
}

#[test]
fn a_stopped_run_goes_on_as_if_it_had_not_been() {
    let dir = tempfile::tempdir().unwrap();
    let unbroken = dir.path().join("unbroken");
    train_tiny(&unbroken, &["data.workers=1"], "");
    // In the middle of an epoch, at its end, and in the middle of the next but one.
    for workers in ["data.workers=1", "data.workers=2"] {
        let broken = dir.path().join(workers);
        let said = train_tiny(&broken, &[workers], "--max-steps 2");
        assert!(said.stdout.contains("--resume"), "{}", said.stdout);
        assert_eq!(records(&broken).len(), 2);
        resume(&broken, "--max-steps 5");
        resume(&broken, "--max-steps 13");
        resume(&broken, "");
        assert_same(&unbroken, &broken);
        // A run that is done stays as it is.
        resume(&broken, "");
        assert_same(&unbroken, &broken);
    }
}

/// In mixed precision too; and what the device lacks is refused before anything is written.
#[test]
fn mixed_precision_repeats_and_resumes() {
    let dir = tempfile::tempdir().unwrap();
    let [unbroken, broken, refused] = ["unbroken", "broken", "refused"].map(|n| dir.path().join(n));
    for precision in ["f16", "bf16"] {
        let mixed = [format!("train.precision={precision}")];
        let mixed = [mixed[0].as_str()];
        train_tiny(&unbroken, &mixed, "");
        train_tiny(&broken, &mixed, "--max-steps 7");
        resume(&broken, "");
        assert_same(&unbroken, &broken);
        let is_scaled = |record: &Value| record["loss_scale"].as_f64() == Some(65_536.0);
        let steps = records(&unbroken)
            .into_iter()
            .filter(|r| r["kind"] == "step");
        assert!(steps.clone().count() > 1);
        assert!(
            steps
                .map(|r| is_scaled(&r))
                .all(|scaled| scaled == (precision == "f16"))
        );
        fs::remove_dir_all(&broken).unwrap();
        if precision == "f16" {
            fs::remove_dir_all(&unbroken).unwrap();
        }
    }
    let line = format!("eval --run {} --precision", unbroken.display());
    succeed(&words(&format!("{line} f32")));

    let said = run(&words(&format!("{line} tf32")));
    assert_eq!(said.status, Some(1), "{}", said.stderr);
    assert!(said.stderr.contains("f32, bf16"), "{}", said.stderr);
    let train = format!(
        "train --output {} --set train.precision=tf32",
        refused.display()
    );
    let said = run(&words(&train));
    assert_eq!(said.status, Some(1), "{}", said.stderr);
    assert!(said.stderr.contains("train.precision"), "{}", said.stderr);
    assert!(!refused.exists());
}

/// Balance losses so heavy that their gradients are too large for f16 until the scale has fallen:
/// such a step leaves weights and moments as they were.
#[test]
fn steps_with_gradients_beyond_f16_are_left_out() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    let sets = [
        "train.precision=f16",
        "train.batch_size=2",
        "moe.aux_loss_weight=100",
    ];
    train_tiny(&out, &sets, "--max-steps 1");
    let first = records(&out).remove(0);
    assert!(first["grad_norm"].is_null(), "{first}");
    assert_eq!(first["loss_scale"], 32_768.0);
    for (name, bytes) in tensors(&out) {
        if name.starts_with("optimizer.") {
            assert!(bytes.iter().all(|&byte| byte == 0), "{name}");
        }
    }
    resume(&out, "--max-steps 6");
    let steps = records(&out);
    assert_eq!(steps.len(), 6);
    let done = steps
        .iter()
        .filter(|record| record["grad_norm"].is_number());
    assert!(done.count() > 2);
}

/// Lines behind the last checkpoint, as a killed process leaves them, are written anew.
#[test]
fn a_killed_run_goes_on_from_its_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let [unbroken, killed] = ["unbroken", "killed"].map(|name| dir.path().join(name));
    train_tiny(&unbroken, &[], "");
    train_tiny(&killed, &[], "--max-steps 3");
    let path = killed.join("metrics.jsonl");
    let text = fs::read_to_string(&path).unwrap();
    let last = text.lines().last().unwrap();
    fs::write(&path, format!("{text}{last}\n{}", &last[..last.len() / 2])).unwrap();
    resume(&killed, "");
    assert_same(&unbroken, &killed);
}

#[cfg(unix)]
#[test]
fn ctrl_c_saves_and_says_how_to_go_on() {
    use crate::harness::{Said, program};
    use std::process::{Command, Stdio};
    use std::time::Duration;

    let dir = tempfile::tempdir().unwrap();
    let [unbroken, stopped] = ["unbroken", "stopped"].map(|name| dir.path().join(name));
    let settings = ["train.epochs=400", "train.eval_every_epochs=400"];
    let mut arguments = words(&format!("train --output {}", stopped.display()));
    arguments.extend(sets(&TINY));
    arguments.extend(sets(&settings));
    let mut child = program(&arguments)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // The program answers to the signal once it trains. It ends by itself should it never.
    let metrics = stopped.join("metrics.jsonl");
    let lines = || fs::read_to_string(&metrics).map_or(0, |text| text.lines().count());
    while lines() < 2 && child.try_wait().unwrap().is_none() {
        std::thread::sleep(Duration::from_millis(5));
    }
    let kill = format!("kill -INT {}", child.id());
    assert!(
        Command::new("sh")
            .args(["-c", &kill])
            .status()
            .unwrap()
            .success()
    );
    let said = Said::from(child.wait_with_output().unwrap());
    assert_eq!(said.status, Some(130), "{said:?}");
    let advice = format!("swin-moe train --resume {}", stopped.display());
    assert!(said.stdout.contains(&advice), "{}", said.stdout);

    let steps = lines();
    let until = steps + 3;
    resume(&stopped, &format!("--max-steps {until}"));
    train_tiny(&unbroken, &settings, &format!("--max-steps {until}"));
    assert_eq!(numbers(&stopped), numbers(&unbroken));
    assert_eq!(tensors(&stopped), tensors(&unbroken));
}

#[test]
fn a_run_leaves_settings_metrics_checkpoints_and_a_report() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("run");
    let said = train_tiny(&run, &[], "");
    assert!(said.stdout.contains("test accuracy"), "{}", said.stdout);

    let settings = fs::read_to_string(run.join("config.toml")).unwrap();
    let settings: toml::Table = toml::from_str(&settings).unwrap();
    assert_eq!(settings["moe"]["num_experts"].as_integer(), Some(3));
    assert_eq!(settings["train"]["epochs"].as_integer(), Some(3));

    let records = records(&run);
    let of_kind = |kind: &str| {
        let records: Vec<&Value> = records.iter().filter(|r| r["kind"] == kind).collect();
        records
    };
    assert_eq!(of_kind("step").len(), EPOCHS * STEPS_PER_EPOCH);
    assert_eq!(of_kind("eval").len(), EPOCHS);
    assert_eq!(records.len(), EPOCHS * (STEPS_PER_EPOCH + 1));
    for (kind, keys) in [
        (
            "step",
            &[
                "step",
                "epoch",
                "loss",
                "ce_loss",
                "aux_loss",
                "lr",
                "grad_norm",
                "images_per_s",
                "loader_wait",
            ][..],
        ),
        ("eval", &["epoch", "top1", "top5", "loss"]),
    ] {
        for record in of_kind(kind) {
            for key in keys {
                assert!(record[*key].is_number(), "{key} in {record}");
            }
            let layers = record["layers"].as_array().unwrap();
            assert_eq!(layers.len(), 2);
            for layer in layers {
                let mean = |key: &str| layer["router"][key].as_f64().unwrap();
                assert!((0.0..=3f64.ln() + 1e-6).contains(&mean("entropy_nats")));
                // Two of three experts: their probabilities are two thirds at least.
                assert!((1.0 / 3.0 - 1e-6..=0.5).contains(&mean("gate_weight")));
                assert!(mean("z") >= 0.0);
            }
        }
    }
    for (number, step) in of_kind("step").into_iter().enumerate() {
        assert_eq!(step["step"], number + 1);
        assert_eq!(step["epoch"], number / STEPS_PER_EPOCH + 1);
        let waited = step["loader_wait"].as_f64().unwrap();
        assert!((0.0..=1.0).contains(&waited), "{step}");
    }

    let mut checkpoints: Vec<_> = fs::read_dir(run.join("checkpoints"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    checkpoints.sort();
    let best = fs::read_to_string(run.join("checkpoints/best")).unwrap();
    assert!(checkpoints.contains(&best), "{best}");
    checkpoints.retain(|name| *name != best && name != "best");
    let last = STEPS_PER_EPOCH * EPOCHS;
    let expected = [last - STEPS_PER_EPOCH, last].map(|step| format!("step-{step:010}"));
    let expected: Vec<_> = expected.into_iter().filter(|name| *name != best).collect();
    assert_eq!(checkpoints, expected);
}

#[test]
fn the_report_is_one_page_with_every_plot() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("run");
    train_tiny(&run, &[], "");
    let page = fs::read_to_string(run.join("report.html")).unwrap();
    assert!(page.contains("of the time waiting for images"));
    for reference in ["http:", "https:", "src=", "href=", "@import", "url("] {
        assert!(!page.contains(reference), "the page refers to {reference}");
    }
    let figures: Vec<&str> = page.split("<figure>").skip(1).collect();
    for title in [
        "Loss",
        "Test accuracy, %",
        "Learning rate",
        "MoE layer 0: ",
        "MoE layer 1: ",
    ] {
        let figure = figures
            .iter()
            .find(|figure| figure.starts_with(&format!("<figcaption>{title}")))
            .unwrap_or_else(|| panic!("no plot of {title}"));
        assert!(figure.contains("<svg"), "{title} is not drawn");
        assert!(
            figure.contains("<path") || figure.contains("<poly"),
            "{title} is empty"
        );
    }
}
