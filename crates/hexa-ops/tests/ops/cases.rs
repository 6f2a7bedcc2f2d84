//! Random problems: shapes from proptest, so that failures shrink; numbers from a small generator
//! of their own, so that shrinking a shape is cheap.

use burn::tensor::backend::Backend;
use burn::tensor::{Int, Tensor, TensorData};
use hexa_ops::host::{download, upload};
use hexa_ops::testing::backend::{TestBackend, skip};
use hexa_ops::testing::oracle::Routing;
use proptest::prelude::*;
use proptest::test_runner::{Config, RngSeed, TestCaseError, TestRunner};

/// What a property returns: any error of the operators or of a comparison fails it.
pub type Outcome = Result<(), TestCaseError>;

/// Shapes to try for each group of operators, on every back-end.
///
/// [`check`] tries a quarter of them with fusion, which orders the same kernels' launches.
pub const CASES: u32 = 200;

/// As many cases of what is not a comparison with the oracle, or a quarter of them on an emulated
/// device.
pub fn fewer(cases: u32) -> u32 {
    let small = TestBackend::selected().is_ok_and(TestBackend::prefers_small_shapes);
    if small { cases / 4 } else { cases }
}

/// Runs a property over random cases, the same ones in each run.
///
/// `PROPTEST_RNG_SEED` and `PROPTEST_CASES` ask for others and for more.
pub fn check<S>(cases: u32, strategy: S, property: impl Fn(S::Value) -> Outcome)
where
    S: Strategy,
{
    let mut config = Config {
        failure_persistence: None,
        max_shrink_iters: 256,
        ..Config::default()
    };
    if std::env::var_os("PROPTEST_RNG_SEED").is_none() {
        config.rng_seed = RngSeed::Fixed(0x4845_5841);
    }
    if std::env::var_os("PROPTEST_CASES").is_none() {
        let fused = TestBackend::selected().is_ok_and(TestBackend::is_fused);
        config.cases = if fused { cases.div_ceil(4) } else { cases };
    }
    if let Err(failure) = TestRunner::new(config).run(&strategy, property) {
        panic!("{failure}");
    }
}

/// A pseudo-random sequence (SplitMix64).
pub struct Numbers(u64);

impl Numbers {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    /// In `[-1, 1)`, with 21 bits: exact in f32, so that f64 oracle and f32 kernel start from the
    /// same number.
    pub fn value(&mut self) -> f64 {
        (self.next() >> 43) as f64 / f64::from(1_u32 << 20) - 1.0
    }

    pub fn values(&mut self, len: usize) -> Vec<f64> {
        (0..len).map(|_| self.value()).collect()
    }
}

/// How the tokens are spread over the experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Spread {
    /// Each token's experts are different ones, as a router chooses them.
    Distinct,
    /// Any expert for any slot.
    Free,
    /// All slots on one expert.
    One,
    /// Only experts of even number.
    Even,
}

/// A routing to be drawn.
#[derive(Debug, Clone)]
pub struct RoutingCase {
    pub tokens: usize,
    pub top_k: usize,
    pub num_experts: usize,
    pub spread: Spread,
    pub seed: u64,
}

impl RoutingCase {
    pub fn routing(&self) -> Routing {
        let mut numbers = Numbers::new(self.seed);
        let one = numbers.below(self.num_experts);
        let mut ids = Vec::with_capacity(self.tokens * self.top_k);
        for _ in 0..self.tokens {
            let mut free: Vec<usize> = (0..self.num_experts).collect();
            for _ in 0..self.top_k {
                ids.push(match self.spread {
                    Spread::Distinct => free.swap_remove(numbers.below(free.len())),
                    Spread::Free => numbers.below(self.num_experts),
                    Spread::One => one,
                    Spread::Even => 2 * numbers.below(self.num_experts.div_ceil(2)),
                });
            }
        }
        Routing::new(self.tokens, self.top_k, self.num_experts, ids)
    }
}

/// Whether Burn's own operations take tensors without elements here, and if not, a printed skip.
///
/// CubeCL 0.10 launches them with no cubes, which CUDA refuses; all later work then fails. The
/// operators' kernels take no tokens on CUDA too: `kernels_mm` and `kernels_misc` call them without
/// Burn's operations around them.
pub fn burn_takes_no_elements(test: &str) -> bool {
    let is_cuda = matches!(
        TestBackend::selected(),
        Ok(TestBackend::Cuda | TestBackend::FusionCuda)
    );
    if is_cuda {
        skip(
            test,
            "Burn's operations fail on CUDA for tensors without elements",
        );
    }
    !is_cuda
}

/// Fewest tokens of random cases: none where everything takes none.
pub fn fewest_tokens() -> usize {
    usize::from(!burn_takes_no_elements("random cases without tokens"))
}

