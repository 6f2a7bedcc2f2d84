//! What the operators refuse, each with its own error, before anything is launched.

use burn::tensor::backend::Backend;
use burn::tensor::{DType, Int, Tensor, TensorData};
use hexa_ops::host::upload;
use hexa_ops::{
    Activation, EsmmOptions, ExpertIndex, ExpertParams, FfnOptions, MatmulPrecision, OpsError,
    Result, RowOrder, TrainingBackend, backend_test, esmm, ess, estmm, expert_ffn, linear, matmul,
    topk_gating,
};

use crate::cases::seed_tensor;

const TOKENS: usize = 5;
const TOP_K: usize = 2;
const EXPERTS: usize = 3;
const D_MODEL: usize = 4;
const D_FF: usize = 6;

fn zeros<B: Backend, const D: usize>(shape: [usize; D]) -> Tensor<B, D> {
    upload(TensorData::zeros::<f32, _>(shape), &B::Device::default())
}

/// A tensor of another element type than the default, uploaded as such.
fn of_other_type<B: Backend, const D: usize>(shape: [usize; D]) -> Tensor<B, D> {
    let data = TensorData::zeros::<f32, _>(shape).convert_dtype(DType::F16);
    upload(data, (&B::Device::default(), DType::F16))
}

fn ids<B: Backend>(ids: Vec<i32>, top_k: usize) -> Tensor<B, 2, Int> {
    let tokens = ids.len() / top_k;
    upload(TensorData::new(ids, [tokens, top_k]), &B::Device::default())
}

fn index<B: TrainingBackend>() -> ExpertIndex<B> {
    ExpertIndex::new(ids(vec![0, 1, 2, 0, 1, 2, 0, 1, 2, 0], TOP_K), EXPERTS)
        .expect("the ids are in range")
}

/// The error's message must say more than that something is wrong.
#[track_caller]
fn refuse<T>(result: Result<T>) -> OpsError {
    match result {
        Ok(_) => panic!("the operator accepted it"),
        Err(error) => {
            let message = error.to_string();
            assert!(message.len() > 20, "{message}");
            error
        }
    }
}

#[track_caller]
fn refuse_shape<T>(result: Result<T>, op: &str, tensor: &str, got: &[usize]) {
    match refuse(result) {
        OpsError::Shape {
            op: o,
            tensor: t,
            got: g,
            ..
        } => assert_eq!((o, t, g.as_slice()), (op, tensor, got)),
        other => panic!("{other:?}"),
    }
}

#[track_caller]
fn refuse_dtype<T>(result: Result<T>, op: &str, tensor: &str) {
    match refuse(result) {
        OpsError::DType {
            op: o,
            tensor: t,
            got,
            ..
        } => assert_eq!((o, t, got), (op, tensor, DType::F16)),
        other => panic!("{other:?}"),
    }
}

#[track_caller]
fn refuse_value<T>(result: Result<T>, name: &str) {
    match refuse(result) {
        OpsError::Value { name: n, .. } => assert_eq!(n, name),
        other => panic!("{other:?}"),
    }
}

fn expert_ids_out_of_range<B: TrainingBackend>() {
    for bad in [3, -1, 99, i32::MIN, i32::MAX] {
        let result = ExpertIndex::<B>::new(ids(vec![0, 1, 2, 0, 1, bad, 0, 1], TOP_K), EXPERTS);
        assert_eq!(
            refuse(result),
            OpsError::ExpertId {
                token: 2,
                choice: 1,
                got: bad.into(),
                num_experts: EXPERTS,
            }
        );
    }
}

fn choices_out_of_range<B: TrainingBackend>() {
    for (top_k, num_experts) in [(0, 3), (4, 3), (1, 0), (usize::MAX, 3)] {
        let result = topk_gating(zeros::<B, 2>([TOKENS, num_experts]), top_k, true);
        assert_eq!(refuse(result), OpsError::TopK { top_k, num_experts });
    }
    let result = ExpertIndex::<B>::new(ids(vec![0, 0, 0, 0], 4), EXPERTS);
    let expected = OpsError::TopK {
        top_k: 4,
        num_experts: EXPERTS,
    };
    assert_eq!(refuse(result), expected);
}

