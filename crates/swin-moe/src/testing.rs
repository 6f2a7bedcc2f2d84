//! What unit tests share.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Keeps tests that draw from the back-end's generator, of which a process has one, apart.
pub(crate) fn generator_lock() -> MutexGuard<'static, ()> {
    static LOCK: Mutex<()> = Mutex::new(());
    // Another test's failure leaves nothing in disorder.
    LOCK.lock().unwrap_or_else(PoisonError::into_inner)
}
