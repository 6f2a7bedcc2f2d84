//! Ranks as threads of one process.
//!
//! A rank lays its data down and goes on; whoever waits takes what lies there when all have come.
//! Data are handed over by reference and copied once, into the receiver's buffer.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::agreement::{self, Header, part};
use super::{Collective, CommError, CommResult, Communicator, Payload, Pending};

/// How long a rank waits for the others, unless told otherwise.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(600);

/// One end for each of `world_size` threads, in the order of ranks, with [`DEFAULT_TIMEOUT`].
pub fn world(world_size: usize) -> Vec<LocalCommunicator> {
    world_with_timeout(world_size, DEFAULT_TIMEOUT)
}

/// [`world`] whose ranks give up waiting after `timeout`.
pub fn world_with_timeout(world_size: usize, timeout: Duration) -> Vec<LocalCommunicator> {
    let world = Arc::new(World {
        world_size,
        timeout,
        state: Mutex::new(State {
            calls: HashMap::new(),
            lost: vec![None; world_size],
            failure: None,
        }),
        changed: Condvar::new(),
    });
    (0..world_size)
        .map(|rank| LocalCommunicator {
            world: world.clone(),
            rank,
            next_call: AtomicU64::new(0),
        })
        .collect()
}

/// One rank's end of a job of threads.
#[derive(Debug)]
pub struct LocalCommunicator {
    world: Arc<World>,
    rank: usize,
    next_call: AtomicU64,
}

#[derive(Debug)]
struct World {
    world_size: usize,
    timeout: Duration,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    /// Collectives that not all ranks are done with, by their number.
    calls: HashMap<u64, Call>,
    /// What happened to ranks that are gone.
    lost: Vec<Option<&'static str>>,
    failure: Option<Failure>,
}

/// Why the job failed, and in which call: on every rank, earlier calls that all ranks came to
/// still yield their results, and no later call does.
#[derive(Debug)]
struct Failure {
    call: u64,
    error: CommError,
}

#[derive(Debug)]
struct Call {
    deposits: Vec<Option<Arc<Deposit>>>,
    /// Ranks that are done with it.
    done: usize,
}

#[derive(Debug)]
struct Deposit {
    header: Header,
    collective: Collective,
}

impl World {
    fn lock(&self) -> MutexGuard<'_, State> {
        // No code that can panic runs under the lock, so that its state is consistent.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Marks the job as failed in `call` and wakes everybody; the first error stands.
    fn fail(&self, state: &mut State, call: u64, error: CommError) -> CommError {
        let failure = state.failure.get_or_insert(Failure { call, error });
        failure.call = failure.call.min(call);
        self.changed.notify_all();
        failure.error.clone()
    }

