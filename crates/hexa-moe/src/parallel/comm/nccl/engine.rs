//! The thread that makes a rank's NCCL calls.

use std::sync::mpsc::{Receiver, Sender};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use burn_cubecl::tensor::CubeTensor;
use cubecl::cuda::CudaRuntime;
use hexa_ops::backends::Cuda;

use super::gpu::{self, ELEMENT, Gpu, GpuError, Source};
use super::{engine_error, lock};
use crate::parallel::comm::agreement::{Announcement, Header, part};
use crate::parallel::comm::{
    Collective, CommError, CommResult, Communicator, DeviceCollective, DeviceTensor, Payload,
};

/// What the rank wants of its thread.
#[allow(
    clippy::large_enum_variant,
    reason = "orders are few, and each lives for one collective"
)]
pub(super) enum Order {
    Run {
        tensor: String,
        task: Task,
        reply: Sender<CommResult<Payload>>,
    },
    Leave,
}

/// A collective with its data.
#[allow(
    clippy::large_enum_variant,
    reason = "tasks are few, and each lives for one collective"
)]
pub(super) enum Task {
    OnHost(Collective),
    OnDevice {
        collective: DeviceCollective,
        /// Kept until the data have moved; 0 stands for no elements.
        input: Option<CubeTensor<CudaRuntime>>,
        input_address: u64,
        output: Option<CubeTensor<CudaRuntime>>,
        output_address: u64,
    },
}

