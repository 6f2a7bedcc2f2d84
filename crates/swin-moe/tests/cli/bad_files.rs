//! Checkpoints, runs and reference cases that are damaged, and results that cannot be written.

use std::fs;
use std::path::{Path, PathBuf};

use swin_moe::weights::{HostTensor, read_safetensors, write_safetensors};

use crate::bad_input::Case;
use crate::files::{Numbers, image_folder, write_picture};
use crate::harness::{TOP1_LINEAR, fixture, last_checkpoint, succeed, train_tiny, words};

/// Damaged copies of each kind of file.
const COPIES: usize = 8;

pub fn cases(scratch: &Path) -> Vec<Case> {
    let run = scratch.join("good-run");
    train_tiny(&run, &[], "--max-steps 3");
    let config = scratch.join("published.toml");
    fs::write(&config, TOP1_LINEAR).unwrap();
    let mut cases = checkpoints(scratch, &run);
    cases.extend(resumed(scratch, &run));
    cases.extend(parity(scratch));
    cases.extend(outputs(scratch, &run, &config));
    cases
}

fn copy_run(from: &Path, to: &Path) -> PathBuf {
    fs::create_dir_all(to.join("checkpoints")).unwrap();
    fs::copy(from.join("metrics.jsonl"), to.join("metrics.jsonl")).unwrap();
    let last = last_checkpoint(from);
    copy_checkpoint(
        &last,
        &to.join("checkpoints").join(last.file_name().unwrap()),
    );
    to.to_path_buf()
}

fn copy_checkpoint(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for name in CHECKPOINT_FILES {
        fs::copy(from.join(name), to.join(name)).unwrap();
    }
}

const CHECKPOINT_FILES: [&str; 2] = ["rank-0000.safetensors", "manifest.jsonl"];

/// Our own checkpoints: every byte is covered by a checksum.
fn checkpoints(scratch: &Path, run: &Path) -> Vec<Case> {
    let last = last_checkpoint(run);
    let mut numbers = Numbers(1);
    let mut cases = Vec::new();
    for copy in 0..COPIES {
        let path = scratch.join(format!("truncated-{copy}"));
        copy_checkpoint(&last, &path);
        let file = CHECKPOINT_FILES[copy % 2];
        let whole = fs::read(path.join(file)).unwrap();
        let length = numbers.below(whole.len());
        fs::write(path.join(file), &whole[..length]).unwrap();
        let line = match copy % 3 {
            0 => format!("eval --checkpoint {}", path.display()),
            1 => format!("info --checkpoint {}", path.display()),
            _ => format!("export --checkpoint {0} --output {0}.out", path.display()),
        };
        let name = format!("checkpoint of {length} of {} bytes", whole.len());
        cases.push(Case::new(name, words(&line), &[file]));
    }
    for copy in 0..COPIES {
        let path = scratch.join(format!("flipped-{copy}"));
        copy_checkpoint(&last, &path);
        let file = CHECKPOINT_FILES[copy % 2];
        let mut bytes = fs::read(path.join(file)).unwrap();
        let at = numbers.below(bytes.len());
        bytes[at] ^= 1 << numbers.below(8);
        fs::write(path.join(file), bytes).unwrap();
        let line = format!("eval --checkpoint {}", path.display());
        let name = format!("checkpoint with another bit in byte {at}");
        cases.push(Case::new(name, words(&line), &[file]));
    }
    let other = fixture("top2_cosine/weights.safetensors");
    let line = format!("eval --checkpoint {}", other.display());
    cases.push(Case::new(
        "published weights as a checkpoint",
        words(&line),
        &["a checkpoint is a directory"],
    ));
    cases
}

