//! The program as its users have it: the real binary, on real files.

mod bad_arguments;
mod bad_configs;
mod bad_data;
mod bad_files;
mod bad_input;
mod bad_weights;
mod commands;
mod files;
mod harness;
mod loader;
mod ranks;
mod recipe;
mod runs;
