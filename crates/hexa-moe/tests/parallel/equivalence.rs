//! One rank of a parallel job against one device with the whole batch: outputs, losses, all
//! gradients and ten steps of training. The same code runs as threads and under `mpirun`.

use burn::module::{AutodiffModule, Module, ModuleVisitor, Param};
use burn::nn::{Linear, LinearConfig};
use burn::optim::{AdamConfig, GradientsParams, Optimizer};
use burn::tensor::backend::Backend;
use burn::tensor::{Tensor, TensorData};
use hexa_moe::parallel::{
    BatchShare, Communicator, ExpertShards, HostExperts, Mode, ParallelContext, exchange_gradients,
    gather_experts, global_squared_norm, parallelize, split_proportional,
};
use hexa_moe::{ExpertOps, LoadReport, MatmulPrecision, Moe, MoeConfig, TrainingBackend};
use hexa_ops::testing::compare::host;

use crate::support::{Named, Rng, filled};

const STEPS: usize = 10;

/// A job: what is trained, how it is distributed, and how close it must come.
#[derive(Debug, Clone)]
pub struct Case {
    pub config: MoeConfig,
    pub layers: usize,
    pub mode: Mode,
    /// Shares of `d_ff`.
    pub split: Vec<f64>,
    /// Tokens of each rank.
    pub tokens: Vec<usize>,
    pub shared_cache: bool,
    /// Relative error of outputs and gradients.
    pub tolerance: f64,
}

/// Layers with residual connections behind a dense one.
#[derive(Module, Debug)]
pub struct Net<B: Backend> {
    dense: Linear<B>,
    pub layers: Vec<Moe<B>>,
}

impl<B: ExpertOps> Net<B> {
    pub fn new(config: &MoeConfig, layers: usize) -> Self {
        Self::on(config, layers, &B::Device::default())
    }

    fn on(config: &MoeConfig, layers: usize, device: &B::Device) -> Self {
        let net = Self {
            dense: LinearConfig::new(config.d_model, config.d_model).init(device),
            layers: (0..layers)
                .map(|_| config.init(device).unwrap().without_noise())
                .collect(),
        };
        filled(net, 77).0
    }

    pub fn parallel(self, context: &ParallelContext, mode: Mode, widths: &[usize]) -> Self {
        let layers = self.layers.into_iter().enumerate().map(|(i, moe)| {
            parallelize(moe, context, i, mode, widths.to_vec()).expect("a valid split")
        });
        Self {
            layers: layers.collect(),
            dense: self.dense,
        }
    }

    pub fn forward(&self, x: Tensor<B, 2>) -> Result<Forward<B>, String> {
        // Burn's own product may round to TF32 on CUDA.
        let (weight, bias) = (self.dense.weight.val(), &self.dense.bias);
        let bias = bias.as_ref().map(|bias| bias.val());
        let mut x = hexa_ops::linear(x, weight, bias, MatmulPrecision::Strict)
            .map_err(|e| e.to_string())?;
        let mut aux_loss = Vec::new();
        let mut load = Vec::new();
        for (i, layer) in self.layers.iter().enumerate() {
            // Every other layer's gather starts early, as a model would do before attention.
            if i % 2 == 1 {
                layer.prefetch().map_err(|e| e.to_string())?;
            }
            let out = layer.try_forward(x.clone()).map_err(|e| e.to_string())?;
            x = x + out.output;
            aux_loss.push(out.aux_loss);
            load.push(out.load.read().map_err(|e| e.to_string())?);
        }
        let aux_loss = aux_loss.into_iter().reduce(|a, b| a + b).unwrap();
        Ok(Forward {
            output: x,
            aux_loss,
            load,
        })
    }
}

pub struct Forward<B: Backend> {
    output: Tensor<B, 2>,
    aux_loss: Tensor<B, 1>,
    load: Vec<LoadReport>,
}

/// Mean over samples of the squared error.
fn task_loss<B: Backend>(output: Tensor<B, 2>, target: Tensor<B, 2>) -> Tensor<B, 1> {
    let samples = output.dims()[0] as f64;
    let error = output - target;
    (error.clone() * error).sum() / samples
}

