//! Whether the loader keeps up with the device.

use std::time::Duration;

/// Share of the time that steps may wait for images before it is worth a warning.
const WORTH_A_WARNING: f64 = 0.2;

/// Share of `elapsed` that was spent waiting, in 0..=1.
pub(super) fn share(waited: Duration, elapsed: Duration) -> f64 {
    (waited.as_secs_f64() / elapsed.as_secs_f64().max(1e-9)).min(1.0)
}

/// Warns of a loader that is too slow, once an epoch.
#[derive(Debug, Default)]
pub(super) struct Starvation {
    warned_in: Option<u64>,
}

impl Starvation {
    /// What to say about a share of `epoch`'s time, if anything.
    pub(super) fn warning(&mut self, share: f64, epoch: u64, workers: usize) -> Option<String> {
        if share <= WORTH_A_WARNING || self.warned_in == Some(epoch) {
            return None;
        }
        self.warned_in = Some(epoch);
        Some(format!(
            "warning: {:.0} % of the time goes to waiting for images; raise data.workers (now \
             {workers}) or data.cache_bytes, or lighten [augment] (swin-moe loader times the \
             loader alone)",
            100.0 * share
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slow_loader_is_told_of_once_an_epoch() {
        let mut starvation = Starvation::default();
        assert_eq!(starvation.warning(0.2, 1, 2), None);
        let told = starvation.warning(0.314, 1, 2).unwrap();
        assert!(told.contains("31 %") && told.contains("(now 2)"), "{told}");
        assert_eq!(starvation.warning(0.9, 1, 2), None);
        assert!(starvation.warning(0.9, 2, 2).is_some());
    }

    #[test]
    fn a_share_is_of_the_whole_time() {
        let seconds = Duration::from_secs;
        assert_eq!(share(seconds(1), seconds(4)), 0.25);
        assert_eq!(share(seconds(0), seconds(0)), 0.0);
        assert_eq!(share(seconds(5), seconds(4)), 1.0);
    }
}
