//! PyTorch implementations, timed by a program of their own on the same machine.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use crate::case::{Shape, Timings};
use crate::report::Report;
use crate::{Arguments, BackendName};

/// A row of the program's output; times in seconds, ascending.
#[derive(Deserialize)]
struct PeerRow {
    peer: String,
    shape: [usize; 5],
    forward_s: Vec<f64>,
    forward_backward_s: Vec<f64>,
    extra_bytes: Option<u64>,
}

/// Times the peers at the same shapes, on the GPU if one of our back-ends is CUDA, and adds their
/// rows. A peer that fails says so on standard error and has no row.
///
/// # Errors
/// If the program cannot be started, fails as a whole, or prints something else than its rows.
pub fn measure(
    python: &Path,
    program: &Path,
    modules: &[String],
    arguments: &Arguments,
    report: &mut Report,
) -> Result<()> {
    let on_gpu = arguments.backend.contains(&BackendName::Cuda);
    let mut command = Command::new(python);
    command
        .arg(program)
        .args(["--device", if on_gpu { "cuda" } else { "cpu" }])
        .args(["--dtype", arguments.dtype.torch()])
        .args(["--skew", &arguments.skew.to_string()])
        .args(["--repetitions", &arguments.repetitions.to_string()])
        .stderr(Stdio::inherit());
    for shape in &arguments.shapes {
        command.args(["--shape", &shape.to_string()]);
    }
    for module in modules {
        command.args(["--peer", module]);
    }
    let output = command
        .output()
        .with_context(|| format!("starting {} {}", python.display(), program.display()))?;
    ensure!(
        output.status.success(),
        "{} ended with {}; see its message above",
        program.display(),
        output.status
    );
    let rows: Vec<PeerRow> = serde_json::from_slice(&output.stdout)
        .with_context(|| format!("{} printed no rows", program.display()))?;
    for row in rows {
        let [tokens, d_model, d_ff, num_experts, top_k] = row.shape;
        let shape = Shape {
            tokens,
            d_model,
            d_ff,
            num_experts,
            top_k,
        };
        let timings = Timings {
            forward_s: row.forward_s,
            forward_backward_s: row.forward_backward_s,
            extra_bytes: row.extra_bytes,
        };
        report.push(&format!("PyTorch {}", row.peer), shape, timings);
    }
    Ok(())
}
