//! The concrete back-ends, without fusion, by the names of the features that compile them in.

/// CPU: burn-flex.
#[cfg(feature = "cpu")]
pub type Cpu = burn_flex::Flex;

/// Vulkan, Metal or WebGPU, through wgpu.
#[cfg(feature = "wgpu")]
pub type Wgpu = burn_cubecl::CubeBackend<cubecl::wgpu::WgpuRuntime, f32, i32, u32>;

/// NVIDIA GPUs.
#[cfg(feature = "cuda")]
pub type Cuda = burn_cubecl::CubeBackend<cubecl::cuda::CudaRuntime, f32, i32, u8>;