/// What one run computed: of the first step everything, of the others the loss.
struct Run {
    output: Vec<f64>,
    grad_x: Vec<f64>,
    load: Vec<LoadReport>,
    grads: Named,
    squared_norm: f64,
    losses: Vec<f64>,
}

struct Data {
    x: Vec<f64>,
    target: Vec<f64>,
}

fn rows<B: Backend>(values: &[f64], width: usize, device: &B::Device) -> Tensor<B, 2> {
    let data = TensorData::new(values.to_vec(), [values.len() / width, width]).convert::<f32>();
    Tensor::from_data(data, device)
}

/// Trains `net` on `data`, alone or as a rank of `context`.
fn train<B: TrainingBackend>(
    mut net: Net<B>,
    data: &Data,
    width: usize,
    context: Option<&ParallelContext>,
) -> Result<Run, String> {
    let mut optimizer = AdamConfig::new().init();
    let samples = data.x.len() / width;
    let mut first: Option<Run> = None;
    let mut losses = Vec::new();
    let device = net.dense.weight.device();
    for _ in 0..STEPS {
        let x = rows::<B>(&data.x, width, &device).require_grad();
        let out = net.forward(x.clone())?;
        let share = match context {
            Some(context) => BatchShare::exchange(context, samples).map_err(|e| e.to_string())?,
            None => BatchShare {
                local: samples,
                global: samples,
            },
        };
        let loss = if samples > 0 {
            let task = task_loss(out.output.clone(), rows::<B>(&data.target, width, &device));
            share.weigh(task) + out.aux_loss.clone()
        } else {
            out.aux_loss.clone()
        };
        let aux = host(out.aux_loss.clone())[0];
        let own = host(loss.clone())[0] - aux;
        losses.push(match context {
            Some(context) => {
                let sum = context.comm().all_reduce("task loss", vec![own as f32]);
                f64::from(sum.map_err(|e| e.to_string())?[0]) + aux
            }
            None => own + aux,
        });
        let mut grads = loss.backward();
        let grad_x = if samples > 0 {
            host(x.grad(&grads).unwrap())
        } else {
            Vec::new()
        };
        let mut params = GradientsParams::from_module(&mut grads, &net);
        if let Some(context) = context {
            exchange_gradients(context, &net, &mut params).map_err(|e| e.to_string())?;
        }
        if first.is_none() {
            let grads = named_gradients(&net, &params);
            let squared_norm = match context {
                Some(context) => {
                    global_squared_norm(context, &net, &params).map_err(|e| e.to_string())?
                }
                None => grads.values().flatten().map(|g| g * g).sum(),
            };
            first = Some(Run {
                output: host(out.output),
                grad_x,
                load: out.load,
                grads,
                squared_norm,
                losses: Vec::new(),
            });
        }
        net = optimizer.step(0.01, net, params);
    }
    let mut run = first.unwrap();
    run.losses = losses;
    Ok(run)
}

fn named_gradients<B: TrainingBackend>(net: &Net<B>, grads: &GradientsParams) -> Named {
    struct Visitor<'a> {
        path: Vec<String>,
        grads: &'a GradientsParams,
        named: Named,
    }
    impl<B: TrainingBackend> ModuleVisitor<B> for Visitor<'_> {
        fn enter_module(&mut self, name: &str, _container: &str) {
            self.path.push(name.to_owned());
        }
        fn exit_module(&mut self, _name: &str, _container: &str) {
            self.path.pop();
        }
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
            if let Some(grad) = self.grads.get::<B::InnerBackend, D>(param.id) {
                let values = if grad.shape().num_elements() > 0 {
                    host(grad)
                } else {
                    Vec::new()
                };
                self.named.insert(self.path.join("."), values);
            }
        }
    }
    let mut visitor = Visitor {
        path: Vec::new(),
        grads,
        named: Named::new(),
    };
    net.visit(&mut visitor);
    visitor.named
}

