//! Tests of the parallel layer with ranks as threads.

mod cache;
mod device;
mod equivalence;
mod failures;
mod finish;
mod fleet;
mod local;
mod metered;
mod rebalance;
mod split;
#[allow(dead_code, reason = "shared with the tests of the layer on one device")]
#[path = "../moe/support.rs"]
mod support;
