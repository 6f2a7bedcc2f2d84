//! Tensors that move from device to device without a detour through the host's memory.

use core::any::Any;
use core::fmt;
use std::sync::Arc;

use burn::tensor::TensorMetadata;
use burn::tensor::backend::Backend;
use burn::tensor::ops::FloatTensor;

/// A float tensor of any back-end, for an engine that knows the back-end.
#[derive(Clone)]
pub struct DeviceTensor {
    tensor: Arc<dyn Any + Send + Sync>,
    len: usize,
}

impl DeviceTensor {
    /// Wraps a back-end's float tensor. Engines take f32 and want elements without gaps.
    pub fn new<B: Backend>(tensor: FloatTensor<B>) -> Self {
        let len = tensor.shape().num_elements();
        Self {
            tensor: Arc::new(tensor),
            len,
        }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The tensor, if it is of this back-end.
    pub fn get<B: Backend>(&self) -> Option<FloatTensor<B>> {
        self.tensor.downcast_ref::<FloatTensor<B>>().cloned()
    }
}

impl PartialEq for DeviceTensor {
    /// Whether it is the same tensor; elements are not compared.
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.tensor, &other.tensor)
    }
}

impl fmt::Debug for DeviceTensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DeviceTensor({} elements)", self.len)
    }
}

/// [`Collective`](super::Collective)s of f32 tensors of one dimension; each yields such a tensor,
/// or an empty payload of the host's where there are no elements.
#[derive(Debug, Clone, PartialEq)]
pub enum DeviceCollective {
    /// Everybody receives everybody's `part`.
    AllGatherV {
        /// `counts[rank]` elements; `None` for none.
        part: Option<DeviceTensor>,
        /// Elements of each rank.
        counts: Vec<usize>,
    },
    /// Rank `q` receives part `q` of the sum over ranks.
    ReduceScatterV {
        /// The parts for all ranks, one after the other; `None` for zeros.
        addend: Option<DeviceTensor>,
        /// Elements of each part.
        counts: Vec<usize>,
    },
    /// Everybody receives the sum over ranks.
    AllReduce {
        /// This rank's addend.
        addend: DeviceTensor,
    },
}
