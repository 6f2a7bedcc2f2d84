//! Ranks as processes under `mpirun`, on one or many machines.
//!
//! One thread per rank makes all MPI calls (MPI_THREAD_FUNNELED), one collective after the other in
//! the order in which they were started, so that transfers overlap with what the rank computes.
//! Before each, ranks send each other what they are about to do; a rank that says nothing in time,
//! or says that it leaves, is named in an error. A rank that loses another reports it and ends
//! the job (`MPI_Abort`); a process that dies without a word is `mpirun`'s to report, which ends
//! the others and names its rank.
//!
//! MPI has no sum in a fixed order: reductions exchange addends and sum them in the order of ranks.

use std::collections::BTreeSet;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use mpi::datatype::{Equivalence, Partition, PartitionMut};
use mpi::environment::Universe;
use mpi::topology::SimpleCommunicator;
use mpi::traits::{
    Communicator as _, CommunicatorCollectives as _, Destination as _, Root as _, Source as _,
};
use mpi::{Count, Threading};

use super::agreement::{self, Header, Kind, part};
use super::wire::Message;
use super::{Collective, CommError, CommResult, Communicator, Payload, Pending};

/// How long a rank waits for the others, unless told otherwise.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(600);

/// Announcements travel under this tag; data are in collectives.
const TAG: i32 = 17;
/// Room for announcements that are not yet received; of each there are at most two per peer.
const BUFFER_BYTES: usize = 4 << 20;
/// Sums of up to this many elements are gathered whole, which takes one exchange instead of two.
const SMALL_SUM: usize = 1024;
/// How long a rank that panicked leaves the others to report it before it ends the job.
const GRACE: Duration = Duration::from_secs(3);

/// One process' end of an MPI job. A process has at most one, ever.
#[derive(Debug)]
pub struct MpiCommunicator {
    rank: usize,
    world_size: usize,
    orders: Sender<Order>,
    failure: Arc<Mutex<Option<CommError>>>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

enum Order {
    Run {
        tensor: String,
        collective: Collective,
        reply: Sender<CommResult<Payload>>,
    },
    Leave {
        panicked: bool,
    },
}

fn engine_error(reason: impl Into<String>) -> CommError {
    CommError::Engine {
        engine: "mpi",
        reason: reason.into(),
    }
}

fn lock(failure: &Mutex<Option<CommError>>) -> MutexGuard<'_, Option<CommError>> {
    failure.lock().unwrap_or_else(PoisonError::into_inner)
}

impl MpiCommunicator {
    /// Joins the job that `mpirun` started this process for; alone, it is a job of one rank.
    ///
    /// # Errors
    /// [`CommError::Engine`] if MPI cannot be initialised, or was before.
    pub fn init(timeout: Duration) -> CommResult<Self> {
        let (orders, inbox) = channel();
        let (ready, place) = channel();
        let failure = Arc::new(Mutex::new(None));
        let shared = failure.clone();
        let thread = std::thread::Builder::new()
            .name("mpi".to_owned())
            .spawn(move || {
                let Some((mut universe, _)) = mpi::initialize_with_threading(Threading::Funneled)
                else {
                    return;
                };
                universe.set_buffer_size(BUFFER_BYTES);
                let world = universe.world();
                let rank = world.rank() as usize;
                let world_size = world.size() as usize;
                if ready.send((rank, world_size)).is_err() {
                    return;
                }
                Rank {
                    universe,
                    world,
                    rank,
                    world_size,
                    timeout,
                    failure: shared,
                }
                .serve(inbox);
            })
            .map_err(|error| engine_error(error.to_string()))?;
        let (rank, world_size) = place.recv().map_err(|_| {
            engine_error("MPI could not be initialised; a process can join one job only")
        })?;
        Ok(Self {
            rank,
            world_size,
            orders,
            failure,
            thread: Mutex::new(Some(thread)),
        })
    }
}

impl MpiCommunicator {
    /// Leaves the job and finalises MPI, which must be done before the process ends, whoever
    /// still holds the communicator.
    pub fn close(&self) {
        self.leave();
        let thread = self
            .thread
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(thread) = thread {
            // A panic there has ended the job already.
            let _ = thread.join();
        }
    }
}

