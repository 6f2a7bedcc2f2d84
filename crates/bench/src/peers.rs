//! PyTorch implementations, timed by a program of their own on the same machine.

use std::path::PathBuf;
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

/// The program that times peers.
pub struct Program {
    /// Interpreter.
    pub python: PathBuf,
    /// Its script.
    pub program: PathBuf,
    /// Peers of the script; all if empty.
    pub only: Vec<String>,
    /// Modules with peers of the user's.
    pub modules: Vec<String>,
}

impl Program {
    /// Times the peers at the same shapes, on the GPU if one of our back-ends is CUDA, and adds
    /// their rows. A peer that fails says so on standard error and has no row.
    ///
    /// # Errors
    /// If the program cannot be started, fails as a whole, or prints something else than its rows.
    pub fn measure(&self, arguments: &Arguments, report: &mut Report) -> Result<()> {
        let program = self.program.display();
        let output = self
            .command(arguments)
            .output()
            .with_context(|| format!("starting {} {program}", self.python.display()))?;
        ensure!(
            output.status.success(),
            "{program} ended with {}; see its message above",
            output.status
        );
        let rows: Vec<PeerRow> = serde_json::from_slice(&output.stdout)
            .with_context(|| format!("{program} printed no rows"))?;
        for row in rows {
            row.add_to(report);
        }
        Ok(())
    }

    fn command(&self, arguments: &Arguments) -> Command {
        let on_gpu = [BackendName::Cuda, BackendName::CudaPortable]
            .iter()
            .any(|backend| arguments.backend.contains(backend));
        let mut command = Command::new(&self.python);
        command
            .arg(&self.program)
            .args(["--device", if on_gpu { "cuda" } else { "cpu" }])
            .args(["--dtype", arguments.dtype.torch()])
            .args(["--skew", &arguments.skew.to_string()])
            .args(["--repetitions", &arguments.repetitions.to_string()])
            .stderr(Stdio::inherit());
        for shape in &arguments.shapes {
            command.args(["--shape", &shape.to_string()]);
        }
        for peer in &self.only {
            command.args(["--only", peer]);
        }
        for module in &self.modules {
            command.args(["--peer", module]);
        }
        command
    }
}

impl PeerRow {
    fn add_to(self, report: &mut Report) {
        let [tokens, d_model, d_ff, num_experts, top_k] = self.shape;
        let shape = Shape {
            tokens,
            d_model,
            d_ff,
            num_experts,
            top_k,
        };
        let timings = Timings {
            forward_s: self.forward_s,
            forward_backward_s: self.forward_backward_s,
            extra_bytes: self.extra_bytes,
        };
        report.push(&format!("PyTorch {}", self.peer), shape, timings);
    }
}
