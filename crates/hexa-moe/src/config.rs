//! Settings of the layer: plain data, checked before anything is allocated.

use burn::config::Config;
use burn::tensor::backend::Backend;
use hexa_ops::{Activation, ExpertOps, Favor, MatmulPrecision, OpsError};
use serde::{Deserialize, Serialize};

use crate::error::{MoeError, Result};
use crate::experts::{ExpertsSpec, FfnBias};
use crate::moe::Moe;
use crate::router::{Router, Scorer};

/// How tokens are scored against experts.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum RouterConfig {
    /// `logits = x · W`, without bias.
    #[default]
    Linear,
    /// Cosine similarity of the projected token and one vector per expert, divided by a learned
    /// temperature (arXiv:2204.09179, as in Tutel's `cosine_top`).
    Cosine {
        /// Width that tokens are projected to.
        #[serde(default = "default_cosine_dim")]
        dim: usize,
        /// Temperature at the start.
        #[serde(default = "default_init_temperature")]
        init_temperature: f64,
    },
}

impl RouterConfig {
    /// The cosine router with the published settings: width 256, initial temperature 0.5.
    pub fn cosine() -> Self {
        Self::Cosine {
            dim: default_cosine_dim(),
            init_temperature: default_init_temperature(),
        }
    }
}

/// Weights of the auxiliary losses; a loss of weight zero is not computed.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BalanceConfig {
    /// Weight of [`gshard_loss`](crate::balance::gshard_loss).
    pub gshard: f64,
    /// Weight of [`load_importance_loss`](crate::balance::load_importance_loss).
    pub load_importance: f64,
    /// Weight of [`z_loss`](crate::balance::z_loss).
    pub z_loss: f64,
}

impl Default for BalanceConfig {
    fn default() -> Self {
        Self::gshard(0.01)
    }
}

impl BalanceConfig {
    /// No auxiliary loss.
    pub const NONE: Self = Self {
        gshard: 0.0,
        load_importance: 0.0,
        z_loss: 0.0,
    };

    /// The GShard loss alone.
    pub fn gshard(weight: f64) -> Self {
        Self {
            gshard: weight,
            ..Self::NONE
        }
    }

    /// The load + importance loss alone.
    pub fn load_importance(weight: f64) -> Self {
        Self {
            load_importance: weight,
            ..Self::NONE
        }
    }

    /// Sets the weight of the z-loss.
    pub fn with_z_loss(mut self, weight: f64) -> Self {
        self.z_loss = weight;
        self
    }
}

/// Configuration of a [`Moe`] layer; [`MoeConfig::init`] builds it.
///
/// Unknown keys are refused when it is read; all but the first three have defaults.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MoeConfig {
    /// Width of a token.
    pub d_model: usize,
    /// Hidden width of each expert.
    pub d_ff: usize,
    /// Number of experts.
    pub num_experts: usize,
    /// Experts per token. Default: 1.
    #[serde(default = "default_top_k")]
    pub top_k: usize,
    /// How tokens are scored. Default: linear.
    #[serde(default)]
    pub router: RouterConfig,
    /// In training, `gate_noise / num_experts · N(0, 1)` is added to the logits. Default: 1.
    #[serde(default = "default_gate_noise")]
    pub gate_noise: f64,
    /// Whether a token's gate weights are divided by their sum. Default: false.
    #[serde(default)]
    pub normalize_gate: bool,
    /// The experts' activation. Default: GELU with the error function.
    #[serde(default)]
    pub activation: Activation,
    /// Dropout after the activation, in training. Default: 0.
    #[serde(default)]
    pub expert_dropout: f64,
    /// Hidden width of the shared expert that sees every token, or 0 for none. Default: 0.
    #[serde(default)]
    pub shared_d_ff: usize,
    /// Whether the experts' layers have biases. Default: true.
    #[serde(default = "default_true")]
    pub bias: bool,
    /// Whether the second layer's bias is trained; if not, it is still added. Default: true.
    #[serde(default = "default_true")]
    pub train_fc2_bias: bool,
    /// Standard deviation of the experts' initial weights. Default: 0.02.
    #[serde(default = "default_init_std")]
    pub init_std: f64,
    /// Standard deviation of the router's initial weights. Default: 0.02.
    #[serde(default = "default_init_std")]
    pub router_init_std: f64,
    /// Weights of the auxiliary losses. Default: GShard, 0.01.
    #[serde(default)]
    pub balance: BalanceConfig,
    /// Arithmetic of the products. The router's stay in f32, where half precision would send tokens
    /// to other experts: they are strict with `bf16` and `f16`. Default: strict f32.
    #[serde(default)]
    pub precision: MatmulPrecision,
    /// Whether the experts' kernels choose the shortest time or the least memory where they differ.
    /// Default: speed.
    #[serde(default)]
    pub favor: Favor,
}