impl Communicator for MpiCommunicator {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.world_size
    }

    fn start(&self, tensor: &str, collective: Collective) -> Pending {
        let (reply, result) = channel();
        let sent = self.orders.send(Order::Run {
            tensor: tensor.to_owned(),
            collective,
            reply,
        });
        let failure = self.failure.clone();
        Pending::new(move || {
            let received = sent.ok().and_then(|()| result.recv().ok());
            received.unwrap_or_else(|| {
                let failed = lock(&failure).clone();
                Err(failed.unwrap_or_else(|| engine_error("this rank has left the job")))
            })
        })
    }

    fn leave(&self) {
        // After the first time there is nobody to receive it, which is as well.
        let _ = self.orders.send(Order::Leave {
            panicked: std::thread::panicking(),
        });
    }

    fn failure(&self) -> Option<CommError> {
        lock(&self.failure).clone()
    }
}

impl Drop for MpiCommunicator {
    fn drop(&mut self) {
        self.close();
    }
}

/// The thread's side.
struct Rank {
    universe: Universe,
    world: SimpleCommunicator,
    rank: usize,
    world_size: usize,
    timeout: Duration,
    failure: Arc<Mutex<Option<CommError>>>,
}

impl Rank {
    fn serve(self, orders: Receiver<Order>) {
        let mut panicked = false;
        for order in orders {
            match order {
                Order::Run {
                    tensor,
                    collective,
                    reply,
                } => {
                    let failed = lock(&self.failure).clone();
                    let result = match failed {
                        Some(error) => Err(error),
                        None => self.run(&tensor, collective),
                    };
                    if let Err(error) = &result {
                        lock(&self.failure).get_or_insert_with(|| error.clone());
                    }
                    // Nobody may be waiting for it.
                    let _ = reply.send(result);
                }
                Order::Leave { panicked: p } => {
                    panicked = p;
                    break;
                }
            }
        }
        self.finish(panicked);
    }

    /// Leaves in order, or ends a job that cannot go on.
    fn finish(self, panicked: bool) {
        let failure = lock(&self.failure).clone();
        if let Some(error @ (CommError::RankLost { .. } | CommError::Timeout { .. })) = failure {
            eprintln!("rank {}: {error}; ending the job", self.rank);
            self.world.abort(1);
        }
        if failure.is_none() {
            let reason = if panicked { "panicked" } else { "left the job" };
            self.tell_all(&Message::Bye(reason.to_owned()));
        }
        if panicked {
            std::thread::sleep(GRACE);
            eprintln!("rank {} panicked; ending the job", self.rank);
            self.world.abort(101);
        }
        drop(self.universe);
    }

    fn peers(&self) -> impl Iterator<Item = usize> {
        let own = self.rank;
        (0..self.world_size).filter(move |&rank| rank != own)
    }

    fn tell_all(&self, message: &Message) {
        let bytes = message.encode();
        for peer in self.peers() {
            let peer = self.world.process_at_rank(peer as i32);
            peer.buffered_send_with_tag(&bytes[..], TAG);
        }
    }

    /// Exchanges announcements and compares them.
    fn agree(&self, header: Header) -> CommResult<Vec<Header>> {
        let tensor = header.tensor.clone();
        let message = Message::Header(header.clone());
        self.tell_all(&message);
        let mut headers: Vec<Option<Header>> = vec![None; self.world_size];
        headers[self.rank] = Some(header);
        let mut missing: BTreeSet<usize> = self.peers().collect();
        let deadline = Instant::now() + self.timeout;
        let mut idle = 0u32;
        while !missing.is_empty() {
            let before = missing.len();
            for peer in missing.clone() {
                if let Some(message) = self.poll(peer)? {
                    match message {
                        Message::Header(header) => headers[peer] = Some(header),
                        Message::Bye(reason) => {
                            return Err(CommError::RankLost {
                                rank: peer,
                                reason,
                                tensor,
                            });
                        }
                    }
                    missing.remove(&peer);
                }
            }
            if missing.len() < before {
                idle = 0;
            } else if Instant::now() >= deadline {
                return Err(CommError::Timeout {
                    ranks: missing.into_iter().collect(),
                    tensor,
                    seconds: self.timeout.as_secs(),
                });
            } else if idle < 1000 {
                idle += 1;
                std::thread::yield_now();
            } else {
                std::thread::sleep(Duration::from_micros(100));
            }
        }
        let headers: Vec<Header> = headers.into_iter().flatten().collect();
        agreement::check(&headers.iter().collect::<Vec<_>>())?;
        Ok(headers)
    }

    fn poll(&self, peer: usize) -> CommResult<Option<Message>> {
        let peer = self.world.process_at_rank(peer as i32);
        if peer.immediate_probe_with_tag(TAG).is_none() {
            return Ok(None);
        }
        let (bytes, _) = peer.receive_vec_with_tag::<u8>(TAG);
        Message::decode(&bytes)
            .map(Some)
            .ok_or_else(|| engine_error("an announcement is not of this program's version"))
    }

