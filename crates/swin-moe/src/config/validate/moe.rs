//! `[moe]`, and how large it makes the model.

use super::super::error::ConfigError;
use super::super::raw::RawMoe;
use super::super::types::{AuxLoss, ModelConfig, MoeSettings};
use super::{Result, non_zero, one_per_stage, positive, probability, within};

/// 64 GiB of f32 weights, an order of magnitude above the largest published model.
const MAX_PARAMETERS: u128 = 1 << 34;

impl RawMoe {
    pub(super) fn validate(&self, model: &ModelConfig) -> Result<MoeSettings> {
        let blocks = self.check_blocks(&model.depths)?;
        let experts = "the published models have 8, 16 or 32 experts";
        within("moe.num_experts", self.num_experts, 1..=4096, experts)?;
        if !(1..=self.num_experts).contains(&self.top_k) {
            return Err(ConfigError::value(
                "moe.top_k",
                self.top_k,
                format!("1..={} (moe.num_experts)", self.num_experts),
                "lower moe.top_k or raise moe.num_experts",
            ));
        }
        let cosine = "the published routers have 256 and 0.5";
        within(
            "moe.cosine_router_dim",
            self.cosine_router_dim,
            1..=65536,
            cosine,
        )?;
        within(
            "moe.cosine_router_init_t",
            self.cosine_router_init_t,
            0.01..=100.0,
            cosine,
        )?;
        within(
            "moe.gate_noise",
            self.gate_noise,
            0.0..=100.0,
            "the published models have 1.0",
        )?;
        let weight = "weights are small beside the cross entropy's 1, such as 0.01";
        within(
            "moe.aux_loss_weight",
            self.aux_loss_weight,
            0.0..=100.0,
            weight,
        )?;
        within("moe.z_loss_weight", self.z_loss_weight, 0.0..=100.0, weight)?;
        let drop = "give the probability that a hidden value is zeroed, such as 0.1";
        probability("moe.dropout", self.dropout, drop)?;
        let std = "the published models have 0.005 and 0.02";
        positive("moe.init_std", self.init_std, 10.0, std)?;
        let shared = "give a hidden width, or 0 for no shared expert";
        within("moe.shared_d_ff", self.shared_d_ff, 0..=1 << 20, shared)?;
        if blocks.iter().any(|blocks| !blocks.is_empty()) {
            self.check_aux_loss()?;
        }
        Ok(MoeSettings {
            blocks,
            num_experts: self.num_experts,
            top_k: self.top_k,
            router: self.router,
            cosine_router_dim: self.cosine_router_dim,
            cosine_router_init_t: self.cosine_router_init_t,
            gate_noise: self.gate_noise,
            normalize_gate: self.normalize_gate,
            aux_loss: self.aux_loss,
            aux_loss_weight: self.aux_loss_weight,
            z_loss_weight: self.z_loss_weight,
            dropout: self.dropout,
            activation: self.activation,
            fc2_bias: self.fc2_bias,
            init_std: self.init_std,
            shared_d_ff: non_zero(self.shared_d_ff),
            favor: self.favor,
        })
    }

    fn check_blocks(&self, depths: &[usize]) -> Result<Vec<Vec<usize>>> {
        if self.blocks.is_empty() {
            return Ok(vec![vec![]; depths.len()]);
        }
        one_per_stage("moe.blocks", self.blocks.len(), depths.len())?;
        self.blocks
            .iter()
            .zip(depths)
            .enumerate()
            .map(|(stage, (blocks, &depth))| check_stage_blocks(stage, blocks, depth))
            .collect()
    }

    /// The load loss is an expectation over the noise, and both of its parts are variances.
    fn check_aux_loss(&self) -> Result<()> {
        if self.aux_loss != AuxLoss::LoadImportance || self.aux_loss_weight == 0.0 {
            return Ok(());
        }
        let remedy = "or set moe.aux_loss = \"gshard\" or moe.aux_loss_weight = 0";
        if self.gate_noise == 0.0 {
            return Err(ConfigError::value(
                "moe.gate_noise",
                self.gate_noise,
                "above 0 with moe.aux_loss = \"load_importance\"",
                format!("set moe.gate_noise = 1.0, {remedy}"),
            ));
        }
        if self.num_experts < 2 {
            return Err(ConfigError::value(
                "moe.num_experts",
                self.num_experts,
                "2 or more with moe.aux_loss = \"load_importance\"",
                format!("raise moe.num_experts, {remedy}"),
            ));
        }
        Ok(())
    }
}

fn check_stage_blocks(stage: usize, blocks: &[i64], depth: usize) -> Result<Vec<usize>> {
    if blocks == [-1] {
        return Ok(vec![]);
    }
    let key = format!("moe.blocks[{stage}]");
    let mut checked = Vec::with_capacity(blocks.len());
    for &block in blocks {
        match usize::try_from(block) {
            Ok(index) if index < depth => checked.push(index),
            _ => {
                let allowed = format!("0..={} (the stage's blocks), or [-1] for none", depth - 1);
                let remedy = "list the indices of blocks whose MLP is a Mixture of Experts";
                return Err(ConfigError::value(&key, block, allowed, remedy));
            }
        }
    }
    checked.sort_unstable();
    if let Some(pair) = checked.windows(2).find(|pair| pair[0] == pair[1]) {
        let got = format!("listing {} twice", pair[0]);
        return Err(ConfigError::value(
            &key,
            got,
            "each index once",
            "remove one of the two",
        ));
    }
    Ok(checked)
}

/// Bounds the weights that the settings ask for, before anything is allocated.
pub(super) fn check_parameters(model: &ModelConfig, moe: &MoeSettings) -> Result<()> {
    let mut total = 0u128;
    for (stage, &depth) in model.depths.iter().enumerate() {
        let dim = (model.embed_dim as u128) << stage;
        let hidden = (dim as f64 * model.mlp_ratio) as u128;
        let num_moe = moe.blocks[stage].len() as u128;
        let fc1 = moe.activation.hidden_width(1) as u128;
        let expert = (fc1 + 1) * dim * hidden;
        let shared = (fc1 + 1) * dim * moe.shared_d_ff.unwrap_or(0) as u128;
        total += (depth as u128) * 4 * dim * dim;
        total += (depth as u128 - num_moe) * 2 * dim * hidden;
        total += num_moe * (moe.num_experts as u128 * expert + shared);
    }
    let classes = model.num_classes.unwrap_or(0) as u128;
    total += ((model.embed_dim as u128) << (model.depths.len() - 1)) * classes;
    if total <= MAX_PARAMETERS {
        return Ok(());
    }
    Err(ConfigError::value(
        "model.embed_dim",
        format!("{} and the model {total} weights in all", model.embed_dim),
        format!("at most {MAX_PARAMETERS} weights"),
        "lower model.embed_dim, model.depths, model.mlp_ratio or moe.num_experts",
    ))
}
