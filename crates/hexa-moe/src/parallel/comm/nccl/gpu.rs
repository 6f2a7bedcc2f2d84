//! One GPU and its end of the NCCL job: staging memory, a stream of its own, and the calls.
//!
//! All data pass through one piece of device memory that this module allocates itself. NCCL reads
//! the memory of another rank's thread directly, and CubeCL's, which comes from CUDA's pools, is
//! not open to other devices. The copy within a device costs a few percent of what links cost.

use core::ffi::{CStr, c_void};
use core::ops::Range;

use cudarc::driver::result::{self as cuda, DriverError, stream::StreamKind};
use cudarc::driver::sys::{self as cuda_sys, CUresult};
use cudarc::nccl::result::{self as nccl, NcclError};
use cudarc::nccl::sys::{self as nccl_sys, ncclDataType_t, ncclRedOp_t, ncclResult_t};

/// Bytes of an element: all are 32 bits wide.
pub(super) const ELEMENT: usize = 4;
/// Staging memory grows in steps of this.
const STEP: usize = 1 << 20;

/// What CUDA or NCCL said.
#[derive(Debug)]
pub(super) struct GpuError(pub String);

impl From<DriverError> for GpuError {
    fn from(error: DriverError) -> Self {
        Self(format!("CUDA: {error}"))
    }
}

impl From<NcclError> for GpuError {
    fn from(error: NcclError) -> Self {
        Self(format!(
            "NCCL: {}; NCCL_DEBUG=INFO tells more",
            text(error.0)
        ))
    }
}

fn text(code: ncclResult_t) -> String {
    // SAFETY: NCCL returns a static string for any code.
    unsafe {
        let text = nccl_sys::ncclGetErrorString(code);
        CStr::from_ptr(text).to_string_lossy().into_owned()
    }
}

type Result<T> = core::result::Result<T, GpuError>;

/// Where elements come from.
pub(super) enum Source<'a> {
    Host(&'a [u8]),
    /// Memory of the device, complete and unchanged until the collective is.
    Device(u64),
    Zeros,
}

/// The first of the two libraries that is not there.
pub(super) fn missing_library() -> Option<&'static str> {
    // SAFETY: loading these libraries runs NVIDIA's initialisers, and nothing else.
    unsafe {
        if !cuda_sys::is_culib_present() {
            Some("CUDA's driver (libcuda.so) is not there")
        } else if !nccl_sys::is_culib_present() {
            Some(
                "libnccl.so is not found; install NCCL, or let a folder of LD_LIBRARY_PATH have a \
                 link of this name to libnccl.so.2",
            )
        } else {
            None
        }
    }
}

/// CUDA devices that this process sees; 0 without a driver.
pub(super) fn device_count() -> usize {
    // SAFETY: as above.
    if !unsafe { cuda_sys::is_culib_present() } || cuda::init().is_err() {
        return 0;
    }
    cuda::device::get_count().map_or(0, |count| count.max(0) as usize)
}

/// Bytes by which ranks find each other.
pub(super) fn unique_id() -> Result<[u8; 128]> {
    Ok(nccl::get_uniqueid()?.internal.map(|byte| byte as u8))
}

/// Memory of the device or page-locked memory of the host, which grows and keeps nothing.
struct Staging {
    address: u64,
    bytes: usize,
    on_host: bool,
}

impl Staging {
    fn new(on_host: bool) -> Self {
        Self {
            address: 0,
            bytes: 0,
            on_host,
        }
    }

    /// Makes room; nothing may be in flight.
    fn reserve(&mut self, bytes: usize) -> Result<()> {
        if bytes <= self.bytes {
            return Ok(());
        }
        self.free()?;
        let bytes = bytes.next_multiple_of(STEP);
        // SAFETY: the context is current; the memory is written before it is read.
        self.address = unsafe {
            if self.on_host {
                cuda::malloc_host(bytes, 0)? as u64
            } else {
                cuda::malloc_sync(bytes)?
            }
        };
        self.bytes = bytes;
        Ok(())
    }

    fn free(&mut self) -> Result<()> {
        let address = core::mem::take(&mut self.address);
        self.bytes = 0;
        if address == 0 {
            return Ok(());
        }
        // SAFETY: it was allocated by the matching function and is not freed elsewhere.
        unsafe {
            if self.on_host {
                cuda::free_host(address as *mut c_void)?;
            } else {
                cuda::free_sync(address)?;
            }
        }
        Ok(())
    }

    /// The first `bytes` of page-locked memory.
    fn host(&mut self, bytes: usize) -> &mut [u8] {
        assert!(self.on_host && bytes <= self.bytes);
        if bytes == 0 {
            return &mut [];
        }
        // SAFETY: that much was allocated; callers let no copy be in flight, and `u8` may have any
        // value.
        unsafe { core::slice::from_raw_parts_mut(self.address as *mut u8, bytes) }
    }
}

