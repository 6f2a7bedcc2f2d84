//! The program's logger, which also listens for failures that are only ever logged.
//!
//! A logger is one per process by nature; what this one hears goes into a [`DeviceFaults`] that is
//! handed around like everything else.

use std::cell::RefCell;
use std::panic::PanicHookInfo;

use log::{LevelFilter, Log, Metadata, Record};

use crate::backend::panic_text;
use crate::train::DeviceFaults;

/// The runtime's module that runs tasks on a device's thread, and catches their panics there.
const DEVICE_MODULE: &str = "cubecl_common::device";

/// How it begins the line about a task that panicked.
const TASK_FAILED: &str = "Task failed";

thread_local! {
    /// The last panic of this thread. The runtime's line does not say what the panic said, but is
    /// written by the thread that panicked, right after it.
    static LAST_PANIC: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Starts logging; `faults` hears of tasks that fail on a device's thread.
pub(super) fn start(faults: DeviceFaults) {
    let environment = env_logger::Env::default().default_filter_or("warn");
    let printer = env_logger::Builder::from_env(environment)
        .format_target(false)
        .build();
    // The failures are warnings: they must come through whatever the user wishes to see.
    let level = printer.filter().max(LevelFilter::Warn);
    if log::set_boxed_logger(Box::new(Listener { printer, faults })).is_ok() {
        log::set_max_level(level);
    }
}

/// To be called by the panic hook: keeps the panic's words for the line about it.
pub(super) fn remember_panic(info: &PanicHookInfo) {
    let place = info
        .location()
        .map(|place| format!(" ({}:{})", place.file(), place.line()))
        .unwrap_or_default();
    let text = format!("{}{place}", panic_text(info.payload()));
    LAST_PANIC.set(Some(text));
}

/// Passes records on to the printer.
struct Listener<P> {
    printer: P,
    faults: DeviceFaults,
}

fn is_from_device(metadata: &Metadata) -> bool {
    metadata.level() <= LevelFilter::Warn && metadata.target().starts_with(DEVICE_MODULE)
}

impl<P: Log> Log for Listener<P> {
    fn enabled(&self, metadata: &Metadata) -> bool {
        is_from_device(metadata) || self.printer.enabled(metadata)
    }

    fn log(&self, record: &Record) {
        if is_from_device(record.metadata()) {
            let line = record.args().to_string();
            if line.starts_with(TASK_FAILED) {
                self.faults.report(LAST_PANIC.take().unwrap_or(line));
            }
        }
        // The printer drops what the user does not wish to see.
        self.printer.log(record);
    }

    fn flush(&self) {
        self.printer.flush();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use log::Level;

    use super::*;

    /// Prints errors only, into a list.
    #[derive(Default)]
    struct ErrorsOnly(Mutex<Vec<String>>);

    impl Log for ErrorsOnly {
        fn enabled(&self, metadata: &Metadata) -> bool {
            metadata.level() <= Level::Error
        }

        fn log(&self, record: &Record) {
            if self.enabled(record.metadata()) {
                let line = record.args().to_string();
                self.0.lock().unwrap().push(line);
            }
        }

        fn flush(&self) {}
    }

    fn listener() -> Listener<ErrorsOnly> {
        Listener {
            printer: ErrorsOnly::default(),
            faults: DeviceFaults::default(),
        }
    }

    fn tell(listener: &Listener<ErrorsOnly>, level: Level, target: &str, text: &str) {
        let metadata = Metadata::builder().level(level).target(target).build();
        // As the `log` macros do.
        if listener.enabled(&metadata) {
            listener.log(
                &Record::builder()
                    .metadata(metadata)
                    .args(format_args!("{text}"))
                    .build(),
            );
        }
    }

    const CHANNEL: &str = "cubecl_common::device::handle::channel";

    #[test]
    fn a_failed_task_is_a_fault_even_if_warnings_are_not_printed() {
        let listener = listener();
        tell(&listener, Level::Warn, CHANNEL, "Task failed: Any { .. }");
        let message = listener.faults.check("by step 3").unwrap_err().to_string();
        assert!(message.contains("Task failed: Any"), "{message}");
        assert!(listener.printer.0.lock().unwrap().is_empty());
    }

    #[test]
    fn the_panic_itself_is_quoted_if_it_is_known() {
        let listener = listener();
        LAST_PANIC.set(Some("no kernel for u1 (kernel.rs:7)".to_owned()));
        tell(&listener, Level::Warn, CHANNEL, "Task failed: Any { .. }");
        let message = listener.faults.check("by step 3").unwrap_err().to_string();
        assert!(
            message.contains("no kernel for u1 (kernel.rs:7)"),
            "{message}"
        );
    }

    #[test]
    fn other_lines_are_passed_on_and_are_no_faults() {
        let listener = listener();
        tell(&listener, Level::Warn, "swin_moe::data", "Task failed: no");
        tell(&listener, Level::Warn, CHANNEL, "something else");
        tell(&listener, Level::Error, "elsewhere", "an error");
        assert!(listener.faults.check("by step 3").is_ok());
        assert_eq!(*listener.printer.0.lock().unwrap(), ["an error"]);
    }
}
