//! CUDA source as a kernel of CubeCL's.

use cubecl::cuda::{CudaCompiler, CudaRuntime};
use cubecl::ir::StorageType;
use cubecl::prelude::*;
use cubecl::server::{KernelArguments, MetadataBindingInfo};
use cubecl_cpp::shared::{Body, ComputeKernel, Elem, Flags, Item, SharedMemory};
use cubecl_runtime::compiler::{CompilationError, Compiler, CubeTask};
use cubecl_runtime::kernel::{CompiledKernel, KernelMetadata};
use cubecl_runtime::server::ExecutionMode;

use super::source::{FINISH_THREADS, TEXT_HASH, Variant, finish_text};

/// What is compiled.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum Kernel {
    /// A matrix product.
    Grouped(Variant),
    /// The gate weights' gradient, and slabs for the second bias'.
    GateGradient {
        /// Element type.
        is_f16: bool,
        /// Choices per token.
        top_k: usize,
    },
    /// Tokens' rows in expert order.
    SortRows {
        /// Choices per token.
        top_k: usize,
    },
    /// The sum of the parts of long sums.
    SumParts {
        /// Element type.
        is_f16: bool,
    },
    /// The sum of the slabs that [`super::source::SLAB_ROWS`] rows each have left.
    SumSlabs {
        /// Element type.
        is_f16: bool,
    },
}

impl Kernel {
    fn entry(&self) -> &'static str {
        match self {
            Kernel::Grouped(_) => "hexa_grouped",
            Kernel::GateGradient { .. } => "hexa_gate_gradient",
            Kernel::SortRows { .. } => "hexa_sort_rows",
            Kernel::SumParts { .. } => "hexa_sum_parts",
            Kernel::SumSlabs { .. } => "hexa_sum_slabs",
        }
    }

    fn text(&self) -> String {
        match self {
            Kernel::Grouped(variant) => variant.text(),
            Kernel::GateGradient { is_f16, top_k } => finish_text(*is_f16, *top_k),
            Kernel::SortRows { top_k } => finish_text(false, *top_k),
            Kernel::SumParts { is_f16 } | Kernel::SumSlabs { is_f16 } => finish_text(*is_f16, 1),
        }
    }

    fn shared_bytes(&self) -> usize {
        match self {
            Kernel::Grouped(variant) => variant.shared_bytes(),
            _ => 0,
        }
    }

    fn cube_dim(&self) -> CubeDim {
        CubeDim::new_1d(match self {
            Kernel::Grouped(variant) => variant.threads() as u32,
            _ => FINISH_THREADS,
        })
    }
}

/// The dialect of the CUDA compiler.
type CudaKernel = <CudaCompiler as Compiler>::Representation;

impl KernelMetadata for Kernel {
    fn id(&self) -> KernelId {
        KernelId::new::<Self>()
            .cube_dim(self.cube_dim())
            .info((self.clone(), TEXT_HASH))
    }

    fn address_type(&self) -> StorageType {
        u64::as_type_native_unchecked().storage_type()
    }
}

impl CubeTask<CudaCompiler> for Kernel {
    fn compile(
        &self,
        _compiler: &mut CudaCompiler,
        _options: &<CudaCompiler as Compiler>::CompilationOptions,
        _mode: ExecutionMode,
        _address: StorageType,
    ) -> Result<CompiledKernel<CudaCompiler>, CompilationError> {
        let byte = Item::new(Elem::U8, 1, true);
        // The runtime reads nothing from this but the size of the shared memory.
        let repr: CudaKernel = ComputeKernel {
            tensor_maps: vec![],
            buffers: vec![],
            scalars: vec![],
            info: Default::default(),
            meta_static_len: 0,
            body: Body {
                instructions: vec![],
                shared_memories: vec![SharedMemory::Array {
                    index: 0,
                    item: byte,
                    length: self.shared_bytes(),
                    align: 1024,
                    offset: 0,
                }],
                pipelines: vec![],
                barriers: vec![],
                const_arrays: vec![],
                local_arrays: vec![],
                info_by_ptr: true,
                has_dynamic_meta: false,
                address_type: byte,
            },
            cube_dim: self.cube_dim(),
            cluster_dim: None,
            extensions: vec![],
            flags: Flags::default(),
            items: Default::default(),
            kernel_name: self.entry().into(),
        };
        Ok(CompiledKernel {
            entrypoint_name: self.entry().into(),
            debug_name: None,
            source: self.text(),
            repr: Some(repr),
            cube_dim: self.cube_dim(),
            debug_info: None,
        })
    }
}

impl Kernel {
    /// Puts the kernel into the client's queue. `scalars` are its last argument, a struct of them.
    ///
    /// # Safety
    /// Buffers, maps and scalars must be those that the text's signature names, and must describe
    /// memory that exists.
    pub(super) unsafe fn launch(
        self,
        client: &ComputeClient<CudaRuntime>,
        cubes: (u32, u32),
        mut arguments: KernelArguments,
        scalars: Vec<u64>,
    ) {
        // All of it is by value: no part lies in a buffer of its own.
        let len = scalars.len();
        arguments.info = MetadataBindingInfo::new(scalars, len);
        client.launch(
            Box::new(self),
            CubeCount::Static(cubes.0, cubes.1, 1),
            arguments,
        );
    }
}
