//! Failures that the device's own thread does not report to anybody.

use std::sync::{Arc, OnceLock};

use super::error::{Result, TrainError};

/// The first failure on a device's thread, shared between whoever hears of it and whoever computes.
///
/// The runtime of the GPU back-ends runs launches on a thread of its own. When one panics there,
/// it writes a line to the log and goes on: the tensors are then rubbish, and no later question to
/// the device tells. The program listens to the log (see `cli/logger.rs`) and reports such lines
/// here; training, evaluation and everything else that writes results ask before they do.
#[derive(Debug, Clone, Default)]
pub struct DeviceFaults(Arc<OnceLock<String>>);

impl DeviceFaults {
    /// Remembers a failure; the first one stands.
    pub fn report(&self, reason: impl Into<String>) {
        let _later = self.0.set(reason.into());
    }

    /// Asks whether anything has failed. `when` says until when, as in "while images were scored".
    ///
    /// # Errors
    /// [`TrainError::Device`] with the first failure.
    pub fn check(&self, when: &str) -> Result<()> {
        match self.0.get() {
            None => Ok(()),
            Some(reason) => Err(TrainError::Device {
                when: when.to_owned(),
                reason: reason.clone(),
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_failure_is_told_to_every_clone() {
        let faults = DeviceFaults::default();
        assert!(faults.check("by step 1").is_ok());
        faults.clone().report("out of shared memory");
        faults.report("a consequence");
        let message = faults.check("by step 2").unwrap_err().to_string();
        assert!(
            message.contains("by step 2: out of shared memory"),
            "{message}"
        );
        assert!(!message.contains("consequence"), "{message}");
    }
}
