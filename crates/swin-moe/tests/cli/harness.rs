//! Starting the program and looking at what it said.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// A model that is done in seconds, with experts in both stages and everything random switched on.
pub const TINY: [&str; 13] = [
    "model.embed_dim=8",
    "model.depths=[1,1]",
    "model.num_heads=[2,2]",
    "model.window_size=2",
    "model.drop_path_rate=0.1",
    "moe.blocks=[[0],[0]]",
    "moe.num_experts=3",
    "moe.top_k=2",
    "moe.dropout=0.1",
    "train.batch_size=240",
    "train.epochs=3",
    "train.log_every=1",
    "augment.random_crop_padding=1",
];

/// The program with arguments.
pub fn program<S: AsRef<std::ffi::OsStr>>(arguments: &[S]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_swin-moe"));
    command
        .args(arguments)
        // A backtrace would be printed now if anything panicked out of the program.
        .env("RUST_BACKTRACE", "1")
        .env_remove("RUST_LOG")
        .env_remove("SWIN_MOE_DEBUG")
        .stdin(Stdio::null());
    command
}

/// Words of a command line; paths must not contain blanks.
pub fn words(line: &str) -> Vec<String> {
    line.split_whitespace().map(str::to_owned).collect()
}

/// `--set` for each setting.
pub fn sets(settings: &[&str]) -> Vec<String> {
    settings
        .iter()
        .flat_map(|setting| ["--set".to_owned(), (*setting).to_owned()])
        .collect()
}

/// What the program said.
#[derive(Debug)]
pub struct Said {
    pub status: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl From<Output> for Said {
    fn from(output: Output) -> Self {
        Self {
            status: output.status.code(),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

/// Runs the program to its end.
pub fn run<S: AsRef<std::ffi::OsStr>>(arguments: &[S]) -> Said {
    program(arguments).output().unwrap().into()
}

/// Runs the program, which must succeed.
#[track_caller]
pub fn succeed<S: AsRef<std::ffi::OsStr>>(arguments: &[S]) -> Said {
    let said = run(arguments);
    assert_eq!(said.status, Some(0), "{}", said.stderr);
    said
}

/// Trains [`TINY`] with further settings; `line` holds further arguments.
#[track_caller]
pub fn train_tiny(output: &Path, settings: &[&str], line: &str) -> Said {
    let mut arguments = words("train --output");
    arguments.push(output.display().to_string());
    arguments.extend(sets(&TINY));
    arguments.extend(sets(settings));
    arguments.extend(words(line));
    succeed(&arguments)
}

/// The directory of a run's latest checkpoint.
pub fn last_checkpoint(run: &Path) -> PathBuf {
    let entries = std::fs::read_dir(run.join("checkpoints")).unwrap();
    let mut steps: Vec<PathBuf> = entries
        .map(|entry| entry.unwrap().path())
        .filter(|path| {
            path.file_name()
                .unwrap()
                .to_str()
                .unwrap()
                .starts_with("step-")
        })
        .collect();
    steps.sort();
    steps.pop().unwrap()
}

/// A file of the published model's reference cases.
pub fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures")
        .join(name)
}

/// The settings of the published case `top1_linear`, as a run's configuration.
pub const TOP1_LINEAR: &str = r#"
[model]
image_size = 32
patch_size = 2
num_classes = 10
embed_dim = 24
depths = [2, 2]
num_heads = [2, 4]
window_size = 4

[moe]
blocks = [[1], [1]]
num_experts = 4
top_k = 1
fc2_bias = false
init_std = 0.005
"#;
