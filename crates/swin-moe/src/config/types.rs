//! Validated settings.

use std::path::PathBuf;
use std::str::FromStr;

use hexa_ops::{Activation, Favor, MatmulPrecision};
use serde::{Deserialize, Serialize};

use super::init::InitConfig;

/// A run's settings, every one checked, alone and against the others.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Config {
    /// The network.
    pub model: ModelConfig,
    /// Its Mixture-of-Experts layers.
    pub moe: MoeSettings,
    /// Weights that a new run starts with.
    pub init: InitConfig,
    /// Optimisation.
    pub train: TrainConfig,
    /// Preparation of images.
    pub augment: AugmentConfig,
    /// Where images come from.
    pub data: DataConfig,
    /// What is saved when.
    pub checkpoint: CheckpointConfig,
    /// Devices.
    pub parallel: ParallelConfig,
}

/// The network.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct ModelConfig {
    /// Height and width of the images, in pixels; a multiple of `patch_size`.
    pub image_size: usize,
    /// Height and width of a patch, in pixels.
    pub patch_size: usize,
    /// 1 (grey) or 3 (RGB).
    pub in_chans: usize,
    /// Number of classes; `None` takes it from the data.
    pub num_classes: Option<usize>,
    /// Channels of the first stage; each further stage has twice as many.
    pub embed_dim: usize,
    /// Number of blocks of each stage.
    pub depths: Vec<usize>,
    /// Attention heads of each stage, divisors of its channels.
    pub num_heads: Vec<usize>,
    /// Height and width of an attention window, in tokens; clamped to a stage's grid.
    pub window_size: usize,
    /// Hidden width of the MLPs over their channels.
    pub mlp_ratio: f64,
    /// Whether the patch embedding ends with a layer norm.
    pub patch_norm: bool,
    /// Probability that a sample skips the last block's branches; rises linearly with depth.
    pub drop_path_rate: f64,
    /// Window of each stage that the position bias is scaled to; 0 for the stage's own.
    pub pretrained_window_sizes: Vec<usize>,
}

/// What all Mixture-of-Experts layers of a model have in common.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct MoeSettings {
    /// Indices of the blocks of each stage whose MLP is a Mixture-of-Experts layer, ascending;
    /// one list for each stage.
    pub blocks: Vec<Vec<usize>>,
    /// Experts of each layer.
    pub num_experts: usize,
    /// Experts per token.
    pub top_k: usize,
    /// How tokens are compared with experts.
    pub router: RouterKind,
    /// Width of the cosine router's projection.
    pub cosine_router_dim: usize,
    /// Initial temperature of the cosine router.
    pub cosine_router_init_t: f64,
    /// Standard deviation, times the number of experts, of the noise on the router's logits.
    pub gate_noise: f64,
    /// Whether a token's gate weights are divided by their sum.
    pub normalize_gate: bool,
    /// The balance loss.
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
    /// Hidden width of the shared expert; `None` for no shared expert.
    pub shared_d_ff: Option<usize>,
    /// What the experts' kernels choose where they could have either.
    pub favor: Favor,
}

/// How tokens are compared with experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RouterKind {
    /// One linear projection, no bias.
    #[default]
    Linear,
    /// Cosine of a projection with each expert's vector, over a learned temperature.
    Cosine,
}

/// The loss that keeps experts evenly loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AuxLoss {
    /// Product of each expert's share of tokens and its mean probability.
    Gshard,
    /// Squared coefficients of variation of load and importance.
    #[default]
    LoadImportance,
}

/// Arithmetic of the training step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Precision {
    /// IEEE f32 throughout.
    #[default]
    F32,
    /// f32 storage and sums; dense products may round their operands to TF32.
    Tf32,
    /// Products of operands rounded to bf16, activations in bf16 between them; weights, norms,
    /// softmax, router, losses, sums and the optimizer in f32.
    Bf16,
    /// As `Bf16`, in IEEE half precision; gradients are small there, so the loss is scaled.
    F16,
}

