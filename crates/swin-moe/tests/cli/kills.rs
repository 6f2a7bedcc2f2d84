//! Runs that are killed at random moments go on as if nothing had been.

use std::path::Path;
use std::process::{Child, Stdio};
use std::time::Duration;

use swin_moe::train::run_dir::RunDir;

use crate::files::Numbers;
use crate::harness::{program, train_tiny, words};
use crate::ranks::{assert_close, resume, train_quiet};
use crate::runs::{numbers, tensors};

/// A checkpoint after each step: about as much time goes into writing as into computing.
const EVERY_STEP: [&str; 3] = [
    "checkpoint.every_steps=1",
    "train.epochs=400",
    "train.eval_every_epochs=400",
];

fn start(run: &Path) -> Child {
    program(&words(&format!("train --resume {}", run.display())))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

/// Resumes and kills (SIGKILL) `kills` times; gives the step that the last checkpoint is of.
fn kill(run: &Path, kills: usize, seed: u64) -> u64 {
    let mut random = Numbers(seed);
    for _ in 0..kills {
        let mut child = start(run);
        std::thread::sleep(Duration::from_micros(random.below(300_000) as u64));
        child.kill().unwrap();
        assert_eq!(child.wait().unwrap().code(), None, "it ended by itself");
    }
    let (checkpoint, _) = RunDir::open(run).unwrap().load_last().unwrap();
    checkpoint.state.step
}

#[test]
fn twenty_kills_leave_no_trace() {
    let dir = tempfile::tempdir().unwrap();
    let [unbroken, killed] = ["unbroken", "killed"].map(|name| dir.path().join(name));
    train_tiny(&killed, &EVERY_STEP, "--max-steps 1");
    let until = kill(&killed, 20, 3) + 2;
    resume(&killed, &format!("--max-steps {until}"));
    train_tiny(&unbroken, &EVERY_STEP, &format!("--max-steps {until}"));
    assert_eq!(numbers(&killed), numbers(&unbroken));
    assert_eq!(tensors(&killed), tensors(&unbroken));
}

#[test]
fn ten_kills_of_three_ranks_cost_steps_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let [unbroken, killed] = ["unbroken", "killed"].map(|name| dir.path().join(name));
    let ranks = "--ranks 3 --split 5,2,1 --max-steps";
    train_quiet(&killed, &EVERY_STEP, &format!("{ranks} 1"));
    let until = kill(&killed, 10, 4) + 2;
    resume(&killed, &format!("--max-steps {until}"));
    train_quiet(&unbroken, &EVERY_STEP, &format!("{ranks} {until}"));
    assert_close(&killed, &unbroken, 0, 1e-5);
}