/// One rank's GPU. Its thread alone uses it.
pub(super) struct Gpu {
    device: cuda_sys::CUdevice,
    stream: cuda_sys::CUstream,
    done: cuda_sys::CUevent,
    comm: nccl_sys::ncclComm_t,
    device_memory: Staging,
    host_memory: Staging,
}

impl Gpu {
    /// Takes the device's primary context, which CubeCL uses too, on this thread.
    pub(super) fn open(device: usize) -> Result<Self> {
        cuda::init()?;
        let count = cuda::device::get_count()?;
        let ordinal = i32::try_from(device)
            .ok()
            .filter(|ordinal| *ordinal < count);
        let ordinal = ordinal.ok_or_else(|| {
            GpuError(format!(
                "there is no CUDA device {device}, but {count} in all; give each rank one of its own"
            ))
        })?;
        let device = cuda::device::get(ordinal)?;
        // SAFETY: the device exists; the context is released when this is dropped.
        unsafe {
            let context = cuda::primary_ctx::retain(device)?;
            cuda::ctx::set_current(context)?;
        }
        Ok(Self {
            device,
            stream: cuda::stream::create(StreamKind::NonBlocking)?,
            done: cuda::event::create(cuda_sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)?,
            comm: core::ptr::null_mut(),
            device_memory: Staging::new(false),
            host_memory: Staging::new(true),
        })
    }

    /// Joins the job; returns when all ranks have.
    pub(super) fn join(&mut self, id: [u8; 128], rank: usize, world_size: usize) -> Result<()> {
        let id = nccl_sys::ncclUniqueId {
            internal: id.map(|byte| byte as _),
        };
        // SAFETY: the pointer is this struct's own, and the id NCCL's.
        unsafe { nccl::comm_init_rank(&mut self.comm, world_size as i32, id, rank as i32)? };
        Ok(())
    }

    fn at(&self, element: usize) -> u64 {
        self.device_memory.address + (element * ELEMENT) as u64
    }

    fn nccl_stream(&self) -> nccl_sys::cudaStream_t {
        self.stream.cast()
    }

    /// Makes room for `total` elements, here and, if they come from the host or go there, in
    /// page-locked memory. CUDA may wait for all devices of the process when it allocates, so that no
    /// rank may wait for this one in NCCL meanwhile.
    pub(super) fn reserve(&mut self, total: usize, on_host: bool) -> Result<()> {
        self.device_memory.reserve(total * ELEMENT)?;
        if on_host {
            self.host_memory.reserve(total * ELEMENT)?;
        }
        Ok(())
    }

    /// Puts `source` at `place`, for which there is room.
    pub(super) fn load(&mut self, place: Range<usize>, source: Source) -> Result<()> {
        let bytes = place.len() * ELEMENT;
        if bytes == 0 {
            return Ok(());
        }
        let target = self.at(place.start);
        if let Source::Host(data) = source {
            self.host_memory.host(bytes).copy_from_slice(data);
        }
        // SAFETY: room was made for the target, sources have as many bytes, and both stay
        // until the stream was waited for.
        unsafe {
            match source {
                Source::Host(_) => {
                    let data = self.host_memory.host(bytes);
                    cuda::memcpy_htod_async(target, data, self.stream)?;
                }
                Source::Device(address) => {
                    cuda::memcpy_dtod_async(target, address, bytes, self.stream)?;
                }
                Source::Zeros => cuda::memset_d8_async(target, 0, bytes, self.stream)?,
            }
        }
        Ok(())
    }

    /// Starts to copy elements to page-locked memory.
    pub(super) fn start_store(&mut self, place: Range<usize>) -> Result<()> {
        let bytes = place.len() * ELEMENT;
        let source = self.at(place.start);
        if bytes > 0 {
            // SAFETY: both have that many bytes, and stay until the stream was waited for.
            unsafe {
                let data = self.host_memory.host(bytes);
                cuda::memcpy_dtoh_async(data, source, self.stream)?;
            }
        }
        Ok(())
    }

    /// The elements that were stored, once [`Gpu::finished`].
    pub(super) fn stored(&mut self, elements: usize) -> &[u8] {
        self.host_memory.host(elements * ELEMENT)
    }

    /// Starts to copy elements to memory of the device.
    pub(super) fn start_copy(&mut self, place: Range<usize>, target: u64) -> Result<()> {
        let bytes = place.len() * ELEMENT;
        // SAFETY: callers give a target of that size that stays until the stream was waited for.
        unsafe { cuda::memcpy_dtod_async(target, self.at(place.start), bytes, self.stream)? };
        Ok(())
    }

    /// Sends each rank's elements to all, in place.
    pub(super) fn all_gather(&self, counts: &[usize], rank: usize) -> Result<()> {
        // Elements are moved only, so that their type does not matter.
        let kind = ncclDataType_t::ncclFloat32;
        if let Some(count) = equal(counts) {
            let (own, all) = (self.at(count * rank) as *const _, self.at(0) as *mut _);
            // SAFETY: the memory holds the sum of the counts.
            unsafe { nccl::all_gather(own, all, count, kind, self.comm, self.nccl_stream())? };
            return Ok(());
        }
        grouped(counts, |root, count, place| {
            self.broadcast(place, count, root)
        })
    }