/// Valid arguments of the FFN, one of which each test spoils.
struct FfnArguments<B: TrainingBackend> {
    x: Tensor<B, 2>,
    gates: Tensor<B, 2>,
    params: ExpertParams<B>,
    options: FfnOptions,
    seed: Option<Tensor<B, 1, Int>>,
}

impl<B: TrainingBackend> FfnArguments<B> {
    fn valid() -> Self {
        Self {
            x: zeros([TOKENS, D_MODEL]),
            gates: zeros([TOKENS, TOP_K]),
            params: ExpertParams {
                w1: zeros([EXPERTS, D_MODEL, D_FF]),
                b1: Some(zeros([EXPERTS, D_FF])),
                w2: zeros([EXPERTS, D_FF, D_MODEL]),
                b2: Some(zeros([EXPERTS, D_MODEL])),
            },
            options: FfnOptions::default(),
            seed: Some(seed_tensor([1, 2])),
        }
    }

    fn call(spoil: impl FnOnce(&mut Self)) -> Result<Tensor<B, 2>> {
        let mut arguments = Self::valid();
        spoil(&mut arguments);
        let Self {
            x,
            gates,
            params,
            options,
            seed,
        } = arguments;
        expert_ffn(x, gates, params, &index(), options, seed)
    }
}

fn ffn_shapes<B: TrainingBackend>() {
    type Ffn<B> = FfnArguments<B>;
    let op = "expert_ffn";
    assert!(Ffn::<B>::call(|_| ()).is_ok());
    let result = Ffn::<B>::call(|a| a.x = zeros([TOKENS + 1, D_MODEL]));
    refuse_shape(result, op, "x", &[6, 4]);
    let result = Ffn::<B>::call(|a| a.gates = zeros([TOKENS, TOP_K + 1]));
    refuse_shape(result, op, "gate_weights", &[5, 3]);
    let result = Ffn::<B>::call(|a| a.gates = zeros([TOP_K, TOKENS]));
    refuse_shape(result, op, "gate_weights", &[2, 5]);
    for shape in [[EXPERTS + 1, 4, 6], [EXPERTS, 6, 4], [EXPERTS, 4, 12]] {
        let result = Ffn::<B>::call(|a| a.params.w1 = zeros(shape));
        refuse_shape(result, op, "w1", &shape);
    }
    for shape in [[EXPERTS - 1, 6, 4], [EXPERTS, 6, 5]] {
        let result = Ffn::<B>::call(|a| a.params.w2 = zeros(shape));
        refuse_shape(result, op, "w2", &shape);
    }
    let result = Ffn::<B>::call(|a| a.params.b1 = Some(zeros([EXPERTS, D_MODEL])));
    refuse_shape(result, op, "b1", &[3, 4]);
    let result = Ffn::<B>::call(|a| a.params.b2 = Some(zeros([EXPERTS, D_FF])));
    refuse_shape(result, op, "b2", &[3, 6]);
    for activation in [Activation::SwiGlu, Activation::GeGlu] {
        let result = Ffn::<B>::call(|a| a.options.activation = activation);
        refuse_shape(result, op, "w1", &[3, 4, 6]);
    }
    let result = Ffn::<B>::call(|a| {
        a.options.dropout = 0.5;
        a.seed = Some(Tensor::zeros([3], &B::Device::default()));
    });
    refuse_shape(result, op, "dropout_seed", &[3]);
}

fn ffn_types<B: TrainingBackend>() {
    type Ffn<B> = FfnArguments<B>;
    let op = "expert_ffn";
    let result = Ffn::<B>::call(|a| a.gates = of_other_type([TOKENS, TOP_K]));
    refuse_dtype(result, op, "gate_weights");
    let result = Ffn::<B>::call(|a| a.params.w1 = of_other_type([EXPERTS, D_MODEL, D_FF]));
    refuse_dtype(result, op, "w1");
    let result = Ffn::<B>::call(|a| a.params.w2 = of_other_type([EXPERTS, D_FF, D_MODEL]));
    refuse_dtype(result, op, "w2");
    let result = Ffn::<B>::call(|a| a.params.b1 = Some(of_other_type([EXPERTS, D_FF])));
    refuse_dtype(result, op, "b1");
    let result = Ffn::<B>::call(|a| a.params.b2 = Some(of_other_type([EXPERTS, D_MODEL])));
    refuse_dtype(result, op, "b2");
}

