//! Who does what: the one thing that decides how a run is spread over its ranks.

use hexa_moe::parallel::{Mode, split_proportional};

use crate::config::{self, ParallelConfig};
use crate::train::error::{Result, TrainError};

/// How a run is spread over its ranks. All ranks have the same one.
#[derive(Debug, Clone, PartialEq)]
pub struct ParallelPlan {
    /// The Mixture-of-Experts layers, first to last.
    pub layers: Vec<LayerPlan>,
    /// Weight of each rank's share of a batch.
    pub batch_weights: Vec<f64>,
}

/// How one Mixture-of-Experts layer is spread over the ranks.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerPlan {
    /// What moves.
    pub mode: Mode,
    /// Hidden units of each rank; their sum is the layer's `d_ff`.
    pub widths: Vec<usize>,
}

impl ParallelPlan {
    /// The plan that the settings ask for; `d_ff` has the layers' hidden widths.
    ///
    /// # Errors
    /// [`TrainError::Request`] if there is not one weight for each of `world_size` ranks.
    pub fn from_settings(
        settings: &ParallelConfig,
        world_size: usize,
        d_ff: &[usize],
    ) -> Result<Self> {
        let equal = vec![1.0; world_size];
        let weights = settings.split.clone().unwrap_or_else(|| equal.clone());
        if weights.len() != world_size {
            return Err(TrainError::Request(format!(
                "parallel.split has {} weights, the job has {world_size} ranks; give one weight \
                 for each rank",
                weights.len()
            )));
        }
        let mode = match settings.mode {
            config::Mode::Data => Mode::DataCentric,
            config::Mode::Model => Mode::ModelCentric,
        };
        let layers = d_ff
            .iter()
            .map(|&d_ff| {
                let multiple = width_multiple(d_ff, world_size);
                let widths = split_proportional(d_ff, &weights, multiple)?;
                Ok(LayerPlan { mode, widths })
            })
            .collect::<Result<_>>()?;
        Ok(ParallelPlan {
            layers,
            batch_weights: match mode {
                Mode::DataCentric => weights,
                Mode::ModelCentric => equal,
            },
        })
    }

    /// Checks that the plan is one for this job and model.
    ///
    /// # Errors
    /// [`TrainError::Request`] with what does not fit.
    pub fn check(&self, world_size: usize, d_ff: &[usize]) -> Result<()> {
        let fits = self.batch_weights.len() == world_size
            && self.layers.len() == d_ff.len()
            && self.layers.iter().zip(d_ff).all(|(layer, &d_ff)| {
                layer.widths.len() == world_size && layer.widths.iter().sum::<usize>() == d_ff
            });
        if fits {
            return Ok(());
        }
        Err(TrainError::Request(format!(
            "the plan is for {} ranks and the hidden widths {:?}, the job has {world_size} ranks \
             and the model {d_ff:?}; make a plan for this model and number of ranks",
            self.batch_weights.len(),
            self.layers
                .iter()
                .map(|layer| layer.widths.iter().sum::<usize>())
                .collect::<Vec<_>>(),
        )))
    }
}

/// Widths that kernels like, as far as eight of them for each rank leave a split its proportions.
fn width_multiple(d_ff: usize, world_size: usize) -> usize {
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
        let plan = ParallelPlan::from_settings(&data, 3, &[32, 1536]).unwrap();
        assert_eq!(plan.layers[0].widths, [20, 8, 4]);
        assert_eq!(plan.layers[1].widths, [960, 384, 192]);
        assert_eq!(plan.batch_weights, [5.0, 2.0, 1.0]);
        plan.check(3, &[32, 1536]).unwrap();
        assert!(plan.check(2, &[32, 1536]).is_err());
        assert!(plan.check(3, &[32, 1535]).is_err());

        let tokens = settings("[parallel]\nranks = 2\nmode = \"model\"\nsplit = [1, 0]\n");
        let plan = ParallelPlan::from_settings(&tokens, 2, &[33]).unwrap();
        assert_eq!(plan.layers[0].widths, [33, 0]);
        assert_eq!(plan.batch_weights, [1.0, 1.0]);
        assert!(ParallelPlan::from_settings(&tokens, 3, &[33]).is_err());
    }
}
