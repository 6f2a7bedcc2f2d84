//! Peak of the device memory that operators' tensors take, on CubeCL's runtimes.
//!
//! CubeCL tells how much is in use, not how much was: while armed, the probe asks before and after
//! each of the operators' own allocations. What Burn allocates between two of them is seen only if it is
//! still there at the second. Asking waits for the device's thread, so nothing is to be timed
//! meanwhile.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use cubecl::Runtime;
use cubecl::client::ComputeClient;

static ARMED: AtomicBool = AtomicBool::new(false);
static LEAST: AtomicU64 = AtomicU64::new(u64::MAX);
static MOST: AtomicU64 = AtomicU64::new(0);

/// Starts over: what is noted from here on counts.
pub fn arm() {
    LEAST.store(u64::MAX, Ordering::SeqCst);
    MOST.store(0, Ordering::SeqCst);
    ARMED.store(true, Ordering::SeqCst);
}

/// Ends the watch. Bytes between the least and the most that were in use since [`arm`], that is, what
/// the watched work took at its peak; none if no CubeCL back-end did any.
pub fn disarm() -> Option<u64> {
    ARMED.store(false, Ordering::SeqCst);
    let most = MOST.load(Ordering::SeqCst);
    most.checked_sub(LEAST.load(Ordering::SeqCst))
}

/// Notes what is in use now.
pub(crate) fn note<R: Runtime>(client: &ComputeClient<R>) {
    if !ARMED.load(Ordering::Relaxed) {
        return;
    }
    if let Ok(usage) = client.memory_usage() {
        LEAST.fetch_min(usage.bytes_in_use, Ordering::SeqCst);
        MOST.fetch_max(usage.bytes_in_use, Ordering::SeqCst);
    }
}
