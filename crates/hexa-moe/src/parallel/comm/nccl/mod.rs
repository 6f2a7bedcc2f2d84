//! One CUDA GPU per rank; NCCL moves the data.
//!
//! Ranks find each other and compare what they are about to do through another engine: as threads
//! of one process through [`local`](super::local), as processes through `mpi`. One thread per rank
//! makes all NCCL calls, one collective after the other in the order in which they were started,
//! on a stream of its own, so that transfers overlap with what the rank computes.
//!
//! - Tensors of the CUDA back-end on the rank's device stay there ([`Communicator::takes`]); other
//!   data go through page-locked memory.
//! - Sums are in f32. Their order is NCCL's: it depends on the number of ranks and on how the
//!   GPUs are linked, and is not promised to be the same from one machine to the next.
//! - A rank that dies while data move leaves the others waiting; after the time limit they give up
//!   the NCCL job and report it. Joining alone has no time limit but NCCL's own.

mod engine;
mod gpu;

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use burn::backend::Autodiff;
use burn::tensor::{DType, Shape};
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::ops::numeric::empty_device_contiguous_dtype;
use burn_cubecl::tensor::CubeTensor;
use cubecl::Runtime;
use cubecl::cuda::{CudaDevice, CudaRuntime};
use cubecl::future::block_on;
use hexa_ops::backends::Cuda;

use super::{
    Collective, CommError, CommResult, Communicator, DeviceCollective, DeviceTensor, Payload,
    Pending,
};
use engine::{Order, Task};

/// Number of CUDA devices that this process sees; 0 where there is no driver.
pub fn device_count() -> usize {
    gpu::device_count()
}

/// Why this process cannot take part in a job, as far as libraries and devices tell.
pub fn obstacle() -> Option<String> {
    if let Some(missing) = gpu::missing_library() {
        return Some(missing.to_owned());
    }
    (device_count() == 0).then(|| "there is no CUDA device".to_owned())
}

