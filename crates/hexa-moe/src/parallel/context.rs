//! What all layers of one rank share.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use burn::module::ParamId;
use serde::{Deserialize, Serialize};

use super::cache::GatherCache;
use super::comm::Communicator;
use super::shard::ExpertShards;
use crate::error::{MoeError, Result};

/// What a layer moves between ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// Weights: all ranks gather the layer's experts and compute their own tokens.
    #[default]
    DataCentric,
    /// Tokens: all ranks compute everybody's tokens with their own slice of the experts.
    ModelCentric,
}

/// One rank's place in a parallel job: its communicator and the cache of gathered weights.
///
/// Clones are the same place; keep one as long as the rank trains. When the last one goes, by a
/// panic for example, the other ranks learn that this rank is gone. (The layers' own references do
/// not count: Burn's graph keeps them beyond the life of a rank.)
///
/// Each rank builds its model in its own thread or process: clones of
/// one model on two threads share nodes of Burn's graph, whose lock the backward pass holds while
/// it waits for the other rank.
#[derive(Debug, Clone)]
pub struct ParallelContext {
    inner: Arc<Inner>,
    _presence: Option<Arc<Presence>>,
}

/// Ends the rank when its owner is done with it, or unwinds.
#[derive(Debug)]
struct Presence(Arc<Inner>);

impl Drop for Presence {
    fn drop(&mut self) {
        // What is recorded refers to this very place.
        self.0.cache.clear();
        self.0.comm.leave();
    }
}

#[derive(Debug)]
struct Inner {
    comm: Box<dyn Communicator>,
    cache: GatherCache,
    sharded: Mutex<HashSet<ParamId>>,
    failure: Mutex<Option<MoeError>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl ParallelContext {
    /// A place with the pipeline-shared cache.
    pub fn new(comm: impl Communicator + 'static) -> Self {
        Self::with_cache(comm, true)
    }

    /// A place whose layers share one buffer for gathered weights, or, for comparison, keep their
    /// own from the forward to the backward pass.
    pub fn with_cache(comm: impl Communicator + 'static, shared: bool) -> Self {
        let inner = Arc::new(Inner {
            comm: Box::new(comm),
            cache: GatherCache::new(shared),
            sharded: Mutex::default(),
            failure: Mutex::default(),
        });
        Self {
            _presence: Some(Arc::new(Presence(inner.clone()))),
            inner,
        }
    }

    /// The same place, without a say in how long the rank is there.
    pub(super) fn reference(&self) -> Self {
        Self {
            inner: self.inner.clone(),
            _presence: None,
        }
    }

    /// The communicator.
    pub fn comm(&self) -> &dyn Communicator {
        self.inner.comm.as_ref()
    }

    /// This rank.
    pub fn rank(&self) -> usize {
        self.comm().rank()
    }

    /// Number of ranks.
    pub fn world_size(&self) -> usize {
        self.comm().world_size()
    }

    /// The cache of gathered weights.
    pub fn cache(&self) -> &GatherCache {
        &self.inner.cache
    }

    /// Whether an earlier pass failed. A backward pass cannot return an error: it completes with
    /// zeros, and the next forward pass, gradient exchange or call of this returns why.
    ///
    /// # Errors
    /// The first failure.
    pub fn check(&self) -> Result<()> {
        if let Some(error) = lock(&self.inner.failure).clone() {
            return Err(error);
        }
        self.comm().failure().map_or(Ok(()), |e| Err(e.into()))
    }

    pub(super) fn remember(&self, error: MoeError) {
        lock(&self.inner.failure).get_or_insert(error);
    }

    /// Notes that these parameters are slices, whose gradients are complete.
    pub(super) fn note_sharded(&self, ids: impl IntoIterator<Item = ParamId>) {
        lock(&self.inner.sharded).extend(ids);
    }

    /// The reverse of [`ParallelContext::note_sharded`].
    pub(super) fn note_replicated(&self, ids: impl IntoIterator<Item = ParamId>) {
        let mut sharded = lock(&self.inner.sharded);
        for id in ids {
            sharded.remove(&id);
        }
    }

    pub(super) fn is_sharded(&self, id: ParamId) -> bool {
        lock(&self.inner.sharded).contains(&id)
    }
}

/// How one layer is distributed: the setting that makes a [`Moe`](crate::Moe) parallel.
#[derive(Debug, Clone)]
pub struct ExpertParallel {
    /// The rank's place.
    pub context: ParallelContext,
    /// What moves.
    pub mode: Mode,
    /// Who owns which part of the experts.
    pub shards: ExpertShards,
    /// Number of the layer, the same on all ranks.
    pub layer: usize,
}

impl ExpertParallel {
    /// A tensor of this layer, as the communicator shows it.
    pub(super) fn name(&self, tensor: &str) -> String {
        format!("layer {}: {tensor}", self.layer)
    }
}
