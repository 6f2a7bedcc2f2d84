//! Memory of training steps: watched while they run, and explained when there is not enough.

use std::panic::resume_unwind;

use hexa_ops::memory::{self, Watched};

use super::error::{Result, TrainError};
use super::faults::DeviceFaults;
use super::metrics::MemoryRecord;
use crate::backend::panic_text;
use crate::config::{Config, Precision};
use crate::info::binary;
use crate::memory::{PeakMemory, resident};

/// Log lines whose step is watched: all steps have the same shapes, and a watched one is slower.
const WATCHED_LINES: usize = 3;

/// What a device's runtime says when it has no memory left, in lower case: CubeCL's of CUDA, and
/// wgpu's.
const EXHAUSTED: [&str; 4] = [
    "can't allocate buffer of size",
    "out of memory",
    "out_of_memory",
    "not enough memory",
];

/// What training steps should take and do take.
#[derive(Debug)]
pub(super) struct StepMemory {
    /// None where ranks share the model, or the head alone is trained.
    predicted: Option<PeakMemory>,
    seen: Option<Watched>,
    lines: usize,
    settings: Settings,
}

/// What a user can change about it.
#[derive(Debug, Clone, Copy)]
struct Settings {
    batch_size: usize,
    accumulation_steps: usize,
    checkpoints: bool,
    is_half: bool,
}

impl StepMemory {
    pub fn new(config: &Config, predicted: Option<PeakMemory>) -> Self {
        let train = &config.train;
        StepMemory {
            predicted,
            seen: None,
            lines: 0,
            settings: Settings {
                batch_size: train.batch_size,
                accumulation_steps: train.accumulation_steps,
                checkpoints: train.activation_checkpointing,
                is_half: matches!(train.precision, Precision::Bf16 | Precision::F16),
            },
        }
    }

    /// To be called before each step that a log line will follow.
    pub fn watch(&mut self) {
        if self.lines < WATCHED_LINES {
            self.lines += 1;
            memory::watch();
        }
    }

    /// To be called for each log line: the most that was seen so far.
    pub fn record(&mut self) -> MemoryRecord {
        self.end_watch();
        MemoryRecord {
            tensor_bytes: self.seen.map(|seen| seen.most_bytes),
            reserved_bytes: self.seen.map(|seen| seen.reserved_bytes),
            host_bytes: resident::peak_bytes(),
        }
    }

    fn end_watch(&mut self) {
        if let Some(now) = memory::end_watch() {
            let seen = self.seen.get_or_insert(now);
            seen.most_bytes = seen.most_bytes.max(now.most_bytes);
            seen.reserved_bytes = seen.reserved_bytes.max(now.reserved_bytes);
        }
    }

    /// The result of work on the device; where that failed or panicked for want of memory, an
    /// error that says so. Other panics go on.
    ///
    /// # Errors
    /// [`TrainError::OutOfMemory`], or the work's own.
    pub fn explain<T>(
        &mut self,
        done: std::thread::Result<Result<T>>,
        faults: &DeviceFaults,
    ) -> Result<T> {
        let (when, reason) = match done {
            Ok(Err(TrainError::Device { when, reason })) if is_exhausted(&reason) => (when, reason),
            Ok(result) => return result,
            Err(panic) => {
                let when = "during a step";
                // What panics here may be a consequence of what failed on the device's thread.
                let reason = match faults.check(when) {
                    Err(TrainError::Device { reason, .. }) => reason,
                    _ => panic_text(panic.as_ref()).to_owned(),
                };
                if !is_exhausted(&reason) {
                    resume_unwind(panic);
                }
                (when.to_owned(), reason)
            }
        };
        self.end_watch();
        // Some runtimes add a backtrace, and a panic its own words.
        let reason = reason.lines().next().unwrap_or_default();
        let reason = reason
            .rsplit_once("value: ")
            .map_or(reason, |(_, reason)| reason);
        Err(TrainError::OutOfMemory {
            when,
            reason: reason.to_owned(),
            expected: self.expected(),
            remedy: self.settings.remedy(),
        })
    }

