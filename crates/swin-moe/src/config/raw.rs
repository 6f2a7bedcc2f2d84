//! The sections as they stand in a file, with their defaults.

use hexa_ops::{Activation, Favor};
use serde::{Deserialize, Serialize};

use super::init::Freeze;
use super::types::{AuxLoss, CropFill, Engine, Mode, Precision, Rebalance, RouterKind};

/// A configuration as it stands in a file; nothing is checked but names and types.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RawConfig {
    /// The network.
    pub model: RawModel,
    /// Its Mixture-of-Experts layers.
    pub moe: RawMoe,
    /// Weights that a new run starts with.
    pub init: RawInit,
    /// Optimisation.
    pub train: RawTrain,
    /// Preparation of images.
    pub augment: RawAugment,
    /// Where images come from.
    pub data: RawData,
    /// What is saved when.
    pub checkpoint: RawCheckpoint,
    /// Devices.
    pub parallel: RawParallel,
}

/// `[model]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RawModel {
    /// Height and width of the images, in pixels.
    pub image_size: usize,
    /// Height and width of a patch, in pixels.
    pub patch_size: usize,
    /// 1 (grey) or 3 (RGB); images are converted.
    pub in_chans: usize,
    /// Number of classes; 0 takes it from the data.
    pub num_classes: usize,
    /// Channels of the first stage; each further stage has twice as many.
    pub embed_dim: usize,
    /// Number of blocks of each stage.
    pub depths: Vec<usize>,
    /// Attention heads of each stage.
    pub num_heads: Vec<usize>,
    /// Height and width of an attention window, in tokens.
    pub window_size: usize,
    /// Hidden width of the MLPs over their channels.
    pub mlp_ratio: f64,
    /// Whether the patch embedding ends with a layer norm.
    pub patch_norm: bool,
    /// Probability that a sample skips the last block's branches; rises linearly with depth.
    pub drop_path_rate: f64,
    /// Window of each stage that the position bias is scaled to; 0 for the stage's own, or for that
    /// of the weights that `[init]` names. Empty is 0 for every stage.
    pub pretrained_window_sizes: Vec<usize>,
}

impl Default for RawModel {
    fn default() -> Self {
        Self {
            image_size: 8,
            patch_size: 1,
            in_chans: 3,
            num_classes: 0,
            embed_dim: 32,
            depths: vec![2, 2],
            num_heads: vec![2, 4],
            window_size: 4,
            mlp_ratio: 4.0,
            patch_norm: true,
            drop_path_rate: 0.1,
            pretrained_window_sizes: vec![],
        }
    }
}

/// `[moe]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RawMoe {
    /// Indices of the blocks of each stage whose MLP is a Mixture-of-Experts layer; `[-1]` or
    /// `[]` for none. Empty is none in every stage.
    pub blocks: Vec<Vec<i64>>,
    /// Experts of each layer.
    pub num_experts: usize,
    /// Experts per token.
    pub top_k: usize,
    /// `"linear"` or `"cosine"`.
    pub router: RouterKind,
    /// Width of the cosine router's projection.
    pub cosine_router_dim: usize,
    /// Initial temperature of the cosine router.
    pub cosine_router_init_t: f64,
    /// Standard deviation, times the number of experts, of the noise on the router's logits.
    pub gate_noise: f64,
    /// Whether a token's gate weights are divided by their sum.
    pub normalize_gate: bool,
    /// `"gshard"` or `"load_importance"`.
    pub aux_loss: AuxLoss,
    /// Weight of the balance loss.
    pub aux_loss_weight: f64,
    /// Weight of the router's z-loss.
    pub z_loss_weight: f64,
    /// Dropout after the experts' activation.
    pub dropout: f64,
    /// The experts' activation.
    pub activation: Activation,
    /// Whether the second layer of the experts has a trained bias.
    pub fc2_bias: bool,
    /// Standard deviation of the experts' initial weights.
    pub init_std: f64,
    /// Hidden width of the shared expert that every token passes through; 0 for none.
    pub shared_d_ff: usize,
    /// `"speed"` or `"memory"`: what the experts' kernels choose where they could have either.
    pub favor: Favor,
}

