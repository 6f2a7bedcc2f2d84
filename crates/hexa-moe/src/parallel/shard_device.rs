//! [`ExpertShards`]' parts and wholes as tensors, for engines that move tensors on devices.
//!
//! The order of elements is that of the host's functions, so that a rank that goes through the
//! host understands the others.

use burn::tensor::backend::Backend;
use burn::tensor::ops::FloatTensor;
use burn::tensor::{Tensor, TensorPrimitive};

use super::shard::ExpertShards;

/// The experts' first weights, first biases and second weights, as the layer has them.
#[derive(Debug, Clone)]
pub struct DeviceExperts<B: Backend> {
    /// `[num_experts, d_model, columns]`.
    pub w1: Tensor<B, 3>,
    /// `[num_experts, columns]`.
    pub b1: Option<Tensor<B, 2>>,
    /// `[num_experts, d_ff, d_model]`.
    pub w2: Tensor<B, 3>,
}

impl<B: Backend> DeviceExperts<B> {
    pub fn new(w1: FloatTensor<B>, b1: Option<FloatTensor<B>>, w2: FloatTensor<B>) -> Self {
        Self {
            w1: Tensor::from_primitive(TensorPrimitive::Float(w1)),
            b1: b1.map(|b1| Tensor::from_primitive(TensorPrimitive::Float(b1))),
            w2: Tensor::from_primitive(TensorPrimitive::Float(w2)),
        }
    }

    /// A rank's part for the wire.
    pub fn pack(self) -> Tensor<B, 1> {
        Tensor::cat(self.pieces().collect(), 0)
    }

    fn pieces(self) -> impl Iterator<Item = Tensor<B, 1>> {
        [
            Some(self.w1.flatten::<1>(0, 2)),
            self.b1.map(|b1| b1.flatten::<1>(0, 1)),
            Some(self.w2.flatten::<1>(0, 2)),
        ]
        .into_iter()
        .flatten()
    }

    /// The parts of all ranks in the order of ranks, from the whole.
    pub fn scatter(self, shards: &ExpertShards) -> Tensor<B, 1> {
        let ranks = (0..shards.widths.len()).filter(|&rank| shards.widths[rank] > 0);
        let pieces = ranks.flat_map(|rank| {
            let units = shards.units(rank);
            let columns = shards.columns(units.start)..shards.columns(units.end);
            DeviceExperts {
                w1: self.w1.clone().slice_dim(2, columns.clone()),
                b1: self.b1.clone().map(|b1| b1.slice_dim(1, columns)),
                w2: self.w2.clone().slice_dim(1, units),
            }
            .pieces()
        });
        Tensor::cat(pieces.collect(), 0)
    }

    /// The reverse of [`DeviceExperts::pack`] for `rank`'s part, which is not empty.
    pub fn unpack(shards: &ExpertShards, rank: usize, part: Tensor<B, 1>) -> Self {
        let (experts, d_model) = (shards.num_experts, shards.d_model);
        let width = shards.widths[rank];
        let columns = shards.columns(width);
        let w1_end = experts * d_model * columns;
        let b1_end = w1_end + if shards.has_b1 { experts * columns } else { 0 };
        let w2_end = b1_end + experts * width * d_model;
        let piece = |range| part.clone().slice_dim(0, range);
        Self {
            w1: piece(0..w1_end).reshape([experts, d_model, columns]),
            b1: (shards.has_b1).then(|| piece(w1_end..b1_end).reshape([experts, columns])),
            w2: piece(b1_end..w2_end).reshape([experts, width, d_model]),
        }
    }

    /// The whole, from all ranks' parts in the order of ranks.
    pub fn assemble(shards: &ExpertShards, parts: Tensor<B, 1>) -> Self {
        let counts = shards.counts();
        let (mut w1, mut b1, mut w2) = (Vec::new(), Vec::new(), Vec::new());
        for rank in (0..counts.len()).filter(|&rank| counts[rank] > 0) {
            let range = super::comm::part(&counts, rank);
            let part = Self::unpack(shards, rank, parts.clone().slice_dim(0, range));
            w1.push(part.w1);
            b1.extend(part.b1);
            w2.push(part.w2);
        }
        Self {
            w1: Tensor::cat(w1, 2),
            b1: shards.has_b1.then(|| Tensor::cat(b1, 1)),
            w2: Tensor::cat(w2, 1),
        }
    }
}