/// Lets [`MoeConfig`] be a field of a `#[derive(Config)]` struct, and be saved and loaded as JSON.
impl Config for MoeConfig {}

fn default_top_k() -> usize {
    1
}
fn default_gate_noise() -> f64 {
    1.0
}
fn default_init_std() -> f64 {
    0.02
}
fn default_true() -> bool {
    true
}
fn default_cosine_dim() -> usize {
    256
}
fn default_init_temperature() -> f64 {
    0.5
}

/// Burn's builder convention: one `with_…` method per field that has a default.
macro_rules! setters {
    ($($with:ident => $field:ident: $ty:ty),+ $(,)?) => {
        impl MoeConfig {$(
            #[doc = concat!("Sets [`", stringify!($field), "`](Self::", stringify!($field), ").")]
            pub fn $with(mut self, $field: $ty) -> Self {
                self.$field = $field;
                self
            }
        )+}
    };
}

setters! {
    with_top_k => top_k: usize,
    with_router => router: RouterConfig,
    with_gate_noise => gate_noise: f64,
    with_normalize_gate => normalize_gate: bool,
    with_activation => activation: Activation,
    with_expert_dropout => expert_dropout: f64,
    with_shared_d_ff => shared_d_ff: usize,
    with_bias => bias: bool,
    with_train_fc2_bias => train_fc2_bias: bool,
    with_init_std => init_std: f64,
    with_router_init_std => router_init_std: f64,
    with_balance => balance: BalanceConfig,
    with_precision => precision: MatmulPrecision,
    with_favor => favor: Favor,
}

impl MoeConfig {
    /// A configuration with every default.
    pub fn new(d_model: usize, d_ff: usize, num_experts: usize) -> Self {
        Self {
            d_model,
            d_ff,
            num_experts,
            top_k: default_top_k(),
            router: RouterConfig::default(),
            gate_noise: default_gate_noise(),
            normalize_gate: false,
            activation: Activation::default(),
            expert_dropout: 0.0,
            shared_d_ff: 0,
            bias: true,
            train_fc2_bias: true,
            init_std: default_init_std(),
            router_init_std: default_init_std(),
            balance: BalanceConfig::default(),
            precision: MatmulPrecision::default(),
            favor: Favor::default(),
        }
    }

    /// Builds the layer on `device`. Like all of Burn's modules, it draws its weights when they
    /// are first used, from the back-end's generator (`B::seed`).
    ///
    /// # Errors
    /// [`MoeError`] if [`MoeConfig::validate`] refuses the configuration.
    pub fn init<B: ExpertOps>(&self, device: &B::Device) -> Result<Moe<B>> {
        self.validate()?;
        Ok(Moe {
            router: self.init_router(device),
            experts: self.experts_spec(self.num_experts, self.d_ff).init(device),
            shared: (self.shared_d_ff > 0)
                .then(|| self.experts_spec(1, self.shared_d_ff).init(device)),
            d_model: self.d_model,
            balance: self.balance,
            parallel: None,
        })
    }

    fn init_router<B: Backend>(&self, device: &B::Device) -> Router<B> {
        let std = self.router_init_std;
        Router {
            scorer: match self.router {
                RouterConfig::Linear => Scorer::linear(self.d_model, self.num_experts, std, device),
                RouterConfig::Cosine {
                    dim,
                    init_temperature,
                } => Scorer::cosine(
                    [self.d_model, dim, self.num_experts],
                    std,
                    init_temperature,
                    device,
                ),
            },
            num_experts: self.num_experts,
            top_k: self.top_k,
            gate_noise: self.gate_noise,
            normalize_gate: self.normalize_gate,
            noise_in_training: true,
            precision: self.precision.of_f32_products(),
        }
    }