    /// Waits until all ranks have come to `call`.
    fn gather(&self, call: u64, tensor: &str) -> CommResult<Vec<Arc<Deposit>>> {
        let deadline = Instant::now() + self.timeout;
        let mut state = self.lock();
        loop {
            let failed = state.failure.as_ref();
            if let Some(failure) = failed.filter(|failure| failure.call <= call) {
                return Err(failure.error.clone());
            }
            let missing: Vec<usize> = match state.calls.get(&call) {
                Some(call) => (0..self.world_size)
                    .filter(|&rank| call.deposits[rank].is_none())
                    .collect(),
                None => Vec::new(),
            };
            if missing.is_empty() {
                let deposits = state.calls.get(&call).map(|call| &call.deposits);
                return Ok(deposits.into_iter().flatten().flatten().cloned().collect());
            }
            if let Some(failure) = failed {
                return Err(failure.error.clone());
            }
            for &rank in &missing {
                if let Some(reason) = state.lost[rank] {
                    let error = CommError::RankLost {
                        rank,
                        reason: reason.to_owned(),
                        tensor: tensor.to_owned(),
                    };
                    return Err(self.fail(&mut state, call, error));
                }
            }
            let now = Instant::now();
            if now >= deadline {
                let error = CommError::Timeout {
                    ranks: missing,
                    tensor: tensor.to_owned(),
                    seconds: self.timeout.as_secs(),
                };
                return Err(self.fail(&mut state, call, error));
            }
            state = self
                .changed
                .wait_timeout(state, deadline - now)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}

/// This rank's claim to the result of a call; dropping it frees the call's data.
struct Ticket {
    world: Arc<World>,
    rank: usize,
    call: u64,
    tensor: String,
}

impl Ticket {
    fn finish(self) -> CommResult<Payload> {
        let deposits = self.world.gather(self.call, &self.tensor)?;
        let headers: Vec<&Header> = deposits.iter().map(|deposit| &deposit.header).collect();
        if let Err(error) = agreement::check(&headers) {
            return Err(self.world.fail(&mut self.world.lock(), self.call, error));
        }
        if let Collective::OnDevice(_) = &deposits[self.rank].collective {
            let error = CommError::no_device_path("local");
            return Err(self.world.fail(&mut self.world.lock(), self.call, error));
        }
        Ok(result(&deposits, self.rank))
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let mut state = self.world.lock();
        if let Some(call) = state.calls.get_mut(&self.call) {
            call.done += 1;
            if call.done == self.world.world_size {
                state.calls.remove(&self.call);
            }
        }
    }
}

/// What `rank` receives; all deposits announce the same collective.
fn result(deposits: &[Arc<Deposit>], rank: usize) -> Payload {
    let floats = deposits
        .iter()
        .filter_map(|deposit| match &deposit.collective {
            Collective::AllGatherV {
                data: Payload::F32(data),
                ..
            } => Some(data.as_slice()),
            Collective::ReduceScatterV { data, .. } => {
                data.as_deref().filter(|data| !data.is_empty())
            }
            Collective::AllReduce { data } => Some(data.as_slice()),
            _ => None,
        });
    match &deposits[rank].collective {
        Collective::AllGatherV { data, .. } => match data {
            Payload::F32(_) | Payload::Device(_) => {
                Payload::F32(floats.collect::<Vec<_>>().concat())
            }
            Payload::U32(_) => {
                let parts = deposits
                    .iter()
                    .filter_map(|deposit| match &deposit.collective {
                        Collective::AllGatherV {
                            data: Payload::U32(data),
                            ..
                        } => Some(data.as_slice()),
                        _ => None,
                    });
                Payload::U32(parts.collect::<Vec<_>>().concat())
            }
        },
        Collective::ReduceScatterV { counts, .. } => {
            let part = part(counts, rank);
            let len = part.len();
            Payload::F32(agreement::sum(floats.map(|data| &data[part.clone()]), len))
        }
        Collective::AllReduce { data } => Payload::F32(agreement::sum(floats, data.len())),
        Collective::Broadcast { root, .. } => match &deposits[*root].collective {
            Collective::Broadcast { data, .. } => data.clone(),
            _ => Payload::F32(Vec::new()),
        },
        Collective::Barrier | Collective::OnDevice(_) | Collective::Announce(_) => {
            Payload::F32(Vec::new())
        }
    }
}

impl Communicator for LocalCommunicator {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.world.world_size
    }

    fn start(&self, tensor: &str, collective: Collective) -> Pending {
        let world_size = self.world.world_size;
        let call = self.next_call.fetch_add(1, Ordering::Relaxed);
        let deposit = Arc::new(Deposit {
            header: Header::new(tensor, &collective),
            collective,
        });
        {
            let mut state = self.world.lock();
            let entry = state.calls.entry(call).or_insert_with(|| Call {
                deposits: vec![None; world_size],
                done: 0,
            });
            entry.deposits[self.rank] = Some(deposit);
        }
        self.world.changed.notify_all();
        let ticket = Ticket {
            world: self.world.clone(),
            rank: self.rank,
            call,
            tensor: tensor.to_owned(),
        };
        Pending::new(move || ticket.finish())
    }

    fn leave(&self) {
        let reason = if std::thread::panicking() {
            "panicked"
        } else {
            "left the job"
        };
        self.world.lock().lost[self.rank].get_or_insert(reason);
        self.world.changed.notify_all();
    }

    fn failure(&self) -> Option<CommError> {
        let state = self.world.lock();
        state.failure.as_ref().map(|failure| failure.error.clone())
    }
}

impl Drop for LocalCommunicator {
    fn drop(&mut self) {
        self.leave();
    }
}