fn ffn_dropout<B: TrainingBackend>() {
    for bad in [-0.1, 1.0, 1.5, f32::NAN, f32::INFINITY] {
        let result = FfnArguments::<B>::call(|a| a.options.dropout = bad);
        refuse_value(result, "dropout");
    }
    let result = FfnArguments::<B>::call(|a| {
        a.options.dropout = 0.1;
        a.seed = None;
    });
    refuse_value(result, "dropout_seed");
}

fn operators<B: TrainingBackend>() {
    let index = index::<B>();
    let options = EsmmOptions::default();
    let x = || zeros::<B, 2>([TOKENS, D_MODEL]);
    let w = || zeros::<B, 3>([EXPERTS, D_MODEL, D_FF]);

    let slots = zeros::<B, 2>([TOKENS * TOP_K, D_MODEL]);
    refuse_shape(
        esmm(slots, w(), None, &index, options),
        "esmm",
        "x",
        &[10, 4],
    );
    let wide = zeros::<B, 2>([TOKENS, D_FF]);
    refuse_shape(esmm(wide, w(), None, &index, options), "esmm", "x", &[5, 6]);
    let few = zeros::<B, 3>([EXPERTS - 1, D_MODEL, D_FF]);
    refuse_shape(
        esmm(x(), few, None, &index, options),
        "esmm",
        "w",
        &[2, 4, 6],
    );
    let bias = Some(zeros([EXPERTS, D_MODEL]));
    refuse_shape(
        esmm(x(), w(), bias, &index, options),
        "esmm",
        "bias",
        &[3, 4],
    );
    let transposed = EsmmOptions {
        transposed: true,
        ..options
    };
    refuse_shape(
        esmm(x(), w(), None, &index, transposed),
        "esmm",
        "x",
        &[5, 4],
    );
    let half = of_other_type([EXPERTS, D_MODEL, D_FF]);
    refuse_dtype(esmm(x(), half, None, &index, options), "esmm", "w");
    let by_token = EsmmOptions {
        out_order: RowOrder::Token,
        ..options
    };
    refuse_value(esmm(x(), w(), None, &index, by_token), "out_order");

    let (token, slot) = (RowOrder::Token, RowOrder::Slot);
    refuse_shape(estmm(x(), slot, x(), token, &index), "estmm", "a", &[5, 4]);
    refuse_shape(estmm(x(), token, x(), slot, &index), "estmm", "b", &[5, 4]);
    let half = of_other_type([TOKENS, D_MODEL]);
    refuse_dtype(estmm(x(), token, half, token, &index), "estmm", "b");
    refuse_shape(ess(x(), RowOrder::Expert, &index), "ess", "x", &[5, 4]);
}

fn dense<B: TrainingBackend>() {
    let strict = MatmulPrecision::Strict;
    let lhs = || zeros::<B, 3>([2, 5, 4]);
    for shape in [[2, 5, 4], [3, 4, 6], [1, 4, 6]] {
        refuse_shape(matmul(lhs(), zeros(shape), strict), "matmul", "rhs", &shape);
    }
    let half = of_other_type([2, 4, 6]);
    refuse_dtype(matmul(lhs(), half, strict), "matmul", "rhs");

    let x = || zeros::<B, 2>([5, 4]);
    let result = linear(x(), zeros([5, 6]), None, strict);
    assert!(matches!(refuse(result), OpsError::Shape { .. }));
    let result = linear(x(), zeros([4, 6]), Some(zeros([4])), strict);
    refuse_shape(result, "linear", "bias", &[4]);
    let result = linear(x(), zeros([4, 6]), Some(of_other_type([6])), strict);
    refuse_dtype(result, "linear", "bias");
}

backend_test!(refuses_expert_ids_out_of_range, expert_ids_out_of_range);
backend_test!(refuses_choices_out_of_range, choices_out_of_range);
backend_test!(refuses_ffn_shapes, ffn_shapes);
backend_test!(refuses_ffn_types, ffn_types);
backend_test!(refuses_ffn_dropout, ffn_dropout);
backend_test!(refuses_operands_of_operators, operators);
backend_test!(refuses_dense_operands, dense);