/// Runs that cannot go on.
fn resumed(scratch: &Path, run: &Path) -> Vec<Case> {
    let damaged = |name: &str, damage: &dyn Fn(&Path)| {
        let copy = copy_run(run, &scratch.join(format!("resumed-{name}")));
        damage(&copy);
        words(&format!("train --resume {}", copy.display()))
    };
    let metrics = fs::read(run.join("metrics.jsonl")).unwrap();
    let mut no_json = metrics.clone();
    no_json[5] = b'\x07';
    let mut no_text = metrics.clone();
    no_text[5] = 0xff;
    let folder = image_folder(&scratch.join("two-classes"));
    let small_batches = scratch.join("small-batches");
    train_tiny(&small_batches, &["train.batch_size=4"], "--max-steps 1");
    let with_data = words(&format!(
        "train --resume {} --data {}",
        small_batches.display(),
        folder.display()
    ));
    vec![
        Case::new(
            "resume with metrics cut short",
            damaged("short", &|run| {
                fs::write(run.join("metrics.jsonl"), &metrics[..9]).unwrap()
            }),
            &["the checkpoint was written after"],
        ),
        Case::new(
            "resume with damaged metrics",
            damaged("damaged", &|run| {
                fs::write(run.join("metrics.jsonl"), &no_json).unwrap()
            }),
            &["line 1 is not a record"],
        ),
        Case::new(
            "resume with metrics that are no text",
            damaged("text", &|run| {
                fs::write(run.join("metrics.jsonl"), &no_text).unwrap()
            }),
            &["metrics.jsonl"],
        ),
        Case::new(
            "resume without metrics",
            damaged("none", &|run| {
                fs::remove_file(run.join("metrics.jsonl")).unwrap()
            }),
            &["metrics.jsonl"],
        ),
        Case::new(
            "resume with an empty checkpoint",
            damaged("empty", &|run| {
                fs::write(last_checkpoint(run).join("manifest.jsonl"), "").unwrap();
            }),
            &["manifest.jsonl is not whole"],
        ),
        Case::new(
            "resume with other classes",
            with_data,
            &["the model knows 10 classes", "the data has 2"],
        ),
    ]
}

/// A change to the text of a case's `config.json`, and what the answer must say.
const CASES: [(&str, &str, &str, &str); 7] = [
    (
        "an unknown argument",
        "\"in_chans\"",
        "\"inchans\"",
        "inchans",
    ),
    (
        "an argument of another type",
        "\"img_size\": 32",
        "\"img_size\": \"32\"",
        "config.json",
    ),
    (
        "a cut file",
        "\"in_chans\": 3,",
        "\"in_chans\": 3",
        "config.json",
    ),
    (
        "another image size",
        "\"img_size\": 32",
        "\"img_size\": 64",
        "an export of the model",
    ),
    (
        "another width",
        "\"embed_dim\": 24",
        "\"embed_dim\": 48",
        "does not fit the model",
    ),
    (
        "a width for no machine",
        "\"embed_dim\": 24",
        "\"embed_dim\": 1048576",
        "embed_dim",
    ),
    (
        "fewer classes",
        "\"num_classes\": 10",
        "\"num_classes\": 1",
        "does not fit the model",
    ),
];

fn copy_case(to: &Path) -> PathBuf {
    fs::create_dir(to).unwrap();
    for name in ["config.json", "io.safetensors", "checkpoint.pth"] {
        fs::copy(fixture("top1_linear").join(name), to.join(name)).unwrap();
    }
    to.to_path_buf()
}

