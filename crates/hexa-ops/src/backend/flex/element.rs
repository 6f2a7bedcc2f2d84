//! Reading and writing Flex tensors in the accumulator's type.

use std::borrow::Cow;

use burn::tensor::{Bytes, DType, Element, Shape, TensorMetadata, bf16, f16};
use burn_flex::{FlexTensor, Layout};
use rayon::prelude::*;

use super::transcendental::Transcendental;
use crate::backend::RawExpertIndex;

/// An accumulator: f32 or f64.
pub trait Real: Element + bytemuck::Pod + Transcendental + Send + Sync + 'static {}

impl Real for f32 {}
impl Real for f64 {}

/// A contiguous copy or view of a tensor, in the accumulator's type.
pub struct Matrix<A: Real> {
    contiguous: FlexTensor,
    converted: Option<Vec<A>>,
}

impl<A: Real> Matrix<A> {
    /// Reads a float tensor; no copy if it is contiguous and already of type `A`.
    pub fn read(tensor: &FlexTensor) -> Self {
        let contiguous = tensor.to_contiguous();
        let converted = match contiguous.dtype() {
            dtype if dtype == A::dtype() => None,
            DType::F16 => Some(convert::<f16, A>(contiguous.storage())),
            DType::BF16 => Some(convert::<bf16, A>(contiguous.storage())),
            DType::F32 => Some(convert::<f32, A>(contiguous.storage())),
            other => unreachable!("validated to be a float dtype, got {other:?}"),
        };
        Self {
            contiguous,
            converted,
        }
    }

    /// The elements in row-major order.
    pub fn as_slice(&self) -> &[A] {
        match &self.converted {
            Some(values) => values,
            None => self.contiguous.storage(),
        }
    }
}

fn convert<S: Element + bytemuck::Pod, A: Element>(source: &[S]) -> Vec<A> {
    source.iter().map(|v| v.elem::<A>()).collect()
}

/// Wraps values in a tensor of `dtype`, rounding once.
pub fn write<A: Real>(values: Vec<A>, shape: impl Into<Shape>, dtype: DType) -> FlexTensor {
    let layout = Layout::contiguous(shape.into());
    let bytes = match dtype {
        dtype if dtype == A::dtype() => Bytes::from_elems(values),
        DType::F16 => Bytes::from_elems(convert::<A, f16>(&values)),
        DType::BF16 => Bytes::from_elems(convert::<A, bf16>(&values)),
        other => unreachable!("validated to be a float dtype, got {other:?}"),
    };
    FlexTensor::new(bytes, layout, dtype)
}

/// Wraps indices in an i32 tensor.
pub fn write_int(values: Vec<i32>, shape: impl Into<Shape>) -> FlexTensor {
    FlexTensor::new(
        Bytes::from_elems(values),
        Layout::contiguous(shape.into()),
        DType::I32,
    )
}

/// Reads an int tensor of any width as i32, as the indices of this crate fit.
pub fn read_int(tensor: &FlexTensor) -> Vec<i32> {
    let contiguous = tensor.to_contiguous();
    match contiguous.dtype() {
        DType::I32 => contiguous.storage::<i32>().to_vec(),
        DType::I64 => saturate(contiguous.storage::<i64>()),
        DType::I16 => contiguous
            .storage::<i16>()
            .iter()
            .map(|&v| v.into())
            .collect(),
        DType::I8 => contiguous
            .storage::<i8>()
            .iter()
            .map(|&v| v.into())
            .collect(),
        DType::U64 => saturate(contiguous.storage::<u64>()),
        DType::U32 => saturate(contiguous.storage::<u32>()),
        DType::U16 => contiguous
            .storage::<u16>()
            .iter()
            .map(|&v| v.into())
            .collect(),
        DType::U8 => contiguous
            .storage::<u8>()
            .iter()
            .map(|&v| v.into())
            .collect(),
        other => unreachable!("an int tensor has an int dtype, got {other:?}"),
    }
}

fn saturate<T: Copy + TryInto<i32> + PartialOrd + Default>(values: &[T]) -> Vec<i32> {
    values
        .iter()
        .map(|&v| {
            v.try_into()
                .unwrap_or(if v < T::default() { i32::MIN } else { i32::MAX })
        })
        .collect()
}

/// A dropout seed's 64 bits.
pub fn read_seed(seed: &FlexTensor) -> [u32; 2] {
    let contiguous = seed.to_contiguous();
    match contiguous.dtype() {
        // A seed is bits, not a number: wide integers are cut, not saturated.
        DType::I64 => {
            let v = contiguous.storage::<i64>();
            [v[0] as u32, v[1] as u32]
        }
        _ => {
            let v = read_int(&contiguous);
            [v[0] as u32, v[1] as u32]
        }
    }
}

/// An expert index on the host.
pub struct HostIndex {
    /// First position of each expert, and the number of slots.
    pub offsets: Vec<usize>,
    /// Slot at each position.
    pub slots: Vec<usize>,
    /// Position of each slot.
    pub positions: Vec<usize>,
    /// Choices per token.
    pub top_k: usize,
}

impl HostIndex {
    /// Reads the index; on Flex its tensors are host memory.
    pub fn read(index: &RawExpertIndex<FlexTensor>) -> Self {
        let read = |t: &FlexTensor| read_int(t).into_iter().map(|v| v as usize).collect();
        Self {
            offsets: read(&index.offsets),
            slots: read(&index.slots),
            positions: read(&index.positions),
            top_k: index.top_k,
        }
    }

    /// Number of experts.
    pub fn num_experts(&self) -> usize {
        self.offsets.len() - 1
    }

    /// The row of a matrix in `order` that belongs to `position`.
    pub fn row(&self, order: crate::RowOrder, position: usize) -> usize {
        match order {
            crate::RowOrder::Token => self.slots[position] / self.top_k,
            crate::RowOrder::Slot => self.slots[position],
            crate::RowOrder::Expert => position,
        }
    }

    /// Rows of `x` brought into expert order; borrowed if they are in it.
    pub fn gather<'a, A: Real>(
        &self,
        x: &'a [A],
        order: crate::RowOrder,
        width: usize,
    ) -> Cow<'a, [A]> {
        if order == crate::RowOrder::Expert || width == 0 {
            return Cow::Borrowed(x);
        }
        let mut out = vec![A::from_f64(0.0); self.slots.len() * width];
        out.par_chunks_mut(width)
            .with_min_len(64)
            .enumerate()
            .for_each(|(p, row)| {
                let r = self.row(order, p);
                row.copy_from_slice(&x[r * width..(r + 1) * width]);
            });
        Cow::Owned(out)
    }
}

/// The two dimensions of a matrix.
pub fn dims2(tensor: &FlexTensor) -> [usize; 2] {
    let shape = tensor.shape();
    [shape[0], shape[1]]
}

/// The three dimensions of a stack of matrices.
pub fn dims3(tensor: &FlexTensor) -> [usize; 3] {
    let shape = tensor.shape();
    [shape[0], shape[1], shape[2]]
}