/// Routings of up to `most` tokens, the awkward ones often: none, one, all experts chosen.
pub fn routing_case(most: usize) -> impl Strategy<Value = RoutingCase> {
    let tokens = prop_oneof![
        1 => Just(fewest_tokens()),
        2 => Just(1),
        6 => 2..=most.min(24),
        3 => most.min(24)..=most,
    ];
    let experts = prop_oneof![1 => Just(1_usize), 5 => 2..=9_usize, 1 => 10..=19_usize];
    let experts_and_k = experts.prop_flat_map(|num_experts| {
        let top_k = prop_oneof![
            5 => 1..=num_experts.min(3),
            1 => Just(num_experts),
        ];
        (Just(num_experts), top_k)
    });
    let spread = prop_oneof![
        4 => Just(Spread::Distinct),
        2 => Just(Spread::Free),
        1 => Just(Spread::One),
        1 => Just(Spread::Even),
    ];
    (tokens, experts_and_k, spread, any::<u64>()).prop_map(
        |(tokens, (num_experts, top_k), spread, seed)| RoutingCase {
            tokens,
            top_k,
            num_experts,
            spread,
            seed,
        },
    )
}

/// Tokens in the largest cases: several tiles of the matmul kernels.
pub fn most_tokens() -> usize {
    let small = TestBackend::selected().is_ok_and(TestBackend::prefers_small_shapes);
    if small { 97 } else { 211 }
}

/// Widths: one, primes, powers of two and their neighbours.
pub fn width() -> impl Strategy<Value = usize> {
    prop::sample::select(vec![1_usize, 2, 3, 4, 5, 7, 8, 11, 13, 16, 17, 24, 31, 33])
}

/// How a tensor's elements lie in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    Contiguous,
    /// The last two axes are exchanged in memory.
    Transposed,
    /// A window of a larger tensor, whose other elements are not a number.
    Sliced,
}

pub fn layout() -> impl Strategy<Value = Layout> {
    prop_oneof![
        2 => Just(Layout::Contiguous),
        1 => Just(Layout::Transposed),
        1 => Just(Layout::Sliced),
    ]
}

/// A float tensor of the back-end's default type.
pub fn tensor<B: Backend, const D: usize>(values: &[f64], shape: [usize; D]) -> Tensor<B, D> {
    let device = B::Device::default();
    let values: Vec<f32> = values.iter().map(|&v| v as f32).collect();
    upload(TensorData::new(values, shape), &device)
}

/// A float tensor of rank two or more that is laid out as asked.
pub fn laid_out<B: Backend, const D: usize>(
    values: &[f64],
    shape: [usize; D],
    layout: Layout,
) -> Tensor<B, D> {
    if values.is_empty() {
        return tensor(values, shape);
    }
    let (rows, columns) = (shape[D - 2], shape[D - 1]);
    match layout {
        Layout::Contiguous => tensor(values, shape),
        Layout::Transposed => {
            let mut stored = vec![0.0; values.len()];
            for (i, &value) in values.iter().enumerate() {
                let (matrix, at) = (i / (rows * columns), i % (rows * columns));
                let (row, column) = (at / columns, at % columns);
                stored[matrix * rows * columns + column * rows + row] = value;
            }
            let mut stored_shape = shape;
            stored_shape.swap(D - 2, D - 1);
            tensor::<B, D>(&stored, stored_shape).swap_dims(D - 2, D - 1)
        }
        Layout::Sliced => {
            let mut stored_shape = shape;
            stored_shape[D - 2] += 2;
            stored_shape[D - 1] += 3;
            let mut stored = vec![f64::NAN; stored_shape.iter().product()];
            for (i, &value) in values.iter().enumerate() {
                let (matrix, at) = (i / (rows * columns), i % (rows * columns));
                let (row, column) = (at / columns + 1, at % columns + 2);
                stored[(matrix * (rows + 2) + row) * (columns + 3) + column] = value;
            }
            let window = core::array::from_fn::<_, D, _>(|axis| {
                let start = match D - axis {
                    1 => 2,
                    2 => 1,
                    _ => 0,
                };
                start..start + shape[axis]
            });
            tensor::<B, D>(&stored, stored_shape).slice(window)
        }
    }
}

/// The expert ids of a routing: `[tokens, top_k]`.
pub fn expert_ids<B: Backend>(routing: &Routing) -> Tensor<B, 2, Int> {
    let ids: Vec<i32> = routing.expert_ids.iter().map(|&id| id as i32).collect();
    upload(
        TensorData::new(ids, [routing.tokens, routing.top_k]),
        &B::Device::default(),
    )
}

/// An integer tensor's elements.
pub fn integers<B: Backend, const D: usize>(tensor: Tensor<B, D, Int>) -> Vec<usize> {
    download(tensor)
        .unwrap()
        .iter::<i64>()
        .map(|v| usize::try_from(v).expect("indices are not negative"))
        .collect()
}

/// A dropout seed: two words, as the bits of two integers.
pub fn seed_tensor<B: Backend>(seed: [u32; 2]) -> Tensor<B, 1, Int> {
    let words: Vec<i32> = seed.iter().map(|&w| w as i32).collect();
    Tensor::from_data(TensorData::new(words, [2]), &B::Device::default())
}

/// Whether two tensors have the same bits.
pub fn same_bits<B: Backend, const D: usize>(a: Tensor<B, D>, b: Tensor<B, D>) -> bool {
    let (a, b) = (download(a).unwrap(), download(b).unwrap());
    a.shape == b.shape && a.dtype == b.dtype && a.as_bytes() == b.as_bytes()
}