fn parity(scratch: &Path) -> Vec<Case> {
    let mut cases = Vec::new();
    let mut add = |name: &str, says: &str, damage: &dyn Fn(&Path)| {
        let dir = copy_case(&scratch.join(format!("case-{}", name.replace(' ', "-"))));
        damage(&dir);
        let arguments = words(&format!("parity {}", dir.display()));
        cases.push(Case::new(format!("parity: {name}"), arguments, &[says]));
    };
    for (name, from, to, says) in CASES {
        add(name, says, &|dir| {
            let path = dir.join("config.json");
            let text = fs::read_to_string(&path).unwrap();
            assert!(text.contains(from), "{from}");
            fs::write(&path, text.replace(from, to)).unwrap();
        });
    }
    add("no directory", "config.json", &|dir| {
        fs::remove_dir_all(dir).unwrap()
    });
    add("no weights", "neither weights.safetensors nor", &|dir| {
        fs::remove_file(dir.join("checkpoint.pth")).unwrap();
    });
    add("no numbers", "io.safetensors", &|dir| {
        fs::remove_file(dir.join("io.safetensors")).unwrap();
    });
    add("half the numbers", "io.safetensors", &|dir| {
        let path = dir.join("io.safetensors");
        let bytes = fs::read(&path).unwrap();
        fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
    });
    add("weights as numbers", "tensor input is missing", &|dir| {
        let weights = fixture("top2_cosine/weights.safetensors");
        fs::copy(weights, dir.join("io.safetensors")).unwrap();
    });
    add("labels of no class", "a label is not in", &|dir| {
        change_io(dir, "labels", |labels| {
            *labels = HostTensor::int([3], vec![0, 77, 1])
        });
    });
    add("fewer labels than images", "differ in number", &|dir| {
        change_io(dir, "labels", |labels| {
            *labels = HostTensor::int([2], vec![0, 1])
        });
    });
    add(
        "images of another shape",
        "images have shape [3, 3, 16, 64]",
        &|dir| {
            change_io(dir, "input", |input| input.shape = vec![3, 3, 16, 64]);
        },
    );
    add("images that are no images", "not of shape", &|dir| {
        change_io(dir, "input", |input| input.shape = vec![3, 3072]);
    });
    add("no images", "no image", &|dir| {
        change_io(dir, "input", |input| {
            *input = HostTensor::float([0, 3, 32, 32], vec![])
        });
        change_io(dir, "labels", |labels| {
            *labels = HostTensor::int([0], vec![])
        });
    });
    cases
}

/// Rewrites one tensor of a case's numbers.
fn change_io(dir: &Path, name: &str, change: impl Fn(&mut HostTensor)) {
    let path = dir.join("io.safetensors");
    let mut tensors = read_safetensors(&path).unwrap();
    change(tensors.get_mut(name).unwrap());
    write_safetensors(&path, &tensors).unwrap();
}

/// Results that cannot be written, and images that cannot be read.
fn outputs(scratch: &Path, run: &Path, config: &Path) -> Vec<Case> {
    let picture = scratch.join("picture.png");
    write_picture(&picture, 0, 1);
    fs::write(scratch.join("text.png"), "no image").unwrap();
    let pth = fixture("top1_linear/checkpoint.pth");
    let in_use = scratch.join("imported-in-use");
    let first = format!(
        "import {} --config {} --output {}",
        pth.display(),
        config.display(),
        in_use.display()
    );
    succeed(&words(&first));
    let run = run.display();
    let mut cases = vec![Case::new(
        "import into a run",
        words(&first),
        &["not empty"],
    )];
    for (name, line, says) in [
        (
            "predict on a missing file",
            format!("predict --run {run} missing.png"),
            "missing.png",
        ),
        (
            "predict on text",
            format!("predict --run {run} {} text.png", picture.display()),
            "text.png",
        ),
        (
            "predict on a directory",
            format!("predict --run {run} dir.pth"),
            "not a file",
        ),
        (
            "inspect a missing file",
            format!("inspect --run {run} missing.png"),
            "missing.png",
        ),
        (
            "inspect text",
            format!("inspect --run {run} {} text.png", picture.display()),
            "text.png",
        ),
        (
            "inspect into a file",
            format!(
                "inspect --run {run} {} --output text.png",
                picture.display()
            ),
            "cannot create the directory text.png",
        ),
        (
            "export below a file",
            format!("export --run {run} --output text.png/out"),
            "text.png",
        ),
        (
            "export onto a directory",
            format!("export --run {run} --output dir.pth"),
            "dir.pth",
        ),
        (
            "export to where nothing is",
            format!("export --run {run} --output /proc/none/x"),
            "/proc/none",
        ),
        (
            "eval on a missing folder",
            format!("eval --run {run} --data missing"),
            "missing",
        ),
        (
            "eval on other classes",
            format!("eval --run {run} --data two-classes"),
            "the data has 2",
        ),
    ] {
        cases.push(Case::new(name, words(&line), &[says]));
    }
    cases
}
