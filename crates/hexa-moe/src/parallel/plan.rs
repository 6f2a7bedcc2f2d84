//! Who computes what: the outcome of planning, and what a distributed model is built from.

use serde::{Deserialize, Serialize};

use super::context::Mode;
use super::split::split_proportional;
use crate::error::{MoeError, Result};

/// How one Mixture-of-Experts layer is distributed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerPlan {
    /// What the layer moves.
    pub mode: Mode,
    /// Hidden units of each rank's slice; they sum to the layer's `d_ff`.
    pub widths: Vec<usize>,
}

/// How a model and its batches are distributed; the same on all ranks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ParallelPlan {
    /// The Mixture-of-Experts layers, first to last.
    pub layers: Vec<LayerPlan>,
    /// Samples of each rank in a whole batch; they sum to the batch.
    pub batch: Vec<usize>,
}

impl ParallelPlan {
    /// One mode for all layers, batches and slices in proportion to `shares`: samples one by one,
    /// hidden units in multiples of `multiple`.
    ///
    /// # Errors
    /// [`MoeError::Split`] unless the shares can be split by ([`split_proportional`]).
    ///
    /// ```
    /// # use hexa_moe::parallel::{Mode, ParallelPlan};
    /// let plan = ParallelPlan::in_proportion(Mode::DataCentric, &[384, 768], 32, &[3.0, 1.0], 16)?;
    /// assert_eq!(plan.batch, [24, 8]);
    /// assert_eq!(plan.layers[0].widths, [288, 96]);
    /// # Ok::<(), hexa_moe::MoeError>(())
    /// ```
    pub fn in_proportion(
        mode: Mode,
        d_ff: &[usize],
        batch: usize,
        shares: &[f64],
        multiple: usize,
    ) -> Result<Self> {
        let layers = d_ff.iter().map(|&d_ff| {
            let widths = split_proportional(d_ff, shares, multiple)?;
            Ok(LayerPlan { mode, widths })
        });
        Ok(Self {
            layers: layers.collect::<Result<_>>()?,
            batch: split_proportional(batch, shares, 1)?,
        })
    }

    /// Number of ranks.
    pub fn world_size(&self) -> usize {
        self.batch.len()
    }

    /// Checks the plan against a job: its ranks, its layers' `d_ff` and its batch.
    ///
    /// # Errors
    /// [`MoeError::Split`] says what does not fit.
    pub fn validate(&self, world_size: usize, d_ff: &[usize], batch: usize) -> Result<()> {
        let refuse = |got, allowed| Err(MoeError::Split { got, allowed });
        // Shares may come from a file, with any numbers in it.
        let sum = |shares: &[usize]| {
            let mut shares = shares.iter();
            shares.try_fold(0usize, |sum, &share| sum.checked_add(share))
        };
        if self.batch.len() != world_size || sum(&self.batch) != Some(batch) {
            let got = format!("{:?} for a batch of {batch}", self.batch);
            return refuse(
                got,
                "one share of the batch per rank, whose sum is the batch",
            );
        }
        if self.layers.len() != d_ff.len() {
            let got = format!("{} layers for a model of {}", self.layers.len(), d_ff.len());
            return refuse(got, "one entry per Mixture-of-Experts layer");
        }
        for (layer, &d_ff) in self.layers.iter().zip(d_ff) {
            if layer.widths.len() != world_size || sum(&layer.widths) != Some(d_ff) {
                let got = format!("slices {:?} for d_ff {d_ff}", layer.widths);
                return refuse(got, "one slice per rank, whose sum is d_ff");
            }
        }
        Ok(())
    }
}