    fn expected(&self) -> String {
        let predicted = match &self.predicted {
            Some(peak) => format!(
                "a step was predicted to take {} ({} of them activations)",
                binary(peak.total_bytes()),
                binary(peak.activation_bytes),
            ),
            None => "there is no prediction for ranks that share a model, and for linear probes"
                .to_owned(),
        };
        let seen = match self.seen {
            Some(seen) => format!(
                "{} in tensors and {} taken from the device were the most measured before",
                binary(seen.most_bytes),
                binary(seen.reserved_bytes),
            ),
            None => "nothing had been measured yet".to_owned(),
        };
        format!("{predicted}, {seen}")
    }
}

fn is_exhausted(reason: &str) -> bool {
    let reason = reason.to_lowercase();
    EXHAUSTED.iter().any(|words| reason.contains(words))
}

impl Settings {
    fn remedy(self) -> String {
        let mut ways = vec![
            format!("lower train.batch_size (now {})", self.batch_size),
            format!(
                "raise train.accumulation_steps (now {}), which takes a batch in more parts",
                self.accumulation_steps
            ),
        ];
        if !self.checkpoints {
            ways.push("set train.activation_checkpointing to true".to_owned());
        }
        if !self.is_half {
            ways.push("set train.precision to \"bf16\" or \"f16\"".to_owned());
        }
        format!(
            "{}; `swin-moe memory` predicts and measures",
            ways.join(", or ")
        )
    }
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use super::*;

    fn memory() -> StepMemory {
        StepMemory {
            predicted: None,
            seen: Some(Watched {
                least_bytes: 1,
                most_bytes: 3 << 29,
                reserved_bytes: 2 << 30,
            }),
            lines: 1,
            settings: Settings {
                batch_size: 96,
                accumulation_steps: 3,
                checkpoints: false,
                is_half: false,
            },
        }
    }

    fn failure(reason: &str) -> std::thread::Result<Result<()>> {
        Ok(Err(TrainError::Device {
            when: "by step 7".to_owned(),
            reason: reason.to_owned(),
        }))
    }

    #[test]
    fn want_of_memory_is_told_from_other_failures() {
        let faults = DeviceFaults::default();
        // CubeCL's words on CUDA, and wgpu's.
        for reason in [
            "can't allocate buffer of size: 1073741824\n   0: std::backtrace",
            "wgpu error: Out of Memory",
            "called `Result::unwrap()` on an `Err` value: can't allocate buffer of size: 9",
            "In Device::create_buffer: Not enough memory left.",
        ] {
            let error = memory().explain(failure(reason), &faults).unwrap_err();
            let text = error.to_string();
            assert!(matches!(error, TrainError::OutOfMemory { .. }), "{text}");
            let parts = [
                "by step 7",
                "1.50 GiB",
                "2.00 GiB",
                "now 96",
                "now 3",
                "bf16",
            ];
            for part in parts {
                assert!(text.contains(part), "{part}: {text}");
            }
            assert!(
                !text.contains("backtrace") && !text.contains("unwrap"),
                "{text}"
            );
        }
        let other = memory().explain(failure("device lost"), &faults);
        assert!(matches!(other, Err(TrainError::Device { .. })));
    }

    #[test]
    fn panics_for_want_of_memory_are_errors_and_others_go_on() {
        let silent = catch_unwind(|| resume_unwind(Box::new("no such binding")));
        let faults = DeviceFaults::default();
        let explain = |done: std::thread::Result<Result<()>>| {
            catch_unwind(AssertUnwindSafe(|| memory().explain(done, &faults)))
        };
        assert!(explain(silent).is_err());
        faults.report("wgpu error: Out of Memory (wgpu_core.rs:7)");
        let consequence = catch_unwind(|| resume_unwind(Box::new("no such binding")));
        assert!(matches!(
            explain(consequence),
            Ok(Err(TrainError::OutOfMemory { .. }))
        ));
    }
}
