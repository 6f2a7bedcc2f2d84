//! What a model takes before anything is allocated: the peak of a training step, and whether it fits
//! into this machine. A process that runs out of memory is ended without a word.

mod layout;
mod parts;
mod predict;
pub mod resident;

pub use layout::Rows;
pub use predict::{Moment, PeakMemory, StepShape, TrainingMemory, activations_per_image};

use crate::info::ModelInfo;
use crate::model::{ModelError, SwinMoeConfig};

/// What of a model is held at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Held {
    /// Its parameters.
    Parameters,
    /// Its parameters, their gradients and the optimizer's two moments.
    TrainingState,
}

/// Refuses a model of which the part that is certain to be held does not fit into the machine.
///
/// Of the activations of `images` images, the largest tensor alone is counted. Where the machine
/// does not tell how much memory it has, nothing is refused.
///
/// # Errors
/// [`ModelError::Config`] if it does not fit, or the configuration is not valid.
pub fn check_fits(config: &SwinMoeConfig, held: Held, images: usize) -> Result<(), ModelError> {
    let memory = ModelInfo::new(config, 1)?.memory();
    let (needed, what) = match held {
        Held::Parameters => (memory.params_bytes, "parameters and largest tensor"),
        Held::TrainingState => (
            memory.params_bytes + memory.gradients_bytes + memory.optimizer_bytes,
            "parameters, gradients, moments and largest tensor",
        ),
    };
    let largest = largest_tensor_bytes(config)?.saturating_mul(images as u64);
    let needed = needed.saturating_add(largest);
    check(needed, what, config.embed_dim, machine_bytes())
}

/// The largest tensor that one image becomes: attention of a block, or the hidden values of an MLP.
fn largest_tensor_bytes(config: &SwinMoeConfig) -> Result<u64, ModelError> {
    let moe = &config.moe;
    let geometry = config.geometry()?;
    let blocks = geometry.stages.iter().flat_map(|stage| &stage.blocks);
    let values = blocks.map(|block| {
        let tokens = block.layout.grid * block.layout.grid;
        let hidden = if block.is_moe {
            let routed = moe.top_k * moe.activation.hidden_width(block.hidden);
            routed.max(moe.activation.hidden_width(moe.shared_d_ff))
        } else {
            block.hidden
        };
        tokens * hidden.max(block.num_heads * block.layout.window_tokens())
    });
    Ok(4 * values.max().unwrap_or(0) as u64)
}

fn check(
    needed: u64,
    what: &str,
    embed_dim: usize,
    machine: Option<u64>,
) -> Result<(), ModelError> {
    match machine {
        Some(machine) if needed > machine => Err(ModelError::Config {
            key: "embed_dim".into(),
            got: format!(
                "{embed_dim} and the model's {what} take {}",
                gibibytes(needed)
            ),
            allowed: format!("at most this machine's memory of {}", gibibytes(machine)),
            remedy: "lower the model's widths and depths, the image size or the batch size".into(),
        }),
        _ => Ok(()),
    }
}

fn gibibytes(bytes: u64) -> String {
    format!("{:.1} GiB", bytes as f64 / (1u64 << 30) as f64)
}

/// The memory of this machine, or of the control group if that is less.
pub(crate) fn machine_bytes() -> Option<u64> {
    let meminfo = std::fs::read_to_string("/proc/meminfo").ok()?;
    let total = total_of_meminfo(&meminfo)?;
    let group = std::fs::read_to_string("/sys/fs/cgroup/memory.max").ok();
    let group = group.and_then(|text| text.trim().parse::<u64>().ok());
    Some(group.map_or(total, |group| group.min(total)))
}

fn total_of_meminfo(text: &str) -> Option<u64> {
    resident::bytes_of(text, "MemTotal:")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_larger_than_the_machine_is_refused() {
        assert!(check(9 << 30, "parameters", 96, Some(9 << 30)).is_ok());
        assert!(check(u64::MAX, "parameters", 96, None).is_ok());
        let error = check((9 << 30) + 1, "parameters", 96, Some(9 << 30)).unwrap_err();
        assert!(error.to_string().contains("9.0 GiB"), "{error}");
    }

    #[test]
    fn reads_what_linux_says() {
        let text = "MemTotal:       24646232 kB\nMemFree:         1234 kB\n";
        assert_eq!(total_of_meminfo(text), Some(24_646_232 * 1024));
        assert_eq!(total_of_meminfo("MemFree: 1 kB"), None);
    }
}