impl Default for RawMoe {
    fn default() -> Self {
        Self {
            blocks: vec![],
            num_experts: 4,
            top_k: 1,
            router: RouterKind::Linear,
            cosine_router_dim: 256,
            cosine_router_init_t: 0.5,
            gate_noise: 1.0,
            normalize_gate: false,
            aux_loss: AuxLoss::LoadImportance,
            aux_loss_weight: 0.01,
            z_loss_weight: 0.0,
            dropout: 0.0,
            activation: Activation::Gelu,
            fc2_bias: true,
            init_std: 0.02,
            shared_d_ff: 0,
            favor: Favor::Speed,
        }
    }
}

/// `[init]`: fine-tuning. Weights of a model of another image size, window size and number of
/// classes; all else must be the same.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RawInit {
    /// Directory of a run (its best checkpoint, or the last if there is none) or of a checkpoint;
    /// empty for none.
    pub run: String,
    /// Weights in the published names, `.pth` or `.safetensors`; empty for none.
    pub weights: String,
    /// `"none"`, or `"backbone"` for a linear probe: the head alone is trained, and the rest
    /// computes as in evaluation, without noise, dropout and stochastic depth.
    pub freeze: Freeze,
}

/// `[train]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RawTrain {
    /// Passes over the training images.
    pub epochs: usize,
    /// Images per step.
    pub batch_size: usize,
    /// Parts that a step's images are computed in, one after the other, their gradients added: less
    /// memory. Balance losses are then those of the parts, averaged.
    pub accumulation_steps: usize,
    /// Compute each block's activations a second time in the backward pass instead of keeping them:
    /// far less memory, about a third more arithmetic. On one rank.
    pub activation_checkpointing: bool,
    /// Decay of the moving average of the weights, such as 0.999; evaluation, export and prediction
    /// then use the average. 0 for none.
    pub ema_decay: f64,
    /// Learning rate after the warm-up.
    pub lr: f64,
    /// Learning rate of the first step.
    pub warmup_lr: f64,
    /// Learning rate at the end.
    pub min_lr: f64,
    /// Epochs of linear warm-up.
    pub warmup_epochs: usize,
    /// If not 0, the three learning rates are multiplied by `batch_size / lr_scale_batch`.
    pub lr_scale_batch: usize,
    /// AdamW's decoupled weight decay.
    pub weight_decay: f64,
    /// Largest norm of all gradients together; 0 does not clip.
    pub clip_grad: f64,
    /// AdamW's decay rates of the two moments.
    pub betas: [f64; 2],
    /// AdamW's ε.
    pub eps: f64,
    /// Share of the target probability that is spread over all classes.
    pub label_smoothing: f64,
    /// Seed of the initial weights, the order of images and all other randomness.
    pub seed: u64,
    /// `"f32"`, `"tf32"`, `"bf16"` or `"f16"`; refused where the device has no such arithmetic.
    pub precision: Precision,
    /// Steps between two log lines.
    pub log_every: usize,
    /// Epochs between two evaluations; the last epoch is always evaluated.
    pub eval_every_epochs: usize,
    /// Images per step of evaluation.
    pub eval_batch_size: usize,
}

impl Default for RawTrain {
    fn default() -> Self {
        Self {
            epochs: 20,
            batch_size: 64,
            accumulation_steps: 1,
            activation_checkpointing: false,
            ema_decay: 0.0,
            lr: 1e-3,
            warmup_lr: 0.0,
            min_lr: 1e-5,
            warmup_epochs: 2,
            lr_scale_batch: 0,
            weight_decay: 0.05,
            clip_grad: 5.0,
            betas: [0.9, 0.999],
            eps: 1e-8,
            label_smoothing: 0.0,
            seed: 0,
            precision: Precision::F32,
            log_every: 10,
            eval_every_epochs: 1,
            eval_batch_size: 256,
        }
    }
}

