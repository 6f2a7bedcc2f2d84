//! Float tensors between ranks: from device to device where the engine moves them, else through
//! the host. Ranks may differ in that.

use burn::tensor::backend::Backend;
use burn::tensor::ops::FloatTensor;
use burn::tensor::{DType, Shape, Tensor, TensorMetadata, TensorPrimitive};

use super::comm::{Collective, Communicator, DeviceCollective, DeviceTensor, Payload, Pending};
use super::host;
use crate::error::Result;

/// All elements, row-major, in one dimension.
pub fn flat<B: Backend>(tensor: FloatTensor<B>) -> Tensor<B, 1> {
    let len = tensor.shape().num_elements();
    let flat = B::float_reshape(tensor, Shape::new([len]));
    Tensor::from_primitive(TensorPrimitive::Float(flat))
}

/// The tensor for the engine, if it moves it without the host. Half precision travels as f32 does
/// between hosts, and what has no elements does not travel.
pub fn on_device<B: Backend>(
    comm: &dyn Communicator,
    tensor: &FloatTensor<B>,
) -> Option<DeviceTensor> {
    if tensor.shape().num_elements() == 0 || tensor.dtype() != DType::F32 {
        return None;
    }
    let whole = DeviceTensor::new::<B>(tensor.clone());
    // Only engines that take it make the device do something.
    comm.takes(&whole)
        .then(|| wrap::<B>(flat::<B>(tensor.clone())))
}

/// A tensor of one dimension for the engine.
pub fn wrap<B: Backend>(tensor: Tensor<B, 1>) -> DeviceTensor {
    DeviceTensor::new::<B>(tensor.into_primitive().tensor())
}

/// Starts [`Collective::AllGatherV`].
pub fn all_gather<B: Backend>(
    comm: &dyn Communicator,
    name: &str,
    part: FloatTensor<B>,
    label: &'static str,
    counts: Vec<usize>,
) -> Result<Pending> {
    let collective = match on_device::<B>(comm, &part) {
        Some(part) => {
            let part = Some(part);
            Collective::OnDevice(DeviceCollective::AllGatherV { part, counts })
        }
        None => {
            let data = Payload::F32(host::read::<B>(part, label)?);
            Collective::AllGatherV { data, counts }
        }
    };
    Ok(comm.start(name, collective))
}

/// Starts [`Collective::ReduceScatterV`]; `None` for zeros.
pub fn reduce_scatter<B: Backend>(
    comm: &dyn Communicator,
    name: &str,
    addend: Option<FloatTensor<B>>,
    label: &'static str,
    counts: Vec<usize>,
) -> Result<Pending> {
    let collective = match addend.as_ref().and_then(|a| on_device::<B>(comm, a)) {
        Some(addend) => {
            let addend = Some(addend);
            Collective::OnDevice(DeviceCollective::ReduceScatterV { addend, counts })
        }
        None => {
            let data = addend.map(|a| host::read::<B>(a, label)).transpose()?;
            Collective::ReduceScatterV { data, counts }
        }
    };
    Ok(comm.start(name, collective))
}

/// The result of a collective as a tensor, rounded to `dtype`.
pub fn finish<B: Backend>(
    pending: Pending,
    shape: impl Into<Shape>,
    dtype: DType,
    device: &B::Device,
) -> Result<FloatTensor<B>> {
    let shape = shape.into();
    let payload = pending.wait()?;
    if let Payload::Device(tensor) = &payload
        && let Some(tensor) = tensor.get::<B>()
    {
        let tensor = B::float_reshape(tensor, shape);
        return Ok(if dtype == DType::F32 {
            tensor
        } else {
            B::float_cast(tensor, dtype.into())
        });
    }
    Ok(host::write::<B>(payload.into_f32(), shape, dtype, device))
}
