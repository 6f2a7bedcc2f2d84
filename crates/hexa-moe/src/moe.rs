//! The layer on one device: the specification that every parallel form of it must equal.

use burn::module::Module;
use burn::tensor::backend::Backend;
use burn::tensor::{Int, Tensor};
use hexa_ops::{ExpertIndex, ExpertOps, OpsError};

use crate::balance::no_loss;
use crate::config::BalanceConfig;
use crate::error::{MoeError, Result};
use crate::experts::Experts;
use crate::load::LoadStats;
use crate::parallel::{self, ExpertParallel};
use crate::router::{Router, Routing};

/// A Mixture-of-Experts feed-forward layer:
///
/// ```text
/// y_t = Σ_{e in top_k(t)} g_te · (act(x_t · W1_e + b1_e) · W2_e + b2_e)  [+ shared(x_t)]
/// ```
///
/// No capacity, no padding, no dropped token. Made by [`MoeConfig`](crate::MoeConfig).
///
/// Gate noise and expert dropout are active on back-ends with autodiff; `moe.valid()` gives the
/// layer without them.
#[derive(Module, Debug)]
pub struct Moe<B: Backend> {
    /// Chooses experts.
    pub router: Router<B>,
    /// The routed experts.
    pub experts: Experts<B>,
    /// The shared expert, which sees every token, ungated.
    pub shared: Option<Experts<B>>,
    /// Width of a token.
    pub d_model: usize,
    /// Weights of the auxiliary losses.
    #[module(skip)]
    pub balance: BalanceConfig,
    /// How the layer is distributed over ranks; `None` on one device. Set by
    /// [`parallelize`](crate::parallel::parallelize).
    #[module(skip)]
    pub parallel: Option<ExpertParallel>,
}

/// Result of [`Moe::forward`]; `D` is the rank of the input.
#[derive(Debug, Clone)]
pub struct MoeOutput<B: Backend, const D: usize = 2> {
    /// Shaped and typed as the input.
    pub output: Tensor<B, D>,
    /// Weighted sum of the auxiliary losses, to be added to the task's loss: `[1]`, f32.
    pub aux_loss: Tensor<B, 1>,
    /// Load of the experts, on the device.
    pub load: LoadStats<B>,
}

impl<B: ExpertOps> Moe<B> {
    /// Switches gate noise and expert dropout off for good, so that a back-end with autodiff
    /// computes what `valid()` computes, and its gradients.
    pub fn without_noise(mut self) -> Self {
        self.router.noise_in_training = false;
        self.experts.dropout = 0.0;
        if let Some(shared) = &mut self.shared {
            shared.dropout = 0.0;
        }
        self
    }

    /// Runs the layer; [`Moe::try_forward`] without the `Result`, as Burn's modules have it.
    ///
    /// # Shapes
    /// - `x`: `[..., d_model]`, float
    /// - output: the same
    ///
    /// # Panics
    /// If the last dimension of `x` is not `d_model`, or a record with other shapes than the
    /// configuration's was loaded into the layer.
    pub fn forward<const D: usize>(&self, x: Tensor<B, D>) -> MoeOutput<B, D> {
        match self.try_forward(x) {
            Ok(output) => output,
            Err(error) => panic!("{error}"),
        }
    }

    /// Runs the layer.
    ///
    /// Without tokens, the output is empty, the loss zero, and no parameter receives a gradient.
    ///
    /// # Shapes
    /// - `x`: `[..., d_model]`, float
    /// - output: the same
    ///
    /// # Errors
    /// [`MoeError`] if the shape of `x`, or that of a loaded parameter, does not fit. Nothing was
    /// launched then.
    pub fn try_forward<const D: usize>(&self, x: Tensor<B, D>) -> Result<MoeOutput<B, D>> {
        let shape = x.shape();
        if shape.as_slice().last() != Some(&self.d_model) {
            return Err(MoeError::Input {
                got: shape.to_vec(),
                d_model: self.d_model,
            });
        }
        if !x.dtype().is_float() {
            return Err(MoeError::Ops(OpsError::DType {
                op: "Moe",
                tensor: "x",
                got: x.dtype(),
                expected: "a float type".to_owned(),
            }));
        }
        let tokens = shape.num_elements() / self.d_model;
        if let Some(distribution) = &self.parallel {
            let x = x.reshape([tokens, self.d_model]);
            let out = parallel::forward(self, distribution, x)?;
            return Ok(MoeOutput {
                output: out.output.reshape(shape),
                aux_loss: out.aux_loss,
                load: out.load,
            });
        }
        if tokens == 0 {
            return Ok(self.no_tokens(x));
        }

        let dtype = x.dtype();
        let x = x.reshape([tokens, self.d_model]);
        let routing = self.router.route(x.clone())?;
        let index = ExpertIndex::from_gating(&routing.gating);
        let mut output = self
            .experts
            .forward(x.clone(), routing.gating.weights.clone(), &index)?;
        if let Some(shared) = &self.shared {
            output = output + shared.forward_shared(x)?;
        }

        Ok(MoeOutput {
            output: output.cast(dtype).reshape(shape),
            aux_loss: self.balance.loss(&routing, self.router.gate_noise),
            load: self.load(index.counts(), Some(routing)),
        })
    }

    /// Starts what the layer's next forward pass can have ready: the gather of its weights, if they
    /// move. Call it before what lies in front of the layer (attention, say), on all ranks, and
    /// run the layer before its parameters change. On one device it does nothing.
    ///
    /// # Errors
    /// [`MoeError`] if the device or a rank failed.
    pub fn prefetch(&self) -> Result<()> {
        match &self.parallel {
            Some(distribution) => parallel::prefetch(self, distribution),
            None => Ok(()),
        }
    }

    /// The result for zero tokens. Back-ends need not know reductions over nothing.
    fn no_tokens<const D: usize>(&self, x: Tensor<B, D>) -> MoeOutput<B, D> {
        let device = x.device();
        let num_experts = self.router.num_experts;
        MoeOutput {
            output: x,
            aux_loss: no_loss(&device),
            load: self.load(Tensor::zeros([num_experts], &device), None),
        }
    }

    fn load(
        &self,
        tokens_per_expert: Tensor<B, 1, Int>,
        routing: Option<Routing<B>>,
    ) -> LoadStats<B> {
        LoadStats {
            tile_rows: hexa_ops::tile_rows::<B>(&tokens_per_expert.device()),
            tokens_per_expert,
            routing: routing.map(Routing::detach),
            global: None,
        }
    }
}