/// What NCCL is to do with elements that are in place.
enum Move<'a> {
    AllGather(&'a [usize]),
    ReduceScatter(&'a [usize]),
    AllReduce(usize),
    Broadcast { root: usize, len: usize },
}

/// The thread's life: joins, says so, and serves.
pub(super) fn run(
    bootstrap: Arc<dyn Communicator>,
    device: usize,
    timeout: Duration,
    failure: Arc<Mutex<Option<CommError>>>,
    ready: &Sender<CommResult<()>>,
    inbox: Receiver<Order>,
) {
    let mut engine = match join(bootstrap.as_ref(), device) {
        Ok(gpu) => Engine {
            bootstrap,
            gpu,
            timeout,
        },
        Err(error) => {
            let _ = ready.send(Err(error));
            return;
        }
    };
    if ready.send(Ok(())).is_err() {
        return;
    }
    for order in inbox {
        let Order::Run {
            tensor,
            task,
            reply,
        } = order
        else {
            break;
        };
        let failed = lock(&failure).clone();
        let result = failed.map_or_else(|| engine.perform(&tensor, task), Err);
        if let Err(error) = &result {
            lock(&failure).get_or_insert_with(|| error.clone());
        }
        // Nobody may be waiting for it.
        let _ = reply.send(result);
    }
    if lock(&failure).is_some() {
        engine.gpu.abort();
    }
}

/// Opens the device and joins the job, on all ranks or on none.
fn join(bootstrap: &dyn Communicator, device: usize) -> CommResult<Gpu> {
    let rank = bootstrap.rank();
    let opened = match gpu::missing_library() {
        Some(missing) => Err(GpuError(missing.to_owned())),
        None => Gpu::open(device),
    };
    let mut gpu = all_or_none(bootstrap, "nccl: devices", opened)?;
    let id = if rank == 0 {
        all_or_none(bootstrap, "nccl: id", gpu::unique_id())?
    } else {
        all_or_none(bootstrap, "nccl: id", Ok([0; 128]))?
    };
    let words = if rank == 0 {
        bytemuck::pod_collect_to_vec(&id[..])
    } else {
        Vec::new()
    };
    let broadcast = Collective::Broadcast {
        data: Payload::U32(words),
        root: 0,
        len: id.len() / ELEMENT,
    };
    let words = bootstrap.start("nccl: id", broadcast).wait()?.into_u32();
    let id: &[u8] = bytemuck::cast_slice(&words);
    let id = id
        .try_into()
        .map_err(|_| engine_error("the id is not one"))?;
    let joined = gpu.join(id, rank, bootstrap.world_size());
    all_or_none(bootstrap, "nccl: join", joined)?;
    Ok(gpu)
}

/// The outcome, if all ranks succeeded; else this rank's error, or one that names those that failed.
fn all_or_none<T>(
    bootstrap: &dyn Communicator,
    step: &str,
    outcome: Result<T, GpuError>,
) -> CommResult<T> {
    let all = bootstrap.all_gather_u32(step, vec![u32::from(outcome.is_ok())])?;
    let value = outcome.map_err(|error| engine_error(error.0))?;
    let failed: Vec<usize> = (0..all.len()).filter(|&rank| all[rank] == 0).collect();
    if failed.is_empty() {
        return Ok(value);
    }
    Err(engine_error(format!(
        "rank(s) {failed:?} could not join ({step}); look at their own messages"
    )))
}

struct Engine {
    bootstrap: Arc<dyn Communicator>,
    gpu: Gpu,
    timeout: Duration,
}

impl Engine {
    fn perform(&mut self, tensor: &str, task: Task) -> CommResult<Payload> {
        let header = match &task {
            Task::OnHost(collective) => Header::new(tensor, collective),
            Task::OnDevice { collective, .. } => {
                Header::new(tensor, &Collective::OnDevice(collective.clone()))
            }
        };
        let total = header.counts.iter().sum();
        let reserved = self.gpu.reserve(total, matches!(task, Task::OnHost(_)));
        if let Err(error) = reserved {
            // The others must not wait for this rank.
            self.bootstrap.leave();
            return Err(self.give_up(error));
        }
        let announcement = Collective::Announce(Announcement(header));
        self.bootstrap.start(tensor, announcement).wait()?;
        match task {
            Task::OnHost(collective) => self.on_host(tensor, collective),
            Task::OnDevice {
                collective,
                input_address,
                output,
                output_address,
                // It is dropped when the data have moved.
                input: _input,
            } => self.on_device(tensor, collective, input_address, output, output_address),
        }
    }

    fn on_host(&mut self, tensor: &str, collective: Collective) -> CommResult<Payload> {
        let empty = Payload::F32(Vec::new());
        match collective {
            Collective::AllGatherV { data, counts } => {
                self.run_from_host(tensor, &Move::AllGather(&counts), Some(data))
            }
            Collective::ReduceScatterV { data, counts } => {
                let data = data.filter(|data| !data.is_empty()).map(Payload::F32);
                self.run_from_host(tensor, &Move::ReduceScatter(&counts), data)
            }
            Collective::AllReduce { data } => {
                let step = Move::AllReduce(data.len());
                self.run_from_host(tensor, &step, Some(Payload::F32(data)))
            }
            Collective::Broadcast { data, root, len } => {
                self.run_from_host(tensor, &Move::Broadcast { root, len }, Some(data))
            }
            // The announcement was all of it.
            Collective::Barrier | Collective::Announce(_) | Collective::OnDevice(_) => Ok(empty),
        }
    }

    /// `None` for zeros, of floats.
    fn run_from_host(
        &mut self,
        tensor: &str,
        step: &Move,
        data: Option<Payload>,
    ) -> CommResult<Payload> {
        let source = match &data {
            Some(Payload::F32(data)) => Source::Host(bytemuck::cast_slice(data)),
            Some(Payload::U32(data)) => Source::Host(bytemuck::cast_slice(data)),
            Some(Payload::Device(_)) | None => Source::Zeros,
        };
        let received = self.start(step, source).and_then(|place| {
            self.gpu.start_store(place.clone())?;
            Ok(place.len())
        });
        let received = received.map_err(|error| self.give_up(error))?;
        self.wait(tensor)?;
        let bytes = self.gpu.stored(received);
        Ok(match data {
            Some(Payload::U32(_)) => Payload::U32(bytemuck::pod_collect_to_vec(bytes)),
            _ => Payload::F32(bytemuck::pod_collect_to_vec(bytes)),
        })
    }

    fn on_device(
        &mut self,
        tensor: &str,
        collective: DeviceCollective,
        input: u64,
        output: Option<CubeTensor<CudaRuntime>>,
        output_address: u64,
    ) -> CommResult<Payload> {
        let step = match &collective {
            DeviceCollective::AllGatherV { counts, .. } => Move::AllGather(counts),
            DeviceCollective::ReduceScatterV { counts, .. } => Move::ReduceScatter(counts),
            DeviceCollective::AllReduce { addend } => Move::AllReduce(addend.len()),
        };
        let source = if input == 0 {
            Source::Zeros
        } else {
            Source::Device(input)
        };
        let started = self.start(&step, source).and_then(|place| {
            if place.is_empty() {
                return Ok(());
            }
            self.gpu.start_copy(place, output_address)
        });
        started.map_err(|error| self.give_up(error))?;
        self.wait(tensor)?;
        Ok(match output {
            Some(output) => Payload::Device(DeviceTensor::new::<Cuda>(output)),
            None => Payload::F32(Vec::new()),
        })
    }

    /// Puts the elements in place and starts the transfer; returns where the result will be.
    fn start(&mut self, step: &Move, source: Source) -> Result<core::ops::Range<usize>, GpuError> {
        let rank = self.bootstrap.rank();
        let total = match step {
            Move::AllGather(counts) | Move::ReduceScatter(counts) => counts.iter().sum(),
            Move::AllReduce(len) | Move::Broadcast { len, .. } => *len,
        };
        if total == 0 {
            return Ok(0..0);
        }
        match step {
            Move::AllGather(counts) => {
                self.gpu.load(part(counts, rank), source)?;
                self.gpu.all_gather(counts, rank)?;
                Ok(0..total)
            }
            Move::ReduceScatter(counts) => {
                self.gpu.load(0..total, source)?;
                self.gpu.reduce_scatter(counts, rank)?;
                Ok(part(counts, rank))
            }
            Move::AllReduce(_) => {
                self.gpu.load(0..total, source)?;
                self.gpu.all_reduce(total)?;
                Ok(0..total)
            }
            Move::Broadcast { root, .. } => {
                let own = if rank == *root { 0..total } else { 0..0 };
                self.gpu.load(own, source)?;
                self.gpu.broadcast(0, total, *root)?;
                Ok(0..total)
            }
        }
    }

    /// Waits for the device, within the time limit.
    fn wait(&mut self, tensor: &str) -> CommResult<()> {
        self.gpu.mark().map_err(|error| self.give_up(error))?;
        let deadline = Instant::now() + self.timeout;
        let mut idle = 0u32;
        loop {
            match self.gpu.finished() {
                Ok(true) => return Ok(()),
                Ok(false) => {}
                Err(error) => return Err(self.give_up(error)),
            }
            if Instant::now() >= deadline {
                self.gpu.abort();
                let own = self.bootstrap.rank();
                return Err(CommError::Timeout {
                    ranks: (0..self.bootstrap.world_size())
                        .filter(|&r| r != own)
                        .collect(),
                    tensor: tensor.to_owned(),
                    seconds: self.timeout.as_secs(),
                });
            }
            if idle < 1000 {
                idle += 1;
                std::thread::yield_now();
            } else {
                std::thread::sleep(Duration::from_micros(50));
            }
        }
    }

    fn give_up(&mut self, error: GpuError) -> CommError {
        self.gpu.abort();
        engine_error(error.0)
    }
}
