//! What ranks add up: gradients, losses, tallies.

use burn::tensor::backend::Backend;
use burn::tensor::{Tensor, TensorData};
use hexa_moe::MoeError;
use hexa_moe::parallel::comm::{Collective, Payload};
use hexa_ops::TrainingBackend;

use super::{Member, Ranks};
use crate::train::classes::Confusion;
use crate::train::device::read;
use crate::train::error::Result;
use crate::train::optimizer::{AdamW, FlatGradients};
use crate::train::tally::Tally;

/// Gradients of all ranks together.
pub(in crate::train) struct Reduced<B: Backend> {
    pub gradients: FlatGradients<B>,
    /// Before clipping: `[1]`.
    pub norm: Tensor<B, 1>,
}

impl Ranks {
    /// The sums of all ranks' gradients, and their norm, `[1]`.
    pub(in crate::train) fn reduce<B: TrainingBackend>(
        &self,
        optimizer: &AdamW<B>,
        gradients: FlatGradients<B::InnerBackend>,
    ) -> Result<Reduced<B::InnerBackend>> {
        let Some(member) = &self.0 else {
            let norm = gradients.norm();
            return Ok(Reduced { gradients, norm });
        };
        // What a backward pass could not report, and the end of the gathered weights.
        member.context.cache().clear();
        member.context.check()?;
        let (sums, norm) = member.sum_gradients(gradients.0, optimizer.sliced_buckets())?;
        Ok(Reduced {
            gradients: FlatGradients(sums),
            norm,
        })
    }

    /// Sums of values over ranks, in the order of ranks.
    pub(in crate::train) fn sum(&self, what: &str, values: Vec<f32>) -> Result<Vec<f32>> {
        match &self.0 {
            None => Ok(values),
            Some(member) => {
                let sums = member.context.comm().all_reduce(what, values);
                Ok(sums.map_err(MoeError::from)?)
            }
        }
    }

    /// The tally of all ranks' images.
    pub(in crate::train) fn sum_tally(&self, own: Tally) -> Result<Tally> {
        let Some(member) = &self.0 else {
            return Ok(own);
        };
        let words = [own.images, own.top1, own.top5, own.loss.to_bits()];
        let halves = words
            .iter()
            .flat_map(|&word| [(word >> 32) as u32, word as u32])
            .collect();
        let all = member.context.comm().all_gather_u32("tally", halves);
        let mut sum = Tally::default();
        for rank in all.map_err(MoeError::from)?.chunks_exact(2 * words.len()) {
            let word = |i: usize| u64::from(rank[2 * i]) << 32 | u64::from(rank[2 * i + 1]);
            sum.images += word(0);
            sum.top1 += word(1);
            sum.top5 += word(2);
            sum.loss += f64::from_bits(word(3));
        }
        Ok(sum)
    }

    /// The confusions of all ranks' images.
    pub(in crate::train) fn sum_confusion(&self, own: Confusion) -> Result<Confusion> {
        let Some(member) = &self.0 else {
            return Ok(own);
        };
        let comm = member.context.comm();
        let words = own.to_words();
        let lengths = comm
            .all_gather_u32("length of the confusion", vec![words.len() as u32])
            .map_err(MoeError::from)?;
        let gather = Collective::AllGatherV {
            data: Payload::U32(words),
            counts: lengths.into_iter().map(|length| length as usize).collect(),
        };
        let all = comm.start("confusion", gather).wait();
        Ok(Confusion::of_words(
            &all.map_err(MoeError::from)?.into_u32(),
        ))
    }
}

impl Member {
    /// Sums those buckets over ranks that all ranks have, and gives the norm of everything.
    fn sum_gradients<B: Backend>(
        &self,
        grads: Vec<Tensor<B, 1>>,
        sliced: &[bool],
    ) -> Result<(Vec<Tensor<B, 1>>, Tensor<B, 1>)> {
        let comm = self.context.comm();
        let Some(device) = grads.first().map(|grad| grad.device()) else {
            return Ok((grads, Tensor::zeros([1], &B::Device::default())));
        };
        // All are under way before the first is waited for.
        let mut started = Vec::with_capacity(grads.len());
        let mut own_squares = 0.0f64;
        // Ranks agree on these alone: whether slices share a bucket depends on their size.
        let mut common = 0;
        for (grad, &sliced) in grads.into_iter().zip(sliced) {
            let data = read(grad.clone(), "gradients")?.values;
            started.push(if sliced {
                own_squares += squares(&data);
                Err(grad)
            } else {
                let name = format!("gradients, bucket {common}");
                common += 1;
                Ok(comm.start(&name, Collective::AllReduce { data }))
            });
        }
        let mut common_squares = 0.0;
        let mut sums = Vec::with_capacity(started.len());
        for bucket in started {
            sums.push(match bucket {
                Err(complete) => complete,
                Ok(pending) => {
                    let data = pending.wait().map_err(MoeError::from)?.into_f32();
                    common_squares += squares(&data);
                    let length = data.len();
                    Tensor::from_data(TensorData::new(data, [length]), &device)
                }
            });
        }
        let bits = own_squares.to_bits();
        let halves = vec![(bits >> 32) as u32, bits as u32];
        let all = comm.all_gather_u32("squared norm", halves);
        let of_slices: f64 = all
            .map_err(MoeError::from)?
            .chunks_exact(2)
            .map(|half| f64::from_bits(u64::from(half[0]) << 32 | u64::from(half[1])))
            .sum();
        let norm = (common_squares + of_slices).sqrt() as f32;
        Ok((sums, Tensor::full([1], norm, &device)))
    }
}

fn squares(values: &[f32]) -> f64 {
    values.iter().map(|&value| f64::from(value).powi(2)).sum()
}
