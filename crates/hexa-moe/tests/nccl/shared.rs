//! One communicator for several cases, one after the other: joining a job takes long, and a process
//! can join an MPI job once only.

use std::sync::Arc;

use hexa_moe::parallel::Communicator;
use hexa_moe::parallel::comm::{Collective, CommError, DeviceTensor, Pending};

#[derive(Debug)]
pub struct Shared<C>(pub Arc<C>);

impl<C> Clone for Shared<C> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<C: Communicator> Communicator for Shared<C> {
    fn rank(&self) -> usize {
        self.0.rank()
    }
    fn world_size(&self) -> usize {
        self.0.world_size()
    }
    fn start(&self, tensor: &str, collective: Collective) -> Pending {
        self.0.start(tensor, collective)
    }
    fn leave(&self) {}
    fn failure(&self) -> Option<CommError> {
        self.0.failure()
    }
    fn takes(&self, tensor: &DeviceTensor) -> bool {
        self.0.takes(tensor)
    }
}

/// Those cases in which every rank has tokens and a slice: Burn's own operations fail on CUDA for
/// tensors without elements.
#[cfg(feature = "nccl")]
pub fn cases_without_empty_ranks(ranks: usize) -> Vec<crate::equivalence::Case> {
    let mut cases = crate::equivalence::cases(ranks);
    cases.retain(|case| !case.tokens.contains(&0) && !case.split.contains(&0.0));
    cases
}
