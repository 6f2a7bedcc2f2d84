//! Layers with known parameters, and their gradients by name.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use burn::module::{AutodiffModule, Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::backend::{AutodiffBackend, Backend};
use burn::tensor::{Tensor, TensorData};
use hexa_moe::{ExpertOps, Moe, MoeConfig};
use hexa_ops::host::upload;
use hexa_ops::testing::compare::{host, relative_error};

/// Parameters, or their gradients, by path.
pub type Named = BTreeMap<String, Vec<f64>>;

/// A small generator of its own (SplitMix64), so that data depend on no back-end.
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    pub fn coin(&mut self) -> bool {
        self.below(2) == 1
    }

    /// A number in `-1.0..1.0` that f32 represents.
    pub fn signed(&mut self) -> f64 {
        (self.next() >> 40) as f64 / f64::from(1 << 23) - 1.0
    }

    pub fn vec(&mut self, len: usize) -> Vec<f64> {
        (0..len).map(|_| self.signed()).collect()
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

/// Keeps tests that draw from the back-end's generator, of which a process has one, apart.
pub fn generator_lock() -> MutexGuard<'static, ()> {
    static LOCK: Mutex<()> = Mutex::new(());
    LOCK.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A layer whose parameters come from `seed`, not from the back-end's generator, and their values.
pub fn layer<B: ExpertOps>(config: &MoeConfig, seed: u64) -> (Moe<B>, Named) {
    let moe = config
        .init::<B>(&B::Device::default())
        .expect("a valid configuration");
    filled(moe, seed)
}

/// A module whose parameters come from `seed`, and their values.
pub fn filled<B: Backend, M: Module<B>>(module: M, seed: u64) -> (M, Named) {
    let mut fill = Fill {
        path: Path::default(),
        rng: Rng::new(seed),
        values: Named::new(),
    };
    let module = module.map(&mut fill);
    (module, fill.values)
}

#[derive(Default)]
struct Path(Vec<String>);

impl Path {
    fn name(&self) -> String {
        self.0.join(".")
    }
}

struct Fill {
    path: Path,
    rng: Rng,
    values: Named,
}

impl<B: Backend> ModuleMapper<B> for Fill {
    fn enter_module(&mut self, name: &str, _container: &str) {
        self.path.0.push(name.to_owned());
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.0.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        let shape = param.lazy_shape();
        let values = self.rng.vec(shape.num_elements());
        let data = TensorData::new(values.clone(), shape).convert::<f32>();
        self.values.insert(self.path.name(), values);
        let tensor = Tensor::from_data(data, &param.lazy_device());
        let id = param.id;
        param.transform_for_load(tensor, id)
    }
}

/// Gradients of all parameters that have one, by path.
pub fn gradients<B, M>(module: &M, grads: &B::Gradients) -> Named
where
    B: AutodiffBackend,
    M: AutodiffModule<B>,
{
    let mut collect = Collect::<B> {
        path: Path::default(),
        grads,
        values: Named::new(),
    };
    module.visit(&mut collect);
    collect.values
}

struct Collect<'a, B: AutodiffBackend> {
    path: Path,
    grads: &'a B::Gradients,
    values: Named,
}

impl<B: AutodiffBackend> ModuleVisitor<B> for Collect<'_, B> {
    fn enter_module(&mut self, name: &str, _container: &str) {
        self.path.0.push(name.to_owned());
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.0.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        if let Some(grad) = param.val().grad(self.grads) {
            self.values.insert(self.path.name(), host(grad));
        }
    }
}

/// A tensor of these elements, in f32.
pub fn tensor<B: Backend, const D: usize>(values: &[f64], shape: [usize; D]) -> Tensor<B, D> {
    let data = TensorData::new(values.to_vec(), shape).convert::<f32>();
    upload(data, &B::Device::default())
}

/// Panics unless `‖got − want‖ <= bound · ‖want‖`, up to a floor for gradients that vanish.
pub fn assert_near(name: &str, got: &[f64], want: &[f64], bound: f64) {
    assert_eq!(got.len(), want.len(), "{name}: length");
    let norm = want.iter().map(|w| w * w).sum::<f64>().sqrt();
    let floor = 1e-2 * (want.len() as f64).sqrt();
    let error = relative_error(got, want)
        * if norm > 0.0 {
            norm / norm.max(floor)
        } else {
            1.0
        };
    // Written so that NaN fails.
    assert!(
        error <= bound,
        "{name}: relative error {error:e} > {bound:e}\n{got:?}\n{want:?}"
    );
}
