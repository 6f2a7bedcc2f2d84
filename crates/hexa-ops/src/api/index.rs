//! From logits to who works on which rows.

use burn::tensor::backend::Backend;
use burn::tensor::{Int, Tensor, TensorPrimitive};

use super::check;
use crate::backend::{ExpertOps, RawExpertIndex};
use crate::error::{OpsError, Result};
use crate::host::download;

/// Largest number of slots: indices are 32-bit on every back-end.
const MAX_SLOTS: usize = i32::MAX as usize;

/// The choice of experts for each token.
#[derive(Debug, Clone)]
pub struct Gating<B: Backend> {
    /// Softmax of the logits: `[tokens, num_experts]`.
    pub probs: Tensor<B, 2>,
    /// Weight of each choice, descending: `[tokens, top_k]`.
    pub weights: Tensor<B, 2>,
    /// Chosen experts, of equal logits the lower id first: `[tokens, top_k]`, int.
    pub expert_ids: Tensor<B, 2, Int>,
}

/// Softmax over experts and the `top_k` largest probabilities of each token.
///
/// `probs` and `weights` are differentiable; nothing waits for the device.
///
/// # Shapes
/// - `logits`: `[tokens, num_experts]`, float
///
/// With `normalize`, a token's weights are divided by their sum.
///
/// # Errors
/// [`OpsError::TopK`] unless `1 <= top_k <= num_experts`; [`OpsError::DType`] for quantised
/// logits; [`OpsError::Value`] if there are more than 2³¹ − 1 slots.
pub fn topk_gating<B: ExpertOps>(
    logits: Tensor<B, 2>,
    top_k: usize,
    normalize: bool,
) -> Result<Gating<B>> {
    let [tokens, num_experts] = logits.dims();
    check::float_dtype("topk_gating", "logits", &logits)?;
    check_choices(tokens, top_k, num_experts)?;
    let raw = B::topk_gating(logits.into_primitive().tensor(), top_k, normalize);
    Ok(Gating {
        probs: Tensor::from_primitive(TensorPrimitive::Float(raw.probs)),
        weights: Tensor::from_primitive(TensorPrimitive::Float(raw.weights)),
        expert_ids: Tensor::from_primitive(raw.expert_ids),
    })
}

fn check_choices(tokens: usize, top_k: usize, num_experts: usize) -> Result<()> {
    if top_k == 0 || top_k > num_experts {
        return Err(OpsError::TopK { top_k, num_experts });
    }
    match tokens.checked_mul(top_k) {
        Some(slots) if slots <= MAX_SLOTS => Ok(()),
        _ => Err(OpsError::Value {
            name: "tokens · top_k",
            got: format!("{tokens} · {top_k}"),
            allowed: "at most 2147483647 slots",
            remedy: "split the batch",
        }),
    }
}

/// The re-index vector: the slots sorted stably by expert (arXiv:2411.01288v4, section 4.1).
///
/// A *slot* is one (token, choice) pair, numbered `token · top_k + choice`; a *position* is its
/// place in the sorted order. Nothing is padded.
#[derive(Debug, Clone)]
pub struct ExpertIndex<B: Backend> {
    raw: RawExpertIndex<B::IntTensorPrimitive>,
}

impl<B: ExpertOps> ExpertIndex<B> {
    /// Builds the index of any assignment of experts, after checking the ids.
    ///
    /// The check reads the ids back to the host, which waits for the device;
    /// [`ExpertIndex::from_gating`] needs no check.
    ///
    /// # Shapes
    /// - `expert_ids`: `[tokens, top_k]`, int in `0..num_experts`
    ///
    /// # Errors
    /// [`OpsError::ExpertId`] for an id out of range, [`OpsError::TopK`] unless
    /// `1 <= top_k <= num_experts`, [`OpsError::Device`] if the read fails.
    pub fn new(expert_ids: Tensor<B, 2, Int>, num_experts: usize) -> Result<Self> {
        let [tokens, top_k] = expert_ids.dims();
        check_choices(tokens, top_k, num_experts)?;
        let ids = download(expert_ids.clone()).map_err(|error| OpsError::Device {
            tensor: "expert_ids",
            reason: error.to_string(),
        })?;
        for (slot, id) in ids.iter::<i64>().enumerate() {
            if usize::try_from(id).map_or(true, |id| id >= num_experts) {
                return Err(OpsError::ExpertId {
                    token: slot / top_k,
                    choice: slot % top_k,
                    got: id,
                    num_experts,
                });
            }
        }
        Ok(Self {
            raw: B::expert_index(expert_ids.into_primitive(), num_experts),
        })
    }

    /// Builds the index of a gating's choices, whose ids are in range by construction, without
    /// waiting for the device.
    pub fn from_gating(gating: &Gating<B>) -> Self {
        let [_, num_experts] = gating.probs.dims();
        Self {
            raw: B::expert_index(gating.expert_ids.clone().into_primitive(), num_experts),
        }
    }
}

impl<B: Backend> ExpertIndex<B> {
    /// Slots per expert: `[num_experts]`.
    pub fn counts(&self) -> Tensor<B, 1, Int> {
        Tensor::from_primitive(self.raw.counts.clone())
    }

    /// First position of each expert, and the number of slots at the end: `[num_experts + 1]`.
    pub fn offsets(&self) -> Tensor<B, 1, Int> {
        Tensor::from_primitive(self.raw.offsets.clone())
    }

    /// Slot at each position: `[tokens · top_k]`.
    pub fn slots(&self) -> Tensor<B, 1, Int> {
        Tensor::from_primitive(self.raw.slots.clone())
    }

    /// Position of each slot: `[tokens · top_k]`.
    pub fn positions(&self) -> Tensor<B, 1, Int> {
        Tensor::from_primitive(self.raw.positions.clone())
    }

    /// Number of tokens.
    pub fn tokens(&self) -> usize {
        self.raw.tokens
    }

    /// Choices per token.
    pub fn top_k(&self) -> usize {
        self.raw.top_k
    }

    /// Number of experts.
    pub fn num_experts(&self) -> usize {
        self.raw.num_experts
    }

    /// Number of (token, choice) slots.
    pub fn num_slots(&self) -> usize {
        self.raw.num_slots()
    }

    /// The tensors themselves, for [`ExpertOps`].
    pub fn raw(&self) -> &RawExpertIndex<B::IntTensorPrimitive> {
        &self.raw
    }
}
