//! What a rank's exchanges cost it: a communicator that keeps time.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::{Collective, CommError, Communicator, DeviceCollective, DeviceTensor, Pending};

/// What exchanges of one kind of tensor have cost a rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Traffic {
    /// Collectives that were waited for.
    pub collectives: u64,
    /// Elements that came back.
    pub elements: u64,
    /// Elements that other ranks sent to this one for tensors of the layers, `layer 3: tokens` for
    /// one: parts of what it gathered, addends of what it summed.
    pub received_by_layers: u64,
    /// Time in which the rank waited for results.
    pub waited: Duration,
}

/// Running totals of a [`Metered`] communicator, by what the layers call the tensor: `expert
/// weights`, `tokens`, … Clones are the same totals.
#[derive(Debug, Clone, Default)]
pub struct Meter(Arc<Mutex<BTreeMap<String, Traffic>>>);

impl Meter {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Traffic>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The totals since the beginning, or since they were last taken.
    pub fn take(&self) -> BTreeMap<String, Traffic> {
        core::mem::take(&mut *self.lock())
    }

    /// Time in which the rank waited, for anything, since totals were last taken. A step's time
    /// less this is the rank's own computation, which is what shares are balanced by.
    pub fn waited(&self) -> Duration {
        self.lock().values().map(|traffic| traffic.waited).sum()
    }

    fn add(&self, kind: String, cost: Traffic) {
        let mut totals = self.lock();
        let traffic = totals.entry(kind).or_default();
        traffic.collectives += cost.collectives;
        traffic.elements += cost.elements;
        traffic.received_by_layers += cost.received_by_layers;
        traffic.waited += cost.waited;
    }
}

/// Another communicator, whose waiting times are added up.
#[derive(Debug)]
pub struct Metered<C> {
    inner: C,
    meter: Meter,
}

impl<C: Communicator> Metered<C> {
    /// Wraps a communicator; the meter stays readable when the communicator is given away.
    pub fn new(inner: C) -> (Self, Meter) {
        let meter = Meter::default();
        let metered = Self {
            inner,
            meter: meter.clone(),
        };
        (metered, meter)
    }
}

impl<C: Communicator> Communicator for Metered<C> {
    fn rank(&self) -> usize {
        self.inner.rank()
    }

    fn world_size(&self) -> usize {
        self.inner.world_size()
    }

    fn start(&self, tensor: &str, collective: Collective) -> Pending {
        // `layer 3: tokens` is one of the tokens.
        let kind = tensor.rsplit(": ").next().unwrap_or(tensor).to_owned();
        let received = match tensor.starts_with("layer ") {
            true => received(&collective, self.rank(), self.world_size()),
            false => 0,
        };
        let pending = self.inner.start(tensor, collective);
        let meter = self.meter.clone();
        Pending::new(move || {
            let start = Instant::now();
            let result = pending.wait();
            let cost = Traffic {
                collectives: 1,
                elements: result.as_ref().map_or(0, super::Payload::len) as u64,
                received_by_layers: if result.is_ok() { received } else { 0 },
                waited: start.elapsed(),
            };
            meter.add(kind, cost);
            result
        })
    }

    fn leave(&self) {
        self.inner.leave();
    }

    fn failure(&self) -> Option<CommError> {
        self.inner.failure()
    }

    fn takes(&self, tensor: &DeviceTensor) -> bool {
        self.inner.takes(tensor)
    }
}

/// Elements that the others send to `rank`.
fn received(collective: &Collective, rank: usize, world_size: usize) -> u64 {
    let others = world_size.saturating_sub(1);
    let own = |counts: &[usize]| counts.get(rank).copied().unwrap_or(0);
    let gathered = |counts: &[usize]| counts.iter().sum::<usize>() - own(counts);
    let elements = match collective {
        Collective::AllGatherV { counts, .. }
        | Collective::OnDevice(DeviceCollective::AllGatherV { counts, .. }) => gathered(counts),
        Collective::ReduceScatterV { counts, .. }
        | Collective::OnDevice(DeviceCollective::ReduceScatterV { counts, .. }) => {
            others * own(counts)
        }
        Collective::AllReduce { data } => others * data.len(),
        Collective::OnDevice(DeviceCollective::AllReduce { addend }) => others * addend.len(),
        Collective::Broadcast { root, len, .. } if *root != rank => *len,
        Collective::Broadcast { .. } | Collective::Barrier | Collective::Announce(_) => 0,
    };
    elements as u64
}