impl Precision {
    /// All of them.
    pub const ALL: [Precision; 4] = [
        Precision::F32,
        Precision::Tf32,
        Precision::Bf16,
        Precision::F16,
    ];

    /// Arithmetic of dense matrix products.
    pub fn matmul(self) -> MatmulPrecision {
        match self {
            Precision::F32 => MatmulPrecision::Strict,
            Precision::Tf32 => MatmulPrecision::Tf32,
            Precision::Bf16 => MatmulPrecision::Bf16,
            Precision::F16 => MatmulPrecision::F16,
        }
    }

    /// Its name in a configuration.
    pub fn name(self) -> &'static str {
        match self {
            Precision::F32 => "f32",
            Precision::Tf32 => "tf32",
            Precision::Bf16 => "bf16",
            Precision::F16 => "f16",
        }
    }
}

impl FromStr for Precision {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Precision::ALL
            .into_iter()
            .find(|precision| precision.name() == text)
            .ok_or_else(|| format!("{text:?} is unknown, allowed are f32, tf32, bf16 and f16"))
    }
}

/// What a padded crop shows beyond the image's edge.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CropFill {
    /// Black: padding before the pixels are normalised, as torchvision's `RandomCrop` pads.
    #[default]
    Black,
    /// `augment.mean`, rounded to a byte: padding with zeros after the pixels are normalised.
    Mean,
}

/// Optimisation.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct TrainConfig {
    /// Passes over the training images.
    pub epochs: usize,
    /// Images per step.
    pub batch_size: usize,
    /// Parts that a step's images are computed in, one after the other.
    pub accumulation_steps: usize,
    /// Whether each block's activations are computed a second time in the backward pass, instead of
    /// being kept.
    pub activation_checkpointing: bool,
    /// Decay of the moving average of the weights, which is then evaluated; 0 for none.
    pub ema_decay: f64,
    /// Learning rate after the warm-up, as written; see [`TrainConfig::lr_scale`].
    pub lr: f64,
    /// Learning rate of the first step, as written.
    pub warmup_lr: f64,
    /// Learning rate at the end, as written.
    pub min_lr: f64,
    /// Epochs of linear warm-up.
    pub warmup_epochs: usize,
    /// Batch size that the learning rates are meant for, if they are to be scaled.
    pub lr_scale_batch: Option<usize>,
    /// AdamW's decoupled weight decay.
    pub weight_decay: f64,
    /// Largest norm of all gradients together; `None` does not clip.
    pub clip_grad: Option<f64>,
    /// AdamW's decay rates of the two moments.
    pub betas: [f64; 2],
    /// AdamW's ε.
    pub eps: f64,
    /// Share of the target probability that is spread over all classes.
    pub label_smoothing: f64,
    /// Seed of all randomness.
    pub seed: u64,
    /// Arithmetic.
    pub precision: Precision,
    /// Steps between two log lines.
    pub log_every: usize,
    /// Epochs between two evaluations.
    pub eval_every_epochs: usize,
    /// Images per step of evaluation.
    pub eval_batch_size: usize,
}

impl TrainConfig {
    /// Factor of all learning rates: `batch_size / lr_scale_batch`, or 1.
    pub fn lr_scale(&self) -> f64 {
        self.lr_scale_batch
            .map_or(1.0, |batch| self.batch_size as f64 / batch as f64)
    }
}