    /// Sends what `root` has to all, in place.
    pub(super) fn broadcast(&self, place: usize, count: usize, root: usize) -> Result<()> {
        let kind = ncclDataType_t::ncclFloat32;
        let address = self.at(place);
        let (from, to) = (address as *const _, address as *mut _);
        let stream = self.nccl_stream();
        // SAFETY: callers have loaded that much memory.
        unsafe { nccl::broadcast(from, to, count, kind, root as i32, self.comm, stream)? };
        Ok(())
    }

    /// Sums each part at its rank, in place.
    pub(super) fn reduce_scatter(&self, counts: &[usize], rank: usize) -> Result<()> {
        let (kind, sum) = (ncclDataType_t::ncclFloat32, ncclRedOp_t::ncclSum);
        let stream = self.nccl_stream();
        if let Some(count) = equal(counts) {
            let (all, own) = (self.at(0) as *const _, self.at(count * rank) as *mut _);
            // SAFETY: the memory holds the sum of the counts.
            unsafe { nccl::reduce_scatter(all, own, count, kind, sum, self.comm, stream)? };
            return Ok(());
        }
        grouped(counts, |root, count, place| {
            let (from, to) = (self.at(place) as *const _, self.at(place) as *mut _);
            // SAFETY: as above.
            unsafe {
                nccl::reduce(from, to, count, kind, sum, root as i32, self.comm, stream)?;
            }
            Ok(())
        })
    }

    /// Sums at all ranks, in place.
    pub(super) fn all_reduce(&self, count: usize) -> Result<()> {
        let (kind, sum) = (ncclDataType_t::ncclFloat32, ncclRedOp_t::ncclSum);
        let (from, to) = (self.at(0) as *const _, self.at(0) as *mut _);
        // SAFETY: callers have loaded that much memory.
        unsafe { nccl::all_reduce(from, to, count, kind, sum, self.comm, self.nccl_stream())? };
        Ok(())
    }

    /// Marks the end of what was started.
    pub(super) fn mark(&self) -> Result<()> {
        // SAFETY: event and stream are this struct's own.
        unsafe { cuda::event::record(self.done, self.stream)? };
        Ok(())
    }

    /// Whether everything up to the mark is done; an error if NCCL has failed.
    pub(super) fn finished(&self) -> Result<bool> {
        // SAFETY: the event is this struct's own.
        match unsafe { cuda::event::query(self.done) } {
            Ok(()) => return Ok(true),
            Err(DriverError(CUresult::CUDA_ERROR_NOT_READY)) => {}
            Err(error) => return Err(error.into()),
        }
        let mut code = ncclResult_t::ncclSuccess;
        // SAFETY: the communicator was initialised.
        unsafe { nccl_sys::ncclCommGetAsyncError(self.comm, &mut code).result()? };
        code.result()?;
        Ok(false)
    }

    /// Ends collectives that cannot complete, so that memory may be freed.
    pub(super) fn abort(&mut self) {
        let comm = core::mem::replace(&mut self.comm, core::ptr::null_mut());
        if comm.is_null() {
            return;
        }
        // SAFETY: the communicator was initialised and is not used again. Of errors there is
        // nothing more to be said: the job has failed already.
        unsafe {
            let _ = nccl::comm_abort(comm);
            let _ = cuda::stream::synchronize(self.stream);
        }
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        // SAFETY: all of it is this struct's own, and nothing is in flight any more. Errors when
        // leaving change nothing.
        unsafe {
            if !self.comm.is_null() {
                let _ = nccl::comm_destroy(self.comm);
            }
            let _ = self.device_memory.free();
            let _ = self.host_memory.free();
            let _ = cuda::event::destroy(self.done);
            let _ = cuda::stream::destroy(self.stream);
            let _ = cuda::primary_ctx::release(self.device);
        }
    }
}

/// The count, if it is the same for all.
fn equal(counts: &[usize]) -> Option<usize> {
    let first = *counts.first()?;
    counts.iter().all(|&count| count == first).then_some(first)
}

/// One call per rank that has elements, with its rank, count and place, as one operation.
fn grouped(
    counts: &[usize],
    mut call: impl FnMut(usize, usize, usize) -> Result<()>,
) -> Result<()> {
    nccl::group_start()?;
    let mut place = 0;
    let mut outcome = Ok(());
    for (rank, &count) in counts.iter().enumerate() {
        if count > 0 && outcome.is_ok() {
            outcome = call(rank, count, place);
        }
        place += count;
    }
    // The group is closed in any case.
    let end = nccl::group_end();
    outcome?;
    end?;
    Ok(())
}
