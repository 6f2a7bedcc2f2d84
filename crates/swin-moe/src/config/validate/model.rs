//! `[model]`.

use super::super::error::ConfigError;
use super::super::raw::RawModel;
use super::super::types::ModelConfig;
use super::{Result, non_zero, one_per_stage, positive, probability, within};

/// Stages beyond this would shrink any allowed image to nothing.
const MAX_STAGES: usize = 8;

impl RawModel {
    pub(super) fn validate(&self) -> Result<ModelConfig> {
        let sizes = "the published models have 192 pixels, patches of 4 and windows of 12";
        within("model.image_size", self.image_size, 1..=4096, sizes)?;
        within("model.patch_size", self.patch_size, 1..=4096, sizes)?;
        within("model.window_size", self.window_size, 1..=256, sizes)?;
        if self.in_chans != 1 && self.in_chans != 3 {
            return Err(ConfigError::value(
                "model.in_chans",
                self.in_chans,
                "1 or 3",
                "images are read as grey (1) or RGB (3)",
            ));
        }
        let classes = "give the number of classes, or 0 to take it from the data";
        within("model.num_classes", self.num_classes, 0..=1 << 20, classes)?;
        let width = "the published models have 96 and 128";
        within("model.embed_dim", self.embed_dim, 1..=8192, width)?;
        positive(
            "model.mlp_ratio",
            self.mlp_ratio,
            64.0,
            "the published models have 4.0",
        )?;
        let drop = "give the probability that the last block is skipped, such as 0.2";
        probability("model.drop_path_rate", self.drop_path_rate, drop)?;
        if !self.image_size.is_multiple_of(self.patch_size) {
            return Err(ConfigError::value(
                "model.image_size",
                self.image_size,
                format!("a multiple of model.patch_size ({})", self.patch_size),
                "change the one or the other",
            ));
        }
        let pretrained = self.check_stages()?;
        Ok(ModelConfig {
            image_size: self.image_size,
            patch_size: self.patch_size,
            in_chans: self.in_chans,
            num_classes: non_zero(self.num_classes),
            embed_dim: self.embed_dim,
            depths: self.depths.clone(),
            num_heads: self.num_heads.clone(),
            window_size: self.window_size,
            mlp_ratio: self.mlp_ratio,
            patch_norm: self.patch_norm,
            drop_path_rate: self.drop_path_rate,
            pretrained_window_sizes: pretrained,
        })
    }

    /// Checks the lists; returns the pretrained windows, one for each stage.
    fn check_stages(&self) -> Result<Vec<usize>> {
        let stages = self.depths.len();
        if !(1..=MAX_STAGES).contains(&stages) {
            return Err(ConfigError::value(
                "model.depths",
                format!("{stages} entries long"),
                format!("1..={MAX_STAGES}"),
                "list the number of blocks of each stage",
            ));
        }
        one_per_stage("model.num_heads", self.num_heads.len(), stages)?;
        let key = "model.pretrained_window_sizes";
        let pretrained = match self.pretrained_window_sizes.as_slice() {
            [] => vec![0; stages],
            sizes => sizes.to_vec(),
        };
        one_per_stage(key, pretrained.len(), stages)?;
        for (stage, &window) in pretrained.iter().enumerate() {
            let key = format!("{key}[{stage}]");
            within(&key, window, 0..=256, "0 is the stage's own window")?;
            if window == 1 {
                return Err(ConfigError::value(
                    &key,
                    window,
                    "0 (the stage's own window), or 2 and more",
                    "distances are divided by this size less one",
                ));
            }
        }
        (0..stages).try_for_each(|stage| self.check_stage(stage))?;
        Ok(pretrained)
    }

    fn check_stage(&self, stage: usize) -> Result<()> {
        let depth_key = format!("model.depths[{stage}]");
        within(
            &depth_key,
            self.depths[stage],
            1..=256,
            "a stage has blocks",
        )?;
        let heads_key = format!("model.num_heads[{stage}]");
        let heads = self.num_heads[stage];
        let dim = self.embed_dim << stage;
        within(&heads_key, heads, 1..=dim, "heads share the channels")?;
        if !dim.is_multiple_of(heads) {
            return Err(ConfigError::value(
                &heads_key,
                heads,
                format!("a divisor of the stage's {dim} channels (model.embed_dim · 2^{stage})"),
                "change model.num_heads or model.embed_dim",
            ));
        }
        if ((dim as f64 * self.mlp_ratio) as usize) == 0 {
            return Err(ConfigError::value(
                "model.mlp_ratio",
                self.mlp_ratio,
                format!("at least 1/{dim}"),
                "an MLP needs a hidden column",
            ));
        }
        self.check_grid(stage)
    }

    /// Each stage but the last halves the grid of tokens, and windows tile it.
    fn check_grid(&self, stage: usize) -> Result<()> {
        let patches = self.image_size / self.patch_size;
        let last = self.depths.len() - 1;
        if !patches.is_multiple_of(1 << last) {
            return Err(ConfigError::value(
                "model.image_size",
                self.image_size,
                format!(
                    "a multiple of {} (model.patch_size · 2^{last})",
                    self.patch_size << last
                ),
                "each of the stages but the last halves the grid of tokens",
            ));
        }
        let grid = patches >> stage;
        if grid > self.window_size && !grid.is_multiple_of(self.window_size) {
            return Err(ConfigError::value(
                "model.window_size",
                self.window_size,
                format!("a divisor of stage {stage}'s {grid} tokens a side, or at least {grid}"),
                "change model.window_size or model.image_size",
            ));
        }
        Ok(())
    }
}