/// One rank's end of an NCCL job.
#[derive(Debug)]
pub struct NcclCommunicator {
    bootstrap: Arc<dyn Communicator>,
    device: CudaDevice,
    orders: Sender<Order>,
    failure: Arc<Mutex<Option<CommError>>>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

fn engine_error(reason: impl Into<String>) -> CommError {
    CommError::Engine {
        engine: "nccl",
        reason: reason.into(),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl NcclCommunicator {
    /// Joins with device number `device`, which no other rank may use. The ranks are `bootstrap`'s,
    /// and all call this; `timeout` bounds the time that data of one collective take.
    ///
    /// # Errors
    /// On all ranks, [`CommError::Engine`] if a rank lacks the libraries or its device, or if NCCL
    /// refuses the job; whatever `bootstrap` reports.
    pub fn init(
        bootstrap: impl Communicator + 'static,
        device: usize,
        timeout: Duration,
    ) -> CommResult<Self> {
        let bootstrap: Arc<dyn Communicator> = Arc::new(bootstrap);
        let (orders, inbox) = channel();
        let (ready, joined) = channel();
        let failure = Arc::new(Mutex::new(None));
        let thread = {
            let (bootstrap, failure) = (bootstrap.clone(), failure.clone());
            let run = move || engine::run(bootstrap, device, timeout, failure, &ready, inbox);
            std::thread::Builder::new()
                .name("nccl".to_owned())
                .spawn(run)
        };
        let thread = thread.map_err(|error| engine_error(error.to_string()))?;
        let outcome = joined.recv();
        outcome.unwrap_or_else(|_| Err(engine_error("the engine's thread panicked")))?;
        Ok(Self {
            bootstrap,
            device: CudaDevice { index: device },
            orders,
            failure,
            thread: Mutex::new(Some(thread)),
        })
    }

    /// This rank's device.
    pub fn device(&self) -> &CudaDevice {
        &self.device
    }

    fn order(&self, tensor: &str, task: Task) -> Pending {
        let (reply, result): (_, Receiver<CommResult<Payload>>) = channel();
        let sent = self.orders.send(Order::Run {
            tensor: tensor.to_owned(),
            task,
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

    /// Finds the addresses of a collective's tensors and waits until the device has written them.
    fn on_device(&self, collective: DeviceCollective) -> CommResult<Task> {
        let client = CudaRuntime::client(&self.device);
        let rank = self.rank();
        let (input, received) = match &collective {
            DeviceCollective::AllGatherV { part, counts } => (part, counts.iter().sum()),
            DeviceCollective::ReduceScatterV { addend, counts } => {
                (addend, counts.get(rank).copied().unwrap_or(0))
            }
            DeviceCollective::AllReduce { addend } => (&Some(addend.clone()), addend.len()),
        };
        let input = input.as_ref().filter(|input| !input.is_empty());
        let input = input
            .map(|input| self.resolve(input).map(into_contiguous))
            .transpose()?;
        let output = (received > 0).then(|| {
            let shape = Shape::new([received]);
            empty_device_contiguous_dtype(client.clone(), self.device.clone(), shape, DType::F32)
        });
        let address = |tensor: &Option<CubeTensor<CudaRuntime>>| {
            let Some(tensor) = tensor else { return Ok(0) };
            let memory = client.get_resource(tensor.handle.clone());
            let memory = memory.map_err(|error| engine_error(error.to_string()))?;
            Ok(memory.resource().ptr)
        };
        let task = Task::OnDevice {
            input_address: address(&input)?,
            output_address: address(&output)?,
            collective,
            input,
            output,
        };
        // CubeCL's stream is its own: nothing but the host can wait for it.
        block_on(client.sync()).map_err(|error| engine_error(error.to_string()))?;
        Ok(task)
    }

    fn resolve(&self, tensor: &DeviceTensor) -> CommResult<CubeTensor<CudaRuntime>> {
        cuda_tensor(tensor).ok_or_else(|| {
            engine_error("a tensor is not of the CUDA back-end; move it through the host")
        })
    }
}

/// The tensor, tracked or not, if it is of the CUDA back-end without fusion.
fn cuda_tensor(tensor: &DeviceTensor) -> Option<CubeTensor<CudaRuntime>> {
    let tracked = || Some(tensor.get::<Autodiff<Cuda>>()?.primitive);
    tensor.get::<Cuda>().or_else(tracked)
}

impl Communicator for NcclCommunicator {
    fn rank(&self) -> usize {
        self.bootstrap.rank()
    }

    fn world_size(&self) -> usize {
        self.bootstrap.world_size()
    }

    fn start(&self, tensor: &str, collective: Collective) -> Pending {
        let task = match collective {
            Collective::OnDevice(collective) => self.on_device(collective),
            collective => Ok(Task::OnHost(collective)),
        };
        match task {
            Ok(task) => self.order(tensor, task),
            Err(error) => {
                // The others must not wait for this rank.
                lock(&self.failure).get_or_insert_with(|| error.clone());
                self.bootstrap.leave();
                Pending::new(move || Err(error))
            }
        }
    }

    fn leave(&self) {
        if std::thread::panicking() {
            // The others learn it now, and what this rank has started fails.
            self.bootstrap.leave();
        }
        // After the first time there is nobody to receive it, which is as well.
        let _ = self.orders.send(Order::Leave);
        if let Some(thread) = lock(&self.thread).take() {
            let _ = thread.join();
        }
        self.bootstrap.leave();
    }

    fn failure(&self) -> Option<CommError> {
        lock(&self.failure).clone()
    }

    fn takes(&self, tensor: &DeviceTensor) -> bool {
        cuda_tensor(tensor)
            .is_some_and(|tensor| tensor.dtype == DType::F32 && tensor.device == self.device)
    }
}

impl Drop for NcclCommunicator {
    fn drop(&mut self) {
        self.leave();
    }
}
