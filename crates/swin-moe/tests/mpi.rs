//! The trainer under `mpirun`: the same losses as one process, and a rank that is killed.

#[allow(dead_code, reason = "shared with the tests of the command line")]
#[path = "cli/harness.rs"]
mod harness;
#[allow(dead_code, reason = "shared with the tests of the command line")]
#[path = "cli/ranks.rs"]
mod ranks;

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use harness::{Said, TINY, sets, words};
use hexa_moe::parallel::fleet::Fleet;
use ranks::{QUIET, assert_close, resume, train_quiet};
use swin_moe::train::run_dir::RunDir;

/// A job that has not ended by then hangs.
const BOUND: Duration = Duration::from_secs(120);

fn main() {
    type Test = fn(&Path);
    let tests: [(&str, Test); 3] = [
        ("losses_are_those_of_one_process", equal),
        (
            "processes_are_measured_each_by_itself_and_trained_by_that",
            measured,
        ),
        (
            "a_killed_rank_ends_the_job_and_the_checkpoint_stands",
            killed,
        ),
    ];
    for (name, test) in tests {
        let dir = tempfile::tempdir().unwrap();
        test(dir.path());
        println!("test {name} ... ok");
    }
    println!(
        "test result: ok. {} passed; 0 failed; 0 ignored; 0 measured",
        tests.len()
    );
}

fn mpirun(ranks: usize, line: &str, settings: &[&str]) -> Child {
    let mut command = Command::new("mpirun");
    command.args([
        "--oversubscribe",
        "--allow-run-as-root",
        "-np",
        &ranks.to_string(),
    ]);
    command.arg(env!("CARGO_BIN_EXE_swin-moe"));
    command.args(words(line)).args(sets(settings));
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command.spawn().unwrap()
}

/// Waits for a job, within bounds.
fn ended(mut job: Child) -> Said {
    let start = Instant::now();
    while job.try_wait().unwrap().is_none() {
        if start.elapsed() > BOUND {
            job.kill().unwrap();
            panic!(
                "the job hangs: {:?}",
                Said::from(job.wait_with_output().unwrap())
            );
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    job.wait_with_output().unwrap().into()
}

fn equal(dir: &Path) {
    let one = dir.join("one");
    train_quiet(&one, &[], "--max-steps 12");
    let settings = [&TINY[..], &QUIET].concat();
    for (ranks, mode) in [(3, "--mode data --split 5,2,1"), (2, "--mode model")] {
        let several = dir.join(format!("{ranks}"));
        let line = format!(
            "train --engine mpi {mode} --max-steps 7 --output {}",
            several.display()
        );
        let said = ended(mpirun(ranks, &line, &settings));
        assert_eq!(said.status, Some(0), "{said:?}");
        // Only the lead speaks.
        assert_eq!(said.stdout.matches("report:").count(), 1, "{}", said.stdout);
        resume(&several, "--engine local --ranks 1 --max-steps 12");
        assert_close(&several, &one, 0, 1e-4);
    }
}

fn measured(dir: &Path) {
    let settings = [&TINY[..], &QUIET].concat();
    let file = dir.join("fleet.toml");
    let line = format!(
        "calibrate --engine mpi --seconds 1e-4 --output {}",
        file.display()
    );
    let said = ended(mpirun(3, &line, &settings));
    assert_eq!(said.status, Some(0), "{said:?}");
    assert_eq!(said.stdout.matches("wrote").count(), 1, "{}", said.stdout);
    let fleet = Fleet::load(&file).unwrap();
    assert_eq!((fleet.world_size(), fleet.engine.as_str()), (3, "mpi"));
    let memory: Vec<u64> = fleet.ranks.iter().filter_map(|r| r.memory_bytes).collect();
    assert!(memory.len() == 3 && memory[0] == memory[2], "{memory:?}");

    let one = dir.join("one");
    train_quiet(&one, &[], "--max-steps 6");
    let several = dir.join("several");
    let line = format!(
        "train --engine mpi --fleet {} --max-steps 3 --output {}",
        file.display(),
        several.display()
    );
    let said = ended(mpirun(3, &line, &settings));
    assert_eq!(said.status, Some(0), "{said:?}");
    let plan = |run: &Path| RunDir::open(run).unwrap().load_last().unwrap().0.state.plan;
    let chosen = plan(&several);
    assert_eq!(chosen.as_ref().map(|p| p.world_size()), Some(3));
    // As many processes go on with the same shares, others with new ones: measured, as the mode
    // is auto with a fleet.
    for (ranks, until) in [(3, 4), (2, 6)] {
        let line = format!("train --resume {} --max-steps {until}", several.display());
        let said = ended(mpirun(ranks, &line, &[]));
        assert_eq!(said.status, Some(0), "{said:?}");
        match ranks {
            3 => assert_eq!(plan(&several), chosen),
            _ => assert_eq!(plan(&several).map(|p| p.world_size()), Some(2)),
        }
    }
    assert_close(&several, &one, 0, 1e-4);
}

/// Processes whose parent is this one.
fn children(parent: u32) -> Vec<u32> {
    let entries = fs::read_dir("/proc").unwrap().flatten();
    let mut found: Vec<u32> = entries
        .filter_map(|entry| {
            let pid = entry.file_name().to_str()?.parse().ok()?;
            let stat = fs::read_to_string(entry.path().join("stat")).ok()?;
            // The name may hold anything but is the last thing in brackets.
            let (_, behind) = stat.rsplit_once(')')?;
            let of: u32 = behind.split_whitespace().nth(1)?.parse().ok()?;
            (of == parent).then_some(pid)
        })
        .collect();
    found.sort_unstable();
    found
}

fn killed(dir: &Path) {
    let run = dir.join("killed");
    let often = [
        "checkpoint.every_steps=1",
        "train.epochs=400",
        "train.eval_every_epochs=400",
    ];
    let settings = [&TINY[..], &QUIET, &often].concat();
    let line = format!(
        "train --engine mpi --split 5,2,1 --output {}",
        run.display()
    );
    let mut job = mpirun(3, &line, &settings);
    let start = Instant::now();
    let saved = || RunDir::open(&run).is_ok_and(|run| run.load_last().is_ok());
    while !saved() {
        assert!(job.try_wait().unwrap().is_none(), "the job ended by itself");
        assert!(start.elapsed() < BOUND, "no checkpoint is written");
        std::thread::sleep(Duration::from_millis(5));
    }
    let victim = children(job.id())[1];
    let kill = Command::new("kill")
        .args(["-9", &victim.to_string()])
        .status();
    assert!(kill.unwrap().success());
    let said = ended(job);
    assert_ne!(said.status, Some(0), "{said:?}");
    let text = said.stdout + &said.stderr;
    for part in ["process rank 1", "signal 9"] {
        assert!(text.contains(part), "{part}: {text}");
    }

    let (checkpoint, _) = RunDir::open(&run).unwrap().load_last().unwrap();
    let until = checkpoint.state.step + 3;
    resume(
        &run,
        &format!("--engine local --ranks 2 --max-steps {until}"),
    );
    let unbroken = dir.join("unbroken");
    train_quiet(
        &unbroken,
        &often,
        &format!("--ranks 3 --split 5,2,1 --max-steps {until}"),
    );
    assert_close(&run, &unbroken, 0, 1e-5);
}
