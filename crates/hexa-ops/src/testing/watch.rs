//! Notices device tasks that panic.
//!
//! CubeCL runs its server on a thread of its own. A task that panics there is logged as
//! "Task failed" and dropped: whoever reads the result gets whatever the memory held. Tests must
//! not take that for a number, so they listen to the log.

use std::io::Write;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Once, PoisonError, RwLock};

use burn::tensor::backend::Backend;

/// How cubecl-common 0.10.0 logs a task that panicked.
const FAILED_TASK: &str = "Task failed";

static FAILURES: AtomicUsize = AtomicUsize::new(0);

/// Counts failed tasks, and prints what is a warning or worse.
struct Watch;

impl log::Log for Watch {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        metadata.level() <= log::Level::Warn
    }

    fn log(&self, record: &log::Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let message = record.args().to_string();
        if message.starts_with(FAILED_TASK) {
            FAILURES.fetch_add(1, Ordering::SeqCst);
        }
        // A closed error stream must not fail a test.
        let _ = writeln!(
            std::io::stderr().lock(),
            "{} {}: {message}",
            record.level(),
            record.target()
        );
    }

    fn flush(&self) {}
}

/// Tests hold it for reading, and the test of this module for writing: its failure is meant.
static RUNNING: RwLock<()> = RwLock::new(());

/// Runs `test` on the default device of `B`, waits for the device, and fails if a task failed or
/// the device reports an error.
///
/// # Panics
/// If a task failed, in this test or in one that ran at the same time; or if the process has a
/// logger already, which would hide failures.
pub fn watched<B: Backend>(test: impl FnOnce()) {
    install();
    let _running = RUNNING.read().unwrap_or_else(PoisonError::into_inner);
    assert_no_failure::<B>(test);
}

fn assert_no_failure<B: Backend>(test: impl FnOnce()) {
    let before = FAILURES.load(Ordering::SeqCst);
    test();
    let synced = B::sync(&B::Device::default());
    assert!(synced.is_ok(), "the device reports {synced:?}");
    let failed = FAILURES.load(Ordering::SeqCst) - before;
    assert!(
        failed == 0,
        "{failed} device tasks failed in this test or in one beside it; their results are void"
    );
}

fn install() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        assert!(
            log::set_logger(&Watch).is_ok(),
            "another logger is installed: failures of device tasks would go unnoticed"
        );
        log::set_max_level(log::LevelFilter::Warn);
    });
}

#[cfg(all(test, any(feature = "wgpu", feature = "cuda")))]
mod tests {
    use super::*;
    use crate::testing::backend::{TestBackend, skip};
    use cubecl::Runtime;

    /// A real panic on the device's thread; afterwards the device goes on.
    fn a_failure_is_noticed<R, B>()
    where
        R: Runtime,
        B: Backend,
    {
        install();
        let _alone = RUNNING.write().unwrap_or_else(PoisonError::into_inner);
        let client = R::client(&Default::default());
        let panics = || {
            // The caller may or may not learn of it; the watch has to.
            let _ = client.exclusive(|| -> () { panic!("on purpose, for this test") });
        };
        let noticed = std::panic::catch_unwind(core::panic::AssertUnwindSafe(|| {
            assert_no_failure::<B>(panics);
        }));
        let message = *noticed.unwrap_err().downcast::<String>().unwrap();
        assert!(message.contains("1 device tasks failed"), "{message}");
        assert_no_failure::<B>(|| ());
    }

    #[test]
    fn a_task_that_panics_fails_the_test() {
        match TestBackend::selected().unwrap() {
            #[cfg(feature = "wgpu")]
            TestBackend::Wgpu => {
                a_failure_is_noticed::<cubecl::wgpu::WgpuRuntime, crate::backends::Wgpu>();
            }
            #[cfg(feature = "cuda")]
            TestBackend::Cuda => {
                a_failure_is_noticed::<cubecl::cuda::CudaRuntime, crate::backends::Cuda>();
            }
            other => skip(
                "a_task_that_panics_fails_the_test",
                &format!("{} has no device thread of its own", other.name()),
            ),
        }
    }
}
