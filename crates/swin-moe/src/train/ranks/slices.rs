//! Which parameters are slices on a rank, and how slices become whole tensors and back.

use std::collections::BTreeMap;

use burn::module::{Module, ModuleVisitor, Param, ParamId};
use burn::tensor::Tensor;
use burn::tensor::backend::Backend;
use hexa_ops::ExpertOps;

use crate::model::SwinMoe;
use crate::train::params::{HostTensor, HostTensors, ModulePath};
use hexa_moe::parallel::ParallelPlan;

/// How a parameter is cut: along one dimension, one contiguous piece for each rank.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Cut {
    /// Shape of the whole.
    pub shape: Vec<usize>,
    pub axis: usize,
    pub lengths: Vec<usize>,
}

/// The parameters that ranks have slices of, by name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Cuts(BTreeMap<String, Cut>);

impl Cuts {
    /// The cuts of a whole model's experts.
    pub(super) fn of<B: ExpertOps>(model: &SwinMoe<B>, plan: &ParallelPlan) -> Self {
        let mut names = Names::default();
        model.visit(&mut names);
        let mut cuts = BTreeMap::new();
        for (moe, layer) in model.moe_layers().zip(&plan.layers) {
            let experts = &moe.experts;
            let units = || layer.widths.iter();
            let columns: Vec<usize> = units()
                .map(|&width| experts.activation.hidden_width(width))
                .collect();
            let mut cut = |id: ParamId, shape: Vec<usize>, axis, lengths: Vec<usize>| {
                if let Some(name) = names.by_id.get(&id.val()) {
                    let cut = Cut {
                        shape,
                        axis,
                        lengths,
                    };
                    cuts.insert(name.clone(), cut);
                }
            };
            let (w1, w2) = (&experts.w1, &experts.w2);
            cut(w1.id, w1.dims().to_vec(), 2, columns.clone());
            if let Some(b1) = &experts.b1 {
                cut(b1.id, b1.dims().to_vec(), 1, columns);
            }
            cut(w2.id, w2.dims().to_vec(), 1, units().copied().collect());
        }
        Cuts(cuts)
    }

    pub(super) fn contains(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    /// Names and cuts, in the order of names.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&String, &Cut)> {
        self.0.iter()
    }

    /// The cut of one of a parameter's moments: `kind.name`.
    fn of_state(&self, name: &str) -> Option<&Cut> {
        let (_, parameter) = name.split_once('.')?;
        self.0.get(parameter)
    }

    /// A rank's part of an optimizer's whole tensors; empty slices are left out.
    pub(super) fn slice_state(&self, rank: usize, whole: HostTensors) -> HostTensors {
        whole
            .into_iter()
            .filter_map(|(name, tensor)| match self.of_state(&name) {
                None => Some((name, tensor)),
                Some(cut) if cut.lengths[rank] == 0 => None,
                Some(cut) => cut.slice(rank, &tensor).map(|tensor| (name, tensor)),
            })
            .collect()
    }
}

impl Cut {
    fn start(&self, rank: usize) -> usize {
        self.lengths[..rank].iter().sum()
    }

    /// A rank's slice; `None` if the tensor is not of the cut's size.
    fn slice(&self, rank: usize, whole: &HostTensor) -> Option<HostTensor> {
        if whole.shape != self.shape {
            return None;
        }
        let inner: usize = whole.shape[self.axis + 1..].iter().product();
        let row = whole.shape[self.axis] * inner;
        let (start, length) = (self.start(rank) * inner, self.lengths[rank] * inner);
        let mut shape = whole.shape.clone();
        shape[self.axis] = self.lengths[rank];
        let values = whole
            .values
            .chunks_exact(row.max(1))
            .flat_map(|values| values[start..start + length].iter().copied())
            .collect();
        Some(HostTensor { shape, values })
    }

    /// Elements of each rank's slice.
    pub(super) fn counts(&self) -> Vec<usize> {
        let others: usize = self
            .shape
            .iter()
            .enumerate()
            .filter(|&(axis, _)| axis != self.axis)
            .map(|(_, &length)| length)
            .product();
        self.lengths.iter().map(|length| length * others).collect()
    }

    /// The whole, from all slices one after the other in the order of ranks.
    pub(super) fn join(&self, slices: &[f32]) -> HostTensor {
        let shape = self.shape.clone();
        let inner: usize = shape[self.axis + 1..].iter().product();
        let row = shape[self.axis] * inner;
        let mut values = vec![0.0; shape.iter().product()];
        let mut source = slices;
        for rank in 0..self.lengths.len() {
            let (start, length) = (self.start(rank) * inner, self.lengths[rank] * inner);
            for row in values.chunks_exact_mut(row.max(1)) {
                let (piece, rest) = source.split_at(length);
                row[start..start + length].copy_from_slice(piece);
                source = rest;
            }
        }
        HostTensor { shape, values }
    }
}

/// Names of parameters by their ids.
#[derive(Default)]
struct Names {
    path: ModulePath,
    by_id: BTreeMap<u64, String>,
}

impl<B: Backend> ModuleVisitor<B> for Names {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.enter(name);
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.exit();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        self.by_id.insert(param.id.val(), self.path.name());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_of_any_axis_make_up_the_whole() {
        let shape = [2, 6, 3];
        let whole = HostTensor {
            shape: shape.to_vec(),
            values: (0..36).map(|i| i as f32).collect(),
        };
        for (axis, lengths) in [
            (0, vec![0, 2, 0]),
            (1, vec![5, 0, 1]),
            (1, vec![1, 2, 3]),
            (2, vec![1, 1, 1]),
        ] {
            let cut = Cut {
                shape: shape.to_vec(),
                axis,
                lengths,
            };
            let slices: Vec<HostTensor> = (0..3)
                .map(|rank| cut.slice(rank, &whole).unwrap())
                .collect();
            for (slice, count) in slices.iter().zip(cut.counts()) {
                assert_eq!(slice.values.len(), count);
            }
            let joined: Vec<f32> = slices.iter().flat_map(|s| s.values.clone()).collect();
            assert_eq!(cut.join(&joined), whole);
        }
        let cut = Cut {
            shape: shape.to_vec(),
            axis: 1,
            lengths: vec![1, 2, 3],
        };
        let second = cut.slice(1, &whole).unwrap();
        assert_eq!(second.shape, [2, 2, 3]);
        assert_eq!(second.values[..6], [3.0, 4.0, 5.0, 6.0, 7.0, 8.0]);
        assert_eq!(second.values[6..], [21.0, 22.0, 23.0, 24.0, 25.0, 26.0]);
        assert!(cut.slice(0, &second).is_none());
    }
}
