//! The command line.

mod arguments;
mod commands;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;

use clap::Parser;

use crate::backend::panic_text;
use arguments::{Arguments, Command};

/// Exit status of a run that Ctrl-C ended, as shells have it: 128 + SIGINT.
const INTERRUPTED: u8 = 130;

/// Exit status of a defect in this program.
const DEFECT: u8 = 70;

/// How a command ended well.
enum Done {
    /// All that was asked for is done.
    Success,
    /// A comparison did not pass.
    Failed,
    /// The user stopped it.
    Interrupted,
}

/// Runs the program with the process' arguments.
pub fn main() -> ExitCode {
    let arguments = Arguments::parse();
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("warn"))
        .format_target(false)
        .init();
    // A panic is a defect; it is said in one line, with the way to see more.
    if std::env::var_os("SWIN_MOE_DEBUG").is_none() {
        std::panic::set_hook(Box::new(|_| {}));
    }
    match catch_unwind(AssertUnwindSafe(|| run(arguments.command))) {
        Ok(Ok(Done::Success)) => ExitCode::SUCCESS,
        Ok(Ok(Done::Failed)) => ExitCode::FAILURE,
        Ok(Ok(Done::Interrupted)) => ExitCode::from(INTERRUPTED),
        Ok(Err(error)) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
        Err(panic) => {
            eprintln!(
                "error: a defect in this program: {}; set SWIN_MOE_DEBUG=1 to see where, and \
                 report it",
                panic_text(panic.as_ref())
            );
            ExitCode::from(DEFECT)
        }
    }
}

fn run(command: Command) -> anyhow::Result<Done> {
    match command {
        Command::Train(arguments) => commands::train(arguments),
        Command::Eval(arguments) => commands::eval(arguments),
        Command::Predict(arguments) => commands::predict(arguments),
        Command::Import(arguments) => commands::import(arguments),
        Command::Export(arguments) => commands::export(arguments),
        Command::Parity(arguments) => commands::parity(arguments),
    }
}