/// This rank's slices of whole gradients.
fn slice_gradients(case: &Case, shards: &ExpertShards, rank: usize, whole: &Named) -> Named {
    let mut named = whole.clone();
    let f32s = |values: &[f64]| values.iter().map(|&v| v as f32).collect::<Vec<f32>>();
    let f64s = |values: Vec<f32>| values.into_iter().map(f64::from).collect::<Vec<f64>>();
    for layer in 0..case.layers {
        let name = |param: &str| format!("layers.{layer}.experts.{param}");
        let b1 = whole.get(&name("b1")).map_or(&[][..], Vec::as_slice);
        let part = shards.slice(
            rank,
            &HostExperts {
                w1: f32s(&whole[&name("w1")]),
                b1: f32s(b1),
                w2: f32s(&whole[&name("w2")]),
            },
        );
        named.insert(name("w1"), f64s(part.w1));
        named.insert(name("w2"), f64s(part.w2));
        if shards.has_b1 {
            named.insert(name("b1"), f64s(part.b1));
        }
    }
    named
}

fn near(name: &str, got: &[f64], want: &[f64], bound: f64) -> Result<(), String> {
    if got.len() != want.len() {
        return Err(format!(
            "{name}: {} elements, not {}",
            got.len(),
            want.len()
        ));
    }
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    let difference = norm(&mut got.iter().zip(want).map(|(g, w)| g - w));
    // A gradient that nearly vanishes is a sum that cancels: its rounding is that of the addends.
    let scale = norm(&mut want.iter().copied()).max(1e-2 * (want.len() as f64).sqrt());
    // Written so that NaN fails.
    if difference <= bound * scale {
        return Ok(());
    }
    let error = difference / scale;
    Err(format!(
        "{name}: relative error {error:e} > {bound:e}\n{got:?}\n{want:?}"
    ))
}

/// Runs one rank of the job and compares it; the error says what differs.
///
/// `R` is this rank's back-end, `S` that of the single device.
pub fn check<R: TrainingBackend, S: TrainingBackend>(
    comm: impl Communicator + 'static,
    case: &Case,
) -> Result<(), String> {
    check_on::<R, S>(comm, case, &R::Device::default())
}

/// [`check`] with the rank on this device.
pub fn check_on<R: TrainingBackend, S: TrainingBackend>(
    comm: impl Communicator + 'static,
    case: &Case,
    device: &R::Device,
) -> Result<(), String> {
    let width = case.config.d_model;
    let tokens: usize = case.tokens.iter().sum();
    let mut rng = Rng::new(5);
    let data = Data {
        x: rng.vec(tokens * width),
        target: rng.vec(tokens * width),
    };
    let whole = train(Net::<S>::new(&case.config, case.layers), &data, width, None)?;

    let rank = comm.rank();
    let start = case.tokens[..rank].iter().sum::<usize>() * width;
    let own = start..start + case.tokens[rank] * width;
    let widths = split_proportional(case.config.d_ff, &case.split, 1).map_err(|e| e.to_string())?;
    let context = ParallelContext::with_cache(comm, case.shared_cache);
    let net = Net::<R>::on(&case.config, case.layers, device);
    let net = net.parallel(&context, case.mode, &widths);
    let shards = net.layers[0].parallel.as_ref().unwrap().shards.clone();
    round_trip(&net, &case.config, case.layers)?;
    let part = Data {
        x: data.x[own.clone()].to_vec(),
        target: data.target[own.clone()].to_vec(),
    };
    let run = train(net, &part, width, Some(&context))?;

    near(
        "output",
        &run.output,
        &whole.output[own.clone()],
        case.tolerance,
    )?;
    near(
        "gradient of x",
        &run.grad_x,
        &whole.grad_x[own],
        case.tolerance,
    )?;
    for (got, want) in run.load.iter().zip(&whole.load) {
        if got.tokens_per_expert != want.tokens_per_expert {
            return Err(format!("load {got:?}, not {want:?}"));
        }
        let means = |report: &LoadReport| {
            let router = report.router.ok_or("no router means")?;
            Ok::<_, String>([router.entropy_nats, router.gate_weight, router.z])
        };
        near("router means", &means(got)?, &means(want)?, 1e-5)?;
    }
    let want = slice_gradients(case, &shards, rank, &whole.grads);
    if run.grads.keys().ne(want.keys()) {
        return Err(format!(
            "gradients of {:?}, not {:?}",
            run.grads.keys(),
            want.keys()
        ));
    }
    for (name, want) in &want {
        near(name, &run.grads[name], want, case.tolerance)?;
    }
    near(
        "squared norm",
        &[run.squared_norm],
        &[whole.squared_norm],
        10.0 * case.tolerance,
    )?;
    near(
        "first loss",
        &run.losses[..1],
        &whole.losses[..1],
        case.tolerance,
    )?;
    near("losses", &run.losses, &whole.losses, 1e-4)?;
    Ok(())
}

