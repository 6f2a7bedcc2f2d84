//! Device memory in use, and its peak over a stretch of work, on CubeCL's runtimes.
//!
//! CubeCL tells how much is in use, not how much was. While a thread watches, the operators ask
//! before and after each of their own allocations, and whoever else calls [`note`] does; what Burn
//! allocates and frees between two such moments is not seen. A question waits for the device's
//! thread (not for the device), so nothing is to be timed meanwhile.

use std::cell::Cell;

use crate::backend::ExpertOps;

/// Bytes of a device's memory, as the calling thread's stream sees them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DeviceMemory {
    /// Of tensors.
    pub in_use_bytes: u64,
    /// Taken from the device, which never shrinks by itself: pages with tensors and empty ones.
    pub reserved_bytes: u64,
}

/// Least and most that was in use during a watch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Watched {
    /// Least bytes of tensors.
    pub least_bytes: u64,
    /// Most bytes of tensors.
    pub most_bytes: u64,
    /// Most bytes taken from the device.
    pub reserved_bytes: u64,
}

thread_local! {
    /// The stretch that this thread watches, and what it saw.
    static WATCH: Cell<Option<Option<Watched>>> = const { Cell::new(None) };
}

/// What is in use now; none where the back-end does not tell.
pub fn device_memory<B: ExpertOps>(device: &B::Device) -> Option<DeviceMemory> {
    B::device_memory(device)
}

/// Starts a watch on this thread; what an earlier one saw is forgotten.
pub fn watch() {
    WATCH.set(Some(None));
}

/// Ends the watch; none if no back-end told anything.
pub fn end_watch() -> Option<Watched> {
    WATCH.take().flatten()
}

/// Has the watch, if there is one, look at what is in use now.
pub fn note<B: ExpertOps>(device: &B::Device) {
    note_with(|| B::device_memory(device));
}

pub(crate) fn note_with(ask: impl FnOnce() -> Option<DeviceMemory>) {
    let Some(seen) = WATCH.get() else { return };
    let Some(now) = ask() else { return };
    let seen = seen.unwrap_or(Watched {
        least_bytes: u64::MAX,
        most_bytes: 0,
        reserved_bytes: 0,
    });
    WATCH.set(Some(Some(Watched {
        least_bytes: seen.least_bytes.min(now.in_use_bytes),
        most_bytes: seen.most_bytes.max(now.in_use_bytes),
        reserved_bytes: seen.reserved_bytes.max(now.reserved_bytes),
    })));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_watch_sees_least_and_most_of_its_own_thread() {
        let note = |in_use_bytes| {
            note_with(|| {
                Some(DeviceMemory {
                    in_use_bytes,
                    reserved_bytes: 2 * in_use_bytes,
                })
            });
        };
        note(1);
        assert_eq!(end_watch(), None);
        watch();
        assert_eq!(end_watch(), None);
        watch();
        [5, 9, 3, 4].into_iter().for_each(note);
        let other = std::thread::spawn(end_watch).join().unwrap();
        assert_eq!(other, None);
        let seen = end_watch().unwrap();
        assert_eq!(
            (seen.least_bytes, seen.most_bytes, seen.reserved_bytes),
            (3, 9, 18)
        );
        assert_eq!(end_watch(), None);
    }
}
