//! Tests of the layer, on the back-end that `HEXA_TEST_BACKEND` names.

mod balance;
mod config;
mod graph;
mod host;
mod layer;
mod load;
mod module;
mod router;
mod support;
mod training;
mod upcycle;
