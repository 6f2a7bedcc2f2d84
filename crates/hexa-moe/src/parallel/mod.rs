//! The layer on several devices, equal or not.
//!
//! Every rank holds a slice of every expert's hidden width ([`ExpertShards`]) and its share of the
//! batch. A layer moves weights or tokens ([`Mode`]); outputs, losses and gradients are those of
//! one device with the whole batch.
//!
//! ```text
//! context = ParallelContext::new(communicator)      one per rank
//! moe     = parallelize(moe, …)                     each layer: keeps this rank's slices
//! loss    = local mean · n_local / n_global + aux   [`BatchShare::weigh`]
//! grads   = loss.backward()
//! exchange_gradients(…)                             sums those of replicated parameters
//! ```
//!
//! The layers' auxiliary losses are of the global batch and equal on all ranks; each rank's
//! backward pass yields the share of its own tokens, so that *sums* over ranks are gradients of
//! the one loss.

mod cache;
pub mod comm;
mod context;
mod data_centric;
mod executor;
mod finish;
pub mod fleet;
mod gradients;
mod host;
mod layer;
mod model_centric;
mod plan;
mod rebalance;
mod setup;
mod shard;
mod shard_device;
mod split;
mod transfer;
mod waste;

pub use cache::GatherCache;
pub use comm::Communicator;
pub use context::{ExpertParallel, Mode, ParallelContext};
pub use finish::BackwardEnd;
pub use gradients::{BatchShare, exchange_gradients, global_squared_norm};
pub(crate) use layer::{forward, prefetch};
pub use plan::{LayerPlan, ParallelPlan};
pub use rebalance::{RebalanceOptions, Rebalancer};
pub use setup::{broadcast_parameters, gather_experts, parallelize};
pub use shard::{ExpertShards, HostExperts};
pub use split::split_proportional;
