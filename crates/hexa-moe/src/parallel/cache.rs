//! The pipeline-shared cache: one place for gathered weights, whatever the number of layers.
//!
//! The place is empty, or a gather into it is in flight, or it holds one layer's weights. Whoever
//! needs it frees what is there; nothing is copied out. The backward pass gathers again in reverse
//! order, each layer's gather in flight while the layer behind it computes; only the last layer's
//! weights are still there from the forward pass.

use std::any::Any;
use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::comm::Pending;
use crate::error::Result;

/// One forward pass of one layer.
pub(super) type PassId = u64;

/// What a gather was started for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Purpose {
    /// The next forward pass of a layer.
    Forward { layer: usize },
    /// The backward pass that belongs to a forward pass.
    Backward { pass: PassId },
}

enum Slot {
    Empty,
    InFlight {
        purpose: Purpose,
        pending: Pending,
        bytes: usize,
    },
    Held {
        pass: PassId,
        weights: Box<dyn Any + Send>,
        bytes: usize,
    },
}

/// A layer that was run forwards and not yet backwards.
struct Recorded {
    pass: PassId,
    layer: usize,
    bytes: usize,
    gather: Box<dyn Fn() -> Result<Pending> + Send>,
}

struct State {
    slot: Slot,
    tape: Vec<Recorded>,
    next_pass: PassId,
    retained_bytes: usize,
    peak_bytes: usize,
}

/// Where gathered weights are; see the module's description.
pub struct GatherCache {
    shared: bool,
    state: Mutex<State>,
}

impl fmt::Debug for GatherCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GatherCache")
            .field("shared", &self.shared)
            .field("bytes_held", &self.bytes_held())
            .finish()
    }
}

impl State {
    fn bytes(&self) -> usize {
        let slot = match &self.slot {
            Slot::Empty => 0,
            Slot::InFlight { bytes, .. } | Slot::Held { bytes, .. } => *bytes,
        };
        slot + self.retained_bytes
    }

    fn update_peak(&mut self) {
        self.peak_bytes = self.peak_bytes.max(self.bytes());
    }
}

impl GatherCache {
    pub(super) fn new(shared: bool) -> Self {
        Self {
            shared,
            state: Mutex::new(State {
                slot: Slot::Empty,
                tape: Vec::new(),
                next_pass: 0,
                retained_bytes: 0,
                peak_bytes: 0,
            }),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether layers share the buffer.
    pub fn is_shared(&self) -> bool {
        self.shared
    }

    /// Bytes of gathered weights that are held or on their way.
    pub fn bytes_held(&self) -> usize {
        self.lock().bytes()
    }

    /// The most that [`GatherCache::bytes_held`] has been.
    pub fn peak_bytes(&self) -> usize {
        self.lock().peak_bytes
    }

    /// Frees everything, as a step's end does: weights that were gathered before an update are not
    /// those after it.
    pub fn clear(&self) {
        let mut state = self.lock();
        state.slot = Slot::Empty;
        state.tape.clear();
    }

    pub(super) fn new_pass(&self) -> PassId {
        let mut state = self.lock();
        state.next_pass += 1;
        state.next_pass
    }

    /// Frees the place and lets `gather` fill it.
    pub(super) fn start(
        &self,
        purpose: Purpose,
        bytes: usize,
        gather: impl FnOnce() -> Result<Pending>,
    ) -> Result<()> {
        self.lock().slot = Slot::Empty;
        let pending = gather()?;
        let mut state = self.lock();
        state.slot = Slot::InFlight {
            purpose,
            pending,
            bytes,
        };
        state.update_peak();
        Ok(())
    }

    /// The gather that was started for this purpose. Any other is freed; all ranks free the same.
    pub(super) fn take_in_flight(&self, wanted: Purpose) -> Option<Pending> {
        let mut state = self.lock();
        match core::mem::replace(&mut state.slot, Slot::Empty) {
            Slot::InFlight {
                purpose, pending, ..
            } if purpose == wanted => Some(pending),
            held @ Slot::Held { .. } => {
                state.slot = held;
                None
            }
            _ => None,
        }
    }

    /// Puts a pass' weights into the place.
    pub(super) fn hold<W: Send + 'static>(&self, pass: PassId, weights: W, bytes: usize) {
        let mut state = self.lock();
        state.slot = Slot::Held {
            pass,
            weights: Box::new(weights),
            bytes,
        };
        state.update_peak();
    }

    /// Takes the weights out, if they are still those of `pass`.
    pub(super) fn take_held<W: 'static>(&self, wanted: PassId) -> Option<W> {
        let mut state = self.lock();
        match core::mem::replace(&mut state.slot, Slot::Empty) {
            Slot::Held { pass, weights, .. } if pass == wanted => {
                weights.downcast().ok().map(|weights| *weights)
            }
            Slot::Held { .. } => None,
            other => {
                state.slot = other;
                None
            }
        }
    }

    /// Frees the place if it holds weights.
    pub(super) fn release(&self) {
        let mut state = self.lock();
        if matches!(state.slot, Slot::Held { .. }) {
            state.slot = Slot::Empty;
        }
    }

    /// Remembers how to gather a layer's weights for its backward pass.
    pub(super) fn record(
        &self,
        pass: PassId,
        layer: usize,
        bytes: usize,
        gather: impl Fn() -> Result<Pending> + Send + 'static,
    ) {
        let mut state = self.lock();
        // A layer that comes again begins a new pass; what is left of the last one is abandoned.
        if let Some(first) = state.tape.iter().position(|entry| entry.layer == layer) {
            state.tape.drain(..=first);
        }
        state.tape.push(Recorded {
            pass,
            layer,
            bytes,
            gather: Box::new(gather),
        });
    }

    /// Starts the gather of the layer that ran before `pass`, whose backward pass comes next.
    pub(super) fn start_previous(&self, pass: PassId) -> Result<()> {
        let previous = {
            let mut state = self.lock();
            let Some(at) = state.tape.iter().position(|entry| entry.pass == pass) else {
                return Ok(());
            };
            state.tape.truncate(at);
            state.tape.pop()
        };
        let Some(previous) = previous else {
            return Ok(());
        };
        let purpose = Purpose::Backward {
            pass: previous.pass,
        };
        self.start(purpose, previous.bytes, || (previous.gather)())?;
        // Still needed to find the one before it.
        self.lock().tape.push(previous);
        Ok(())
    }

    /// Accounts for weights that a layer keeps for itself.
    pub(super) fn retain(&self, bytes: usize) {
        let mut state = self.lock();
        state.retained_bytes += bytes;
        state.update_peak();
    }

    /// The reverse of [`GatherCache::retain`].
    pub(super) fn forget(&self, bytes: usize) {
        let mut state = self.lock();
        state.retained_bytes = state.retained_bytes.saturating_sub(bytes);
    }
}
