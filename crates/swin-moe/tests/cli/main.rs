//! The program as its users have it: the real binary, on real files.

mod bad_arguments;
mod bad_configs;
mod bad_data;
mod bad_files;
mod bad_finetune;
mod bad_input;
mod bad_weights;
mod checkpoints;
mod commands;
mod files;
mod finetune;
mod fleets;
mod harness;
mod inspect;
#[cfg(unix)]
mod kills;
mod loader;
mod ranks;
mod recipe;
mod runs;
