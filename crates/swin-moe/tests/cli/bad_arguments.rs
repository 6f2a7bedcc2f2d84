//! Arguments that contradict each other, are incomplete, or name what is not there.

use std::path::Path;

use crate::bad_input::Case;
use crate::harness::words;

pub fn cases(scratch: &Path) -> Vec<Case> {
    std::fs::create_dir(scratch.join("no-run")).unwrap();
    std::fs::create_dir(scratch.join("in-use")).unwrap();
    std::fs::write(scratch.join("in-use/file.txt"), "mine").unwrap();
    std::fs::write(scratch.join("plain-file"), "mine").unwrap();
    let mut cases: Vec<Case> = [
        ("no command", "--config C", "--config"),
        ("an unknown command", "trian", "train"),
        ("an unknown option", "train --lr 3", "--lr"),
        (
            "resume with a config",
            "train --resume R --config C",
            "--config",
        ),
        (
            "resume with a setting",
            "train --resume R --set a.b=1",
            "--set",
        ),
        ("resume with a seed", "train --resume R --seed 1", "--seed"),
        (
            "resume with an output",
            "train --resume R --output O",
            "--output",
        ),
        ("a seed that is no number", "train --seed one", "--seed"),
        ("a negative seed", "train --seed=-1", "--seed"),
        (
            "a seed of 64 bits",
            "train --seed 18446744073709551615",
            "--seed",
        ),
        (
            "steps that are no number",
            "train --max-steps 1.5",
            "--max-steps",
        ),
        (
            "an unknown back-end",
            "train --backend tpu",
            "cpu, wgpu and cuda",
        ),
        (
            "ranks and back-ends that differ",
            "calibrate --ranks 3 --backend cpu,cpu",
            "2 back-ends for 3 ranks",
        ),
        ("no ranks", "calibrate --ranks 0", "allowed is 1..=1024"),
        ("no windows", "throughput --windows 0", "--windows"),
        ("no steps", "throughput --steps 0", "--steps"),
        (
            "no images to time",
            "throughput --mode eval --batch-size 0",
            "train.eval_batch_size",
        ),
        ("an unknown mode", "throughput --mode fast", "train, eval"),
        (
            "no time to measure",
            "calibrate --ranks 1 --seconds 0",
            "--seconds is 0",
        ),
        (
            "no memory",
            "calibrate --ranks 1 --memory-gib=-2",
            "--memory-gib is -2",
        ),
        (
            "a process with several back-ends",
            "calibrate --engine mpi --backend cpu,cpu",
            "--backend names 2 back-ends, allowed is one with --engine mpi",
        ),
        (
            "a run on a fleet that is not there",
            "train --output run-fleet --fleet /nowhere/fleet.toml",
            "write one with `swin-moe calibrate`",
        ),
        (
            "a fleet and a split",
            "train --fleet F --split 1,2",
            "cannot be used with",
        ),
        ("a plan without a fleet", "plan", "--fleet"),
        (
            "a fleet that is not there",
            "plan --fleet /nowhere/fleet.toml",
            "write one with `swin-moe calibrate`",
        ),
        ("neither run nor checkpoint", "eval", "--run"),
        (
            "run and checkpoint",
            "eval --run R --checkpoint C",
            "cannot be used with",
        ),
        (
            "info of a run and a config",
            "info --run R --config C",
            "cannot be used with",
        ),
        (
            "info of a run and settings",
            "info --run R --set a.b=1",
            "cannot be used with",
        ),
        ("no images", "predict --run R", "IMAGE"),
        ("no images to inspect", "inspect --run R", "IMAGE"),
        (
            "pictures of a checkpoint without a directory",
            "inspect --checkpoint R x.png",
            "--output",
        ),
        ("no weights", "import --config C --output O", "WEIGHTS"),
        ("no cases", "parity", "DIR"),
        ("export to nowhere", "export --run R", "--output"),
        (
            "a tolerance of nothing",
            "parity no-run --tolerance 0",
            "--tolerance",
        ),
        (
            "a tolerance that is no number",
            "parity no-run --tolerance NaN",
            "--tolerance",
        ),
        (
            "resume of nothing",
            "train --resume missing",
            "no such run directory",
        ),
        (
            "resume of what is no run",
            "train --resume no-run",
            "there is no checkpoint",
        ),
        (
            "resume of a file",
            "train --resume plain-file",
            "no such run directory",
        ),
        (
            "eval of what is no run",
            "eval --run no-run",
            "there is no checkpoint",
        ),
        (
            "a missing checkpoint",
            "predict --checkpoint missing x.png",
            "missing",
        ),
        (
            "a directory as checkpoint",
            "info --checkpoint no-run",
            "no-run",
        ),
        ("an output in use", "train --output in-use", "not empty"),
        (
            "an output that is a file",
            "train --output plain-file",
            "it is a file",
        ),
        (
            "an output below a file",
            "train --output plain-file/run",
            "plain-file",
        ),
        (
            "an output that cannot be",
            "train --output /proc/none/run",
            "/proc/none",
        ),
    ]
    .into_iter()
    .map(|(name, line, says)| Case::new(name, words(line), &[says]))
    .collect();
    // This program has the CPU at least; what else it has follows from its features.
    for (backend, is_missing) in [
        ("cuda", !cfg!(feature = "cuda")),
        ("wgpu", !cfg!(feature = "wgpu")),
    ] {
        if is_missing {
            let line = format!("train --output run-{backend} --backend {backend}");
            let says = format!("--features {backend}");
            cases.push(Case::new("a missing back-end", words(&line), &[&says]));
        }
    }
    cases
}
