//! The command line.

mod arguments;
mod commands;
mod fleet;
mod logger;
mod throughput;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;

use clap::Parser;

use crate::backend::panic_text;
use crate::train::DeviceFaults;
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
    let faults = DeviceFaults::default();
    logger::start(faults.clone());
    // A panic is a defect; it is said in one line, with the way to see more.
    let print = std::env::var_os("SWIN_MOE_DEBUG").map(|_| std::panic::take_hook());
    std::panic::set_hook(Box::new(move |info| {
        logger::remember_panic(info);
        if let Some(print) = &print {
            print(info);
        }
    }));
    match catch_unwind(AssertUnwindSafe(|| run(arguments.command, faults))) {
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

fn run(command: Command, faults: DeviceFaults) -> anyhow::Result<Done> {
    match command {
        Command::Train(arguments) => commands::train(arguments, faults),
        Command::Eval(arguments) => commands::eval(arguments, faults),
        Command::Predict(arguments) => commands::predict(arguments, faults),
        Command::Inspect(arguments) => commands::inspect(arguments, faults),
        Command::Import(arguments) => commands::import(arguments, faults),
        Command::Upcycle(arguments) => commands::upcycle(arguments, faults),
        Command::Export(arguments) => commands::export(arguments, faults),
        Command::Info(arguments) => commands::info(arguments),
        Command::Loader(arguments) => commands::loader(arguments),
        Command::Throughput(arguments) => throughput::throughput(arguments, faults),
        Command::Memory(arguments) => commands::memory(arguments, faults),
        Command::Calibrate(arguments) => fleet::calibrate(arguments, faults),
        Command::Plan(arguments) => fleet::plan(arguments),
        Command::Parity(arguments) => commands::parity(arguments, faults),
    }
}
