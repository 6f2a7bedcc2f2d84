//! Damaged checkpoints are recognised, and the ones before them used.

use std::fs;
use std::path::Path;

use swin_moe::train::run_dir::RunDir;

use crate::files::Numbers;
use crate::harness::{last_checkpoint, succeed, words};
use crate::ranks::{assert_close, resume, train_quiet};

const DAMAGED: usize = 200;

/// A run of three ranks with checkpoints of steps 4 and 5.
fn run_of_three(root: &Path) {
    let every_step = ["checkpoint.every_steps=1"];
    train_quiet(root, &every_step, "--ranks 3 --split 5,2,1 --max-steps 5");
}

#[test]
fn no_damaged_checkpoint_is_loaded() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("run");
    run_of_three(&root);
    let run = RunDir::open(&root).unwrap();
    let (whole, newest) = run.load_last().unwrap();
    assert_eq!((whole.state.step, &newest), (5, &last_checkpoint(&root)));
    let mut files: Vec<_> = fs::read_dir(&newest)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    files.sort();
    assert_eq!(files.len(), 4);

    let mut numbers = Numbers(11);
    for number in 0..DAMAGED {
        let file = &files[number % files.len()];
        let good = fs::read(file).unwrap();
        let at = numbers.below(good.len());
        let mut bad = good.clone();
        if numbers.below(2) == 0 {
            bad.truncate(at);
        } else {
            for _ in 0..=numbers.below(3) {
                let byte = numbers.below(bad.len());
                bad[byte] ^= 1 << numbers.below(8);
            }
        }
        if bad == good {
            bad[at] ^= 1;
        }
        fs::write(file, bad).unwrap();
        let (loaded, path) = run.load_last().unwrap();
        assert_ne!(path, newest, "{} is damaged", file.display());
        assert_eq!(loaded.state.step, 4);
        fs::write(file, good).unwrap();
    }
    assert_eq!(run.load_last().unwrap(), (whole, newest));
}

#[test]
fn a_run_goes_on_from_the_checkpoint_before_the_damaged_one() {
    let dir = tempfile::tempdir().unwrap();
    let [unbroken, broken] = ["unbroken", "broken"].map(|name| dir.path().join(name));
    train_quiet(&unbroken, &[], "--max-steps 8");
    run_of_three(&broken);
    let newest = last_checkpoint(&broken);
    let file = newest.join("rank-0002.safetensors");
    let bytes = fs::read(&file).unwrap();
    fs::write(&file, &bytes[..bytes.len() - 1]).unwrap();

    let line = format!(
        "train --resume {} --ranks 2 --max-steps 7",
        broken.display()
    );
    let said = succeed(&words(&line));
    for part in ["rank-0002.safetensors has", "step-0000000004 instead"] {
        assert!(said.stderr.contains(part), "{}", said.stderr);
    }
    let aside = broken.join("checkpoints/damaged-step-0000000005");
    assert!(aside.is_dir());
    resume(&broken, "--ranks 1 --max-steps 8");
    assert_close(&broken, &unbroken, 0, 1e-4);
}