    fn run(&self, tensor: &str, collective: Collective) -> CommResult<Payload> {
        let headers = self.agree(Header::new(tensor, &collective))?;
        check_counts(tensor, &headers[self.rank])?;
        Ok(match collective {
            Collective::AllGatherV { data, counts } => match data {
                Payload::U32(data) => Payload::U32(self.all_gather(&data, &counts, 0)),
                data => Payload::F32(self.all_gather(&data.into_f32(), &counts, 0.0)),
            },
            Collective::ReduceScatterV { data, counts } => {
                let data = data.unwrap_or_default();
                let adds: Vec<bool> = headers.iter().map(|header| header.sent > 0).collect();
                Payload::F32(self.reduce_scatter(&data, &counts, &adds))
            }
            Collective::AllReduce { data } => Payload::F32(self.all_reduce(&data)),
            Collective::Broadcast { data, root, len } => match data {
                Payload::U32(data) => Payload::U32(self.broadcast(data, root, len, 0)),
                data => Payload::F32(self.broadcast(data.into_f32(), root, len, 0.0)),
            },
            Collective::OnDevice(_) => return Err(CommError::no_device_path("mpi")),
            Collective::Barrier | Collective::Announce(_) => Payload::F32(Vec::new()),
        })
    }

    fn all_gather<T: Equivalence + Clone>(&self, data: &[T], counts: &[usize], zero: T) -> Vec<T> {
        let mut all = vec![zero; counts.iter().sum()];
        let mut parts = PartitionMut::new(&mut all[..], narrow(counts), offsets(counts));
        self.world.all_gather_varcount_into(data, &mut parts);
        all
    }

    fn reduce_scatter(&self, data: &[f32], counts: &[usize], adds: &[bool]) -> Vec<f32> {
        let len = counts[self.rank];
        let nothing = vec![0; self.world_size];
        let send_counts = if data.is_empty() { &nothing } else { counts };
        let receive_counts: Vec<usize> = adds
            .iter()
            .map(|&adds| if adds { len } else { 0 })
            .collect();
        let mut addends = vec![0.0f32; receive_counts.iter().sum()];
        {
            let send = Partition::new(data, narrow(send_counts), offsets(send_counts));
            let (narrowed, offsets) = (narrow(&receive_counts), offsets(&receive_counts));
            let mut receive = PartitionMut::new(&mut addends[..], narrowed, offsets);
            self.world.all_to_all_varcount_into(&send, &mut receive);
        }
        let addends = (0..self.world_size)
            .filter(|&rank| adds[rank])
            .map(|rank| &addends[part(&receive_counts, rank)]);
        agreement::sum(addends, len)
    }

    fn all_reduce(&self, data: &[f32]) -> Vec<f32> {
        let len = data.len();
        if len <= SMALL_SUM {
            let all = self.all_gather(data, &vec![len; self.world_size], 0.0);
            return agreement::sum(all.chunks_exact(len.max(1)), len);
        }
        let size = self.world_size;
        let counts: Vec<usize> = (0..size)
            .map(|rank| len / size + usize::from(rank < len % size))
            .collect();
        let own = self.reduce_scatter(data, &counts, &vec![true; size]);
        self.all_gather(&own, &counts, 0.0)
    }

    fn broadcast<T: Equivalence + Clone>(
        &self,
        mut data: Vec<T>,
        root: usize,
        len: usize,
        zero: T,
    ) -> Vec<T> {
        data.resize(len, zero);
        let root = self.world.process_at_rank(root as i32);
        root.broadcast_into(&mut data[..]);
        data
    }
}

/// MPI counts in 32 bits. Counts are agreed upon, so that all ranks refuse the same.
fn check_counts(tensor: &str, header: &Header) -> CommResult<()> {
    let total: usize = header.counts.iter().sum();
    let largest = header.counts.iter().max().copied().unwrap_or(0);
    // A reduction receives its own part once from each rank.
    let needed = match header.kind {
        Kind::ReduceScatter => total.max(largest.saturating_mul(header.counts.len())),
        _ => total,
    };
    if needed <= Count::MAX as usize {
        return Ok(());
    }
    Err(engine_error(format!(
        "`{tensor}` has {needed} elements, MPI counts to {}; use more ranks or smaller layers",
        Count::MAX
    )))
}

fn narrow(counts: &[usize]) -> Vec<Count> {
    counts.iter().map(|&count| count as Count).collect()
}

fn offsets(counts: &[usize]) -> Vec<Count> {
    let mut sum = 0;
    counts
        .iter()
        .map(|&count| {
            sum += count as Count;
            sum - count as Count
        })
        .collect()
}
