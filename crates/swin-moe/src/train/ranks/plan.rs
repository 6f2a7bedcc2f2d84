//! The plan that settings ask for. Another one can be given with a request.

use hexa_moe::parallel::{LayerPlan, Mode, ParallelPlan, split_proportional};

use crate::config::{self, ParallelConfig};
use crate::train::error::{Result, TrainError};

/// The plan of a job of `world_size` ranks; `d_ff` has the layers' hidden widths.
///
/// # Errors
/// [`TrainError::Request`] if there is not one weight for each rank.
pub(super) fn from_settings(
    settings: &ParallelConfig,
    world_size: usize,
    d_ff: &[usize],
    batch_size: usize,
) -> Result<ParallelPlan> {
    let equal = vec![1.0; world_size];
    let weights = settings.split.clone().unwrap_or_else(|| equal.clone());
    if weights.len() != world_size {
        return Err(TrainError::Request(format!(
            "parallel.split has {} weights, the job has {world_size} ranks; give one weight for \
             each rank",
            weights.len()
        )));
    }
    let mode = match settings.mode {
        config::Mode::Data => Mode::DataCentric,
        config::Mode::Model => Mode::ModelCentric,
        config::Mode::Auto => {
            return Err(TrainError::Request(
                "the mode auto chooses by what training steps take, which is not known here; \
                 choose --mode data or model"
                    .to_owned(),
            ));
        }
    };
    let layers = d_ff
        .iter()
        .map(|&d_ff| {
            let multiple = width_multiple(d_ff, world_size);
            let widths = split_proportional(d_ff, &weights, multiple)?;
            Ok(LayerPlan { mode, widths })
        })
        .collect::<Result<_>>()?;
    // In the model-centric mode every rank computes everybody's tokens: only the dense part of the
    // model depends on the share.
    let images = match mode {
        Mode::DataCentric => &weights,
        Mode::ModelCentric => &equal,
    };
    Ok(ParallelPlan {
        layers,
        batch: split_proportional(batch_size, images, 1)?,
    })
}

/// Widths that kernels like, as far as eight of them for each rank leave a split its proportions.
pub(super) fn width_multiple(d_ff: usize, world_size: usize) -> usize {
    [64, 16, 8]
        .into_iter()
        .find(|multiple| d_ff >= multiple * 8 * world_size)
        .unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    fn settings(text: &str) -> ParallelConfig {
        Config::from_toml::<&str>(text, "a test", &[])
            .unwrap()
            .parallel
    }

    #[test]
    fn shares_follow_the_split_and_the_mode() {
        let data = settings("[parallel]\nranks = 3\nsplit = [5, 2, 1]\n");
        let plan = from_settings(&data, 3, &[32, 1536], 64).unwrap();
        assert_eq!(plan.layers[0].widths, [20, 8, 4]);
        assert_eq!(plan.layers[1].widths, [960, 384, 192]);
        assert_eq!(plan.batch, [40, 16, 8]);
        plan.validate(3, &[32, 1536], 64).unwrap();

        let tokens = "[parallel]\nranks = 2\nmode = \"model\"\nsplit = [1, 0]\n";
        let tokens = settings(tokens);
        let plan = from_settings(&tokens, 2, &[33], 5).unwrap();
        assert_eq!(plan.layers[0].widths, [33, 0]);
        assert_eq!(plan.batch, [3, 2]);
        assert!(from_settings(&tokens, 3, &[33], 5).is_err());
    }
}