/// Gathering the slices gives back the layer that was distributed, to the bit.
fn round_trip<B: TrainingBackend>(
    net: &Net<B>,
    config: &MoeConfig,
    layers: usize,
) -> Result<(), String> {
    let device = net.dense.weight.device();
    let original = Net::<B>::on(config, layers, &device).valid();
    for (slices, original) in net.valid().layers.into_iter().zip(original.layers) {
        let whole = gather_experts(slices).map_err(|e| e.to_string())?.experts;
        let original = original.experts;
        if host(whole.w1.val()) != host(original.w1.val())
            || host(whole.w2.val()) != host(original.w2.val())
            || whole.b1.map(|b| host(b.val())) != original.b1.map(|b| host(b.val()))
        {
            return Err("gathered experts differ from the distributed ones".to_owned());
        }
    }
    Ok(())
}

/// The jobs that are checked for `ranks` ranks: both modes, even and uneven splits of weights and
/// tokens, top-k 1 and 2.
pub fn cases(ranks: usize) -> Vec<Case> {
    use hexa_moe::{Activation, BalanceConfig};
    let uneven = [5.0, 2.0, 1.0, 3.0];
    let splits = [
        vec![1.0; ranks],
        uneven[..ranks].to_vec(),
        // All on the first rank: 1:0.
        (0..ranks)
            .map(|rank| f64::from(u8::from(rank == 0)))
            .collect(),
    ];
    let tokens = [
        vec![4; ranks],
        (0..ranks).map(|rank| 3 + 4 * rank).collect::<Vec<_>>(),
        // The last rank has none, if there are several.
        (0..ranks)
            .map(|rank| {
                if rank > 0 && rank == ranks - 1 {
                    0
                } else {
                    7 + rank
                }
            })
            .collect(),
    ];
    let all_losses = BalanceConfig {
        gshard: 0.3,
        load_importance: 0.2,
        z_loss: 0.1,
    };
    let base = MoeConfig::new(5, 11, 4).with_balance(all_losses);
    let configs = [
        base.clone(),
        base.clone()
            .with_top_k(2)
            .with_normalize_gate(true)
            .with_activation(Activation::SwiGlu)
            .with_shared_d_ff(3),
        base.with_top_k(2)
            .with_bias(ranks % 2 == 1)
            .with_train_fc2_bias(false)
            .with_balance(BalanceConfig::NONE),
    ];
    let mut cases = Vec::new();
    for mode in [Mode::DataCentric, Mode::ModelCentric] {
        for (i, split) in splits.iter().enumerate() {
            for (j, tokens) in tokens.iter().enumerate() {
                cases.push(Case {
                    config: configs[(i + j) % configs.len()].clone(),
                    layers: 1 + (i + 2 * j) % 3,
                    mode,
                    split: split.clone(),
                    tokens: tokens.clone(),
                    shared_cache: (i + j) % 4 != 3,
                    tolerance: 1e-5,
                });
            }
        }
    }
    cases
}

impl<B: Backend> Forward<B> {
    /// A loss of everything.
    pub fn loss(self) -> Tensor<B, 1> {
        self.output.sum() + self.aux_loss
    }
}