/// Preparation of images.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct AugmentConfig {
    /// Pixels on every side before a random crop back to the image's size.
    pub random_crop_padding: usize,
    /// Colour of these pixels.
    pub random_crop_fill: CropFill,
    /// Whether half of the training images are mirrored left to right.
    pub flip: bool,
    /// Whether training images are random parts of the originals, resized.
    pub random_resized_crop: bool,
    /// Least and greatest share of the original's area in a random part.
    pub crop_scale: [f64; 2],
    /// Least and greatest width over height of a random part.
    pub crop_ratio: [f64; 2],
    /// Operations drawn for each training image; `None` for none.
    pub rand_augment: Option<RandAugmentConfig>,
    /// Strength of the colour jitter, which is left out where `rand_augment` is on; 0 for none.
    pub color_jitter: f64,
    /// Probability that a rectangle of a training image is overwritten with noise.
    pub random_erasing: f64,
    /// How the images of a batch are mixed with each other.
    pub mix: MixConfig,
    /// Mean of each channel, of pixels in 0..=1; `in_chans` numbers.
    pub mean: Vec<f64>,
    /// Standard deviation of each channel; `in_chans` numbers.
    pub std: Vec<f64>,
}

/// RandAugment, in timm's words `rand-mM-nN-pP-mstdS-inc1`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RandAugmentConfig {
    /// Mean strength of the operations, 0..=10.
    pub magnitude: f64,
    /// Standard deviation of the strength.
    pub std: f64,
    /// Operations that are drawn for an image.
    pub layers: usize,
    /// Probability that one of them is applied.
    pub probability: f64,
}

/// Mixup and CutMix.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MixConfig {
    /// α of the distribution of mixup's share, Beta(α, α); 0 for no mixup.
    pub mixup: f64,
    /// α of the distribution of CutMix's share; 0 for no CutMix.
    pub cutmix: f64,
    /// Probability that a batch is mixed at all.
    pub probability: f64,
    /// Probability of CutMix where both are on.
    pub switch_probability: f64,
}

/// Where images come from.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct DataConfig {
    /// The images.
    pub source: DataSource,
    /// Threads that decode and prepare images; `None` is one for each core.
    pub workers: Option<usize>,
    /// Unreadable images that are skipped, in each split, before the run is stopped.
    pub max_corrupt: usize,
    /// Bytes of decoded images that are kept in memory, for each split.
    pub cache_bytes: u64,
}

impl DataConfig {
    /// Threads that decode and prepare images, on this machine.
    pub fn num_workers(&self) -> usize {
        self.workers.unwrap_or_else(|| {
            std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
        })
    }
}

/// Where images come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DataSource {
    /// The digits inside the program.
    Digits,
    /// A folder with `train/<class>/` and `val/<class>/` or `test/<class>/`.
    Folder(PathBuf),
}

/// What is saved when.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct CheckpointConfig {
    /// Steps between two checkpoints; `None` saves at the end of each epoch only.
    pub every_steps: Option<usize>,
    /// How many of the latest checkpoints are kept, besides the best.
    pub keep_last: usize,
}

/// Devices.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct ParallelConfig {
    /// Ranks that train together; with [`Engine::Mpi`], 1 stands for as many as were started.
    pub ranks: usize,
    /// What ranks are.
    pub engine: Engine,
    /// What the Mixture-of-Experts layers move between ranks.
    pub mode: Mode,
    /// Weights of the ranks' shares: of the experts' hidden width, and in the data-centric mode of
    /// each batch; `None` for equal ones.
    pub split: Option<Vec<f64>>,
    /// Whether shares follow the ranks' step times during training.
    pub rebalance: Rebalance,
    /// Fraction by which the slowest rank may take longer than the fastest before they do.
    pub rebalance_threshold: f64,
}

/// What ranks are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Engine {
    /// Threads of one process.
    #[default]
    Local,
    /// Processes started by `mpirun`.
    Mpi,
}

/// What a layer moves between ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// Weights.
    #[default]
    Data,
    /// Tokens.
    Model,
    /// What a cost model finds faster, layer by layer; shares are chosen with it.
    Auto,
}

/// Whether shares follow the ranks' step times.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Rebalance {
    /// They stay as they are.
    #[default]
    Off,
    /// They are split anew when a device has slowed down, or come back.
    Auto,
}
