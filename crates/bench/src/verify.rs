//! A case against the f64 oracle, before it is timed.

use anyhow::{Context, Result, anyhow, ensure};
use burn::tensor::{DType, Int, Tensor};
use hexa_ops::testing::compare::{host, relative_error};
use hexa_ops::testing::oracle::{Ffn, FfnTensors, Routing};
use hexa_ops::{Activation, ExpertIndex, TrainingBackend, topk_gating};

use crate::case::{Inputs, Shape, leaf};

/// Largest relative error ‖a − b‖ / ‖b‖.
fn tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::BF16 | DType::F16 => 1e-2,
        _ => 1e-5,
    }
}

/// Tokens that are verified at most: the oracle is slow.
const TOKENS: usize = 67;

/// Multiplications of one of the six products that the oracle may take.
const WORK: usize = 1 << 26;

/// Elements of one weight stack that are compared at most: they are held in f64.
const ELEMENTS: usize = 1 << 25;

/// The case with its widths, and as many tokens and experts as the oracle can do.
fn reduced(shape: Shape) -> Shape {
    let matrix = shape.d_model * shape.d_ff;
    let experts = (ELEMENTS / matrix).max(shape.top_k).max(2);
    let tokens = (WORK / (matrix * shape.top_k)).clamp(2, TOKENS);
    Shape {
        tokens: shape.tokens.min(tokens),
        num_experts: shape.num_experts.min(experts),
        ..shape
    }
}

/// Verifies output and gradients at the case's widths.
///
/// # Errors
/// What differs, and by how much.
pub fn verify<B: TrainingBackend>(shape: Shape, dtype: DType, device: &B::Device) -> Result<()> {
    let shape = reduced(shape);
    let inputs = Inputs::<B>::random(shape, dtype, 0.0, device);
    let gating = topk_gating(inputs.logits.clone(), shape.top_k, true)?;
    let gates = leaf(gating.weights.clone(), dtype);
    let index = ExpertIndex::from_gating(&gating);
    let y = inputs.experts(gates.clone(), &index)?;
    let check =
        |what: &str, got: &[f64], expected: &[f64]| check(what, got, expected, tolerance(dtype));
    let oracle = Ffn {
        routing: routing(gating.expert_ids, shape),
        d_model: shape.d_model,
        d_ff: shape.d_ff,
        activation: Activation::Gelu,
        dropout: 0.0,
        dropout_seed: None,
    };
    let params = inputs.params.clone();
    let tensors = FfnTensors {
        x: host(inputs.x.clone()),
        gates: host(gates.clone()),
        w1: host(params.w1.clone()),
        b1: params.b1.clone().map(host),
        w2: host(params.w2.clone()),
        b2: params.b2.clone().map(host),
    };
    check("output", &host(y.clone()), &oracle.forward(&tensors))?;

    let upstream = vec![1.0; shape.tokens * shape.d_model];
    let expected = oracle.backward(&tensors, &upstream);
    let grads = y.sum().backward();
    let missing = || anyhow!("an operand has no gradient");
    let matrices = [
        ("x", Some(inputs.x), Some(expected.x)),
        ("gates", Some(gates), Some(expected.gates)),
        ("b1", params.b1, expected.b1),
        ("b2", params.b2, expected.b2),
    ];
    for (name, operand, expected) in matrices {
        if let (Some(operand), Some(expected)) = (operand, expected) {
            let grad = operand.grad(&grads).with_context(missing)?;
            check(&format!("gradient of {name}"), &host(grad), &expected)?;
        }
    }
    for (name, operand, expected) in [
        ("w1", params.w1, expected.w1),
        ("w2", params.w2, expected.w2),
    ] {
        let grad = operand.grad(&grads).with_context(missing)?;
        check(&format!("gradient of {name}"), &host(grad), &expected)?;
    }
    Ok(())
}

fn routing<B: TrainingBackend>(ids: Tensor<B, 2, Int>, shape: Shape) -> Routing {
    Routing {
        tokens: shape.tokens,
        top_k: shape.top_k,
        num_experts: shape.num_experts,
        expert_ids: ids.into_data().iter::<i64>().map(|e| e as usize).collect(),
    }
}

fn check(what: &str, got: &[f64], expected: &[f64], tolerance: f64) -> Result<()> {
    let error = relative_error(got, expected);
    ensure!(
        error <= tolerance,
        "{what} differs from the oracle by {error:e} (relative norm), allowed is {tolerance:e}"
    );
    Ok(())
}