    fn experts_spec(&self, num_experts: usize, d_ff: usize) -> ExpertsSpec {
        ExpertsSpec {
            num_experts,
            d_model: self.d_model,
            d_ff,
            activation: self.activation,
            dropout: self.expert_dropout,
            init_std: self.init_std,
            bias: match (self.bias, self.train_fc2_bias) {
                (false, _) => FfnBias::None,
                (true, false) => FfnBias::FrozenFc2,
                (true, true) => FfnBias::Trained,
            },
            precision: self.precision,
            favor: self.favor,
        }
    }

    /// Checks every field.
    ///
    /// # Errors
    /// [`MoeError::Config`] names the field, what it is, what is allowed and the remedy;
    /// [`OpsError::TopK`] if `top_k` is not in `1..=num_experts`.
    pub fn validate(&self) -> Result<()> {
        for (field, value) in [
            ("d_model", self.d_model),
            ("d_ff", self.d_ff),
            ("num_experts", self.num_experts),
        ] {
            if value == 0 {
                return refuse(field, value, ">= 1", "give the width or count of the layer");
            }
        }
        if !(1..=self.num_experts).contains(&self.top_k) {
            return Err(MoeError::Ops(OpsError::TopK {
                top_k: self.top_k,
                num_experts: self.num_experts,
            }));
        }
        self.validate_sizes()?;
        for (field, value) in [
            ("gate_noise", self.gate_noise),
            ("init_std", self.init_std),
            ("router_init_std", self.router_init_std),
            ("balance.gshard", self.balance.gshard),
            ("balance.load_importance", self.balance.load_importance),
            ("balance.z_loss", self.balance.z_loss),
        ] {
            if !(value.is_finite() && value >= 0.0) {
                return refuse(
                    field,
                    value,
                    "a finite number >= 0",
                    "use 0 to switch it off",
                );
            }
        }
        // As f32, which is what the kernels compare with: 1 − 1e-9 would round to 1.
        if !(0.0..1.0).contains(&(self.expert_dropout as f32)) {
            return refuse(
                "expert_dropout",
                self.expert_dropout,
                "0.0 <= expert_dropout < 1.0",
                "give the probability of zeroing a value",
            );
        }
        if self.balance.load_importance > 0.0 && self.gate_noise == 0.0 {
            return refuse(
                "gate_noise",
                self.gate_noise,
                "> 0 with balance.load_importance",
                "the load loss is defined by the noise: raise gate_noise or use balance.gshard",
            );
        }
        self.validate_router()
    }

    /// Refuses weights whose number of elements no tensor can have.
    fn validate_sizes(&self) -> Result<()> {
        for (field, d_ff, experts) in [
            ("d_ff", self.d_ff, self.num_experts),
            ("shared_d_ff", self.shared_d_ff, 1),
        ] {
            // Two columns per hidden unit, as gated activations need, of four bytes each.
            let bytes = [2, 4, self.d_model, experts]
                .into_iter()
                .try_fold(d_ff, usize::checked_mul);
            if bytes.is_none_or(|bytes| bytes > isize::MAX as usize) {
                return refuse(
                    field,
                    d_ff,
                    "num_experts · d_model · d_ff within the address space",
                    "lower one of the three",
                );
            }
        }
        Ok(())
    }

    fn validate_router(&self) -> Result<()> {
        let RouterConfig::Cosine {
            dim,
            init_temperature,
        } = self.router
        else {
            return Ok(());
        };
        if dim == 0 {
            return refuse("router.dim", dim, ">= 1", "the published width is 256");
        }
        // Below 0.01 the clamp of the learned scale would cut off its gradient from the start.
        if !(init_temperature.is_finite() && init_temperature >= 0.01) {
            return refuse(
                "router.init_temperature",
                init_temperature,
                "a finite number >= 0.01",
                "the published temperature is 0.5",
            );
        }
        Ok(())
    }
}

fn refuse(
    field: &'static str,
    got: impl ToString,
    allowed: &str,
    remedy: &'static str,
) -> Result<()> {
    Err(MoeError::Config {
        field,
        got: got.to_string(),
        allowed: allowed.to_owned(),
        remedy,
    })
}