/// `[augment]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RawAugment {
    /// Pixels on every side before a random crop back to the image's size; 0 for none.
    pub random_crop_padding: usize,
    /// Colour of these pixels: `"black"`, or `"mean"` for the channels' means.
    pub random_crop_fill: CropFill,
    /// Whether half of the training images are mirrored left to right.
    pub flip: bool,
    /// Whether training images are random parts of the originals, resized (bicubic).
    pub random_resized_crop: bool,
    /// Least and greatest share of the original's area in a random part.
    pub crop_scale: [f64; 2],
    /// Least and greatest width over height of a random part.
    pub crop_ratio: [f64; 2],
    /// RandAugment in timm's words, such as `"rand-m9-mstd0.5-inc1"`: `m` magnitude (10 without it),
    /// `n` operations an image (2), `p` probability of each (0.5), `mstd` spread of the magnitude
    /// (0). The operations are those that grow stronger with the magnitude (`inc1`). Empty for none.
    pub rand_augment: String,
    /// Strength of the jitter of brightness, contrast and saturation; 0 for none. As in timm, it is
    /// left out where `rand_augment` is on.
    pub color_jitter: f64,
    /// Probability that a rectangle of a training image is overwritten with noise.
    pub random_erasing: f64,
    /// α of mixup's share, Beta(α, α); 0 for none.
    pub mixup: f64,
    /// α of CutMix's share, Beta(α, α); 0 for none.
    pub cutmix: f64,
    /// Probability that a batch is mixed.
    pub mix_probability: f64,
    /// Probability of CutMix rather than mixup, where both are on.
    pub mix_switch_probability: f64,
    /// Mean of each channel, of pixels in 0..=1; one number for all channels, or one for each.
    pub mean: Vec<f64>,
    /// Standard deviation of each channel, likewise.
    pub std: Vec<f64>,
}

impl Default for RawAugment {
    fn default() -> Self {
        Self {
            random_crop_padding: 0,
            random_crop_fill: CropFill::Black,
            flip: false,
            random_resized_crop: false,
            crop_scale: [0.08, 1.0],
            crop_ratio: [3.0 / 4.0, 4.0 / 3.0],
            rand_augment: String::new(),
            color_jitter: 0.0,
            random_erasing: 0.0,
            mixup: 0.0,
            cutmix: 0.0,
            mix_probability: 1.0,
            mix_switch_probability: 0.5,
            mean: vec![0.5],
            std: vec![0.5],
        }
    }
}

/// `[data]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RawData {
    /// Folder with `train/<class>/` and `val/<class>/` or `test/<class>/`; empty is the embedded
    /// digits.
    pub dir: String,
    /// Threads that decode and prepare images; 0 is one for each core.
    pub workers: usize,
    /// Unreadable images that are skipped, in each split, before the run is stopped.
    pub max_corrupt: usize,
    /// Bytes of decoded images that are kept in memory, for each split.
    pub cache_bytes: u64,
}

impl Default for RawData {
    fn default() -> Self {
        Self {
            dir: String::new(),
            workers: 0,
            max_corrupt: 0,
            cache_bytes: 1 << 30,
        }
    }
}

/// `[checkpoint]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RawCheckpoint {
    /// Steps between two checkpoints; 0 saves at the end of each epoch only.
    pub every_steps: usize,
    /// How many of the latest checkpoints are kept, besides the best; with 2, one is left if the
    /// other is damaged.
    pub keep_last: usize,
}

impl Default for RawCheckpoint {
    fn default() -> Self {
        Self {
            every_steps: 0,
            keep_last: 2,
        }
    }
}

/// `[parallel]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RawParallel {
    /// Ranks that train together; with `engine = "mpi"`, 1 stands for as many as were started.
    pub ranks: usize,
    /// What ranks are: `"local"` (threads) or `"mpi"` (processes under `mpirun`).
    pub engine: Engine,
    /// What the Mixture-of-Experts layers move: `"data"` (weights), `"model"` (tokens), or
    /// `"auto"`: each layer's faster mode and shares by speed, of a fleet file or as measured when
    /// the run begins.
    pub mode: Mode,
    /// Weight of each rank's share; empty for equal shares, and with `mode = "auto"`.
    pub split: Vec<f64>,
    /// `"auto"` splits batches, and at checkpoints hidden widths, anew when a device has slowed
    /// down; `"off"` leaves them.
    pub rebalance: Rebalance,
    /// Fraction by which the slowest rank may take longer than the fastest before it does.
    pub rebalance_threshold: f64,
}

impl Default for RawParallel {
    fn default() -> Self {
        Self {
            ranks: 1,
            engine: Engine::Local,
            mode: Mode::Data,
            split: vec![],
            rebalance: Rebalance::Off,
            rebalance_threshold: 0.2,
        }
    }
}
