//! A case against the f64 oracle, before it is timed.

use std::collections::BTreeSet;

use anyhow::{Context, Result, anyhow, ensure};
use burn::tensor::{DType, Int, Tensor, TensorData};
use hexa_ops::testing::compare::{host, relative_error};
use hexa_ops::testing::oracle::{Ffn, FfnTensors, Routing};
use hexa_ops::{Activation, ExpertIndex, TrainingBackend, topk_gating};

use crate::case::{Inputs, Setting, Shape, leaf};

/// Largest relative error ‖a − b‖ / ‖b‖.
pub fn tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::BF16 | DType::F16 => 1e-2,
        _ => 1e-5,
    }
}

/// Tokens that are compared at most: the oracle is slow.
const TOKENS: usize = 67;

/// Multiplications of one of the six products that the oracle may take.
const WORK: usize = 1 << 26;

/// Elements of one weight stack that are compared at most: they are held in f64.
const ELEMENTS: usize = 1 << 25;

/// Distance between tokens that are tried one after the other, modulo their number; a prime.
const STRIDE: usize = 7919;

/// What the oracle computes: some tokens, and all experts that they chose. Both ascend.
#[derive(Debug, PartialEq, Eq)]
struct Sample {
    tokens: Vec<usize>,
    experts: Vec<usize>,
}

impl Sample {
    /// The last token and others all over the batch, as many as the oracle can do. `ids` are the
    /// experts of all tokens.
    fn of(ids: &[usize], shape: Shape) -> Self {
        let matrix = shape.d_model * shape.d_ff;
        let most_experts = (ELEMENTS / matrix).max(shape.top_k);
        let most_tokens = (WORK / (matrix * shape.top_k)).clamp(2, TOKENS);
        let (mut tokens, mut experts) = (BTreeSet::new(), BTreeSet::new());
        for i in 0..shape.tokens {
            let token = (shape.tokens - 1 + i * STRIDE) % shape.tokens;
            let chosen = &ids[token * shape.top_k..][..shape.top_k];
            let with: BTreeSet<usize> = experts.iter().chain(chosen).copied().collect();
            if tokens.len() < most_tokens && with.len() <= most_experts {
                tokens.insert(token);
                experts = with;
            }
        }
        Self {
            tokens: tokens.into_iter().collect(),
            experts: experts.into_iter().collect(),
        }
    }

    /// The tokens' choices, among the sample's experts.
    fn routing(&self, ids: &[usize], shape: Shape) -> Routing {
        let place = |expert| self.experts.partition_point(|&e| e < expert);
        let choices = |&token: &usize| &ids[token * shape.top_k..][..shape.top_k];
        Routing {
            tokens: self.tokens.len(),
            top_k: shape.top_k,
            num_experts: self.experts.len(),
            expert_ids: self
                .tokens
                .iter()
                .flat_map(choices)
                .map(|&e| place(e))
                .collect(),
        }
    }

    /// Gradient of the result in element `column` of a token: small whole numbers, exact in any type,
    /// and zero for tokens that the oracle does not compute.
    fn upstream(&self, token: usize, column: usize) -> f64 {
        match self.tokens.binary_search(&token) {
            Ok(_) => ((7 * token + 3 * column) % 5) as f64 - 2.0,
            Err(_) => 0.0,
        }
    }
}

/// Verifies the whole case: output and gradients of some tokens, and all gradients that come from
/// these tokens alone. What follows from the other tokens' rows is zero then, and must be.
///
/// # Errors
/// What differs, and by how much.
pub fn verify<B: TrainingBackend>(setting: Setting, device: &B::Device) -> Result<()> {
    let Setting { shape, dtype, .. } = setting;
    let inputs = Inputs::<B>::random(setting, device);
    let gating = topk_gating(inputs.logits.clone(), shape.top_k, true)?;
    let gates = leaf(gating.weights.clone(), dtype);
    let index = ExpertIndex::from_gating(&gating);
    let y = inputs.experts(gates.clone(), &index)?;

    let ids = gating.expert_ids.into_data();
    let ids: Vec<usize> = ids.iter::<i64>().map(|id| id as usize).collect();
    let sample = Sample::of(&ids, shape);
    let tokens = Rows::<B>::new(&sample.tokens, shape.tokens, device);
    let experts = Rows::<B>::new(&sample.experts, shape.num_experts, device);
    let oracle = Ffn {
        routing: sample.routing(&ids, shape),
        d_model: shape.d_model,
        d_ff: shape.d_ff,
        activation: Activation::Gelu,
        dropout: 0.0,
        dropout_seed: None,
    };
    let Inputs { x, params, .. } = inputs;
    let tensors = FfnTensors {
        x: tokens.chosen(x.clone().inner()),
        gates: tokens.chosen(gates.clone().inner()),
        w1: experts.chosen(params.w1.clone().inner()),
        b1: params.b1.clone().map(|b| experts.chosen(b.inner())),
        w2: experts.chosen(params.w2.clone().inner()),
        b2: params.b2.clone().map(|b| experts.chosen(b.inner())),
    };
    let allowed = tolerance(dtype);
    let output = tokens.chosen(y.clone().inner());
    close("output", &output, &oracle.forward(&tensors), allowed)?;

    let elements = |tokens: &mut dyn Iterator<Item = usize>| -> Vec<f64> {
        let columns = |token| (0..shape.d_model).map(move |column| (token, column));
        let places = tokens.flat_map(columns);
        places
            .map(|(token, column)| sample.upstream(token, column))
            .collect()
    };
    let expected = oracle.backward(&tensors, &elements(&mut sample.tokens.iter().copied()));
    let upstream = TensorData::new(
        elements(&mut (0..shape.tokens)),
        [shape.tokens, shape.d_model],
    );
    let upstream = Tensor::from_data(upstream, (device, dtype));
    let grads = (y * upstream).sum().backward();

    let missing = || anyhow!("an operand has no gradient");
    for (name, operand, rows, expected) in [
        ("x", Some(x), &tokens, Some(expected.x)),
        ("gates", Some(gates), &tokens, Some(expected.gates)),
        ("b1", params.b1, &experts, expected.b1),
        ("b2", params.b2, &experts, expected.b2),
    ] {
        if let (Some(operand), Some(expected)) = (operand, expected) {
            let grad = operand.grad(&grads).with_context(missing)?;
            rows.check(name, grad, &expected, allowed)?;
        }
    }
    for (name, operand, expected) in [
        ("w1", params.w1, expected.w1),
        ("w2", params.w2, expected.w2),
    ] {
        let grad = operand.grad(&grads).with_context(missing)?;
        experts.check(name, grad, &expected, allowed)?;
    }
    Ok(())
}

/// Some of the rows (matrices) of a tensor, and the others.
struct Rows<B: TrainingBackend> {
    chosen: Tensor<B::InnerBackend, 1, Int>,
    /// None if all are chosen.
    others: Option<Tensor<B::InnerBackend, 1, Int>>,
}

impl<B: TrainingBackend> Rows<B> {
    fn new(chosen: &[usize], len: usize, device: &B::Device) -> Self {
        let tensor = |rows: Vec<usize>| {
            let rows: Vec<i32> = rows.into_iter().map(|row| row as i32).collect();
            Tensor::from_data(TensorData::from(rows.as_slice()), device)
        };
        let others: Vec<usize> = (0..len).filter(|row| !chosen.contains(row)).collect();
        Self {
            chosen: tensor(chosen.to_vec()),
            others: Some(others).filter(|rows| !rows.is_empty()).map(tensor),
        }
    }

    fn chosen<const D: usize>(&self, tensor: Tensor<B::InnerBackend, D>) -> Vec<f64> {
        host(tensor.select(0, self.chosen.clone()))
    }

    /// Compares the chosen rows of a gradient; the others must be zero.
    fn check<const D: usize>(
        &self,
        name: &str,
        grad: Tensor<B::InnerBackend, D>,
        expected: &[f64],
        allowed: f64,
    ) -> Result<()> {
        let what = format!("gradient of {name}");
        close(&what, &self.chosen(grad.clone()), expected, allowed)?;
        if let Some(others) = self.others.clone() {
            let sum: f64 = host(grad.select(0, others).abs().sum())[0];
            ensure!(
                sum == 0.0,
                "{what} is not zero where no gradient came from, but {sum:e} in sum"
            );
        }
        Ok(())
    }
}

fn close(what: &str, got: &[f64], expected: &[f64], allowed: f64) -> Result<()> {
    let error = relative_error(got, expected);
    ensure!(
        error <= allowed,
        "{what} differs from the oracle by {error:e} (relative norm), allowed is {allowed:e}"
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(tokens: usize, num_experts: usize, d_ff: usize, top_k: usize) -> Shape {
        Shape {
            tokens,
            d_model: 64,
            d_ff,
            num_experts,
            top_k,
        }
    }

    #[test]
    fn samples_have_the_last_token_and_no_more_than_the_oracle_can_do() {
        let ids: Vec<usize> = (0..2 * 1000).map(|slot| slot % 13).collect();
        let sample = Sample::of(&ids, shape(1000, 13, 64, 2));
        assert_eq!(sample.tokens.len(), TOKENS);
        assert_eq!(sample.tokens.last(), Some(&999));
        assert!(sample.tokens[0] < 100, "{sample:?}");
        assert_eq!(sample.experts, (0..13).collect::<Vec<_>>());

        // Matrices of 2^24 elements: two experts, and two tokens that chose no others.
        let sample = Sample::of(&ids, shape(1000, 13, 1 << 18, 2));
        assert_eq!(sample.tokens, [622, 999]);
        assert_eq!(sample.experts, [9, 10]);
        let one = Sample::of(&[4], shape(1, 5, 64, 1));
        assert_eq!((one.tokens, one.experts), (vec![0], vec![4]));
    }

    #[test]
    fn choices_are_numbered_among_the_sampled_experts() {
        let sample = Sample {
            tokens: vec![1, 2],
            experts: vec![2, 5, 7],
        };
        let routing = sample.routing(&[0, 1, 7, 2, 5, 7], shape(3, 8, 64, 2));
        assert_eq!(routing.expert_ids, [2, 0, 1, 2]);
        assert_eq!((routing.tokens, routing.num_experts), (2, 3));
        assert_eq!(sample.upstream(0, 0), 0.0);
        assert_eq!(sample.upstream(1, 4), 2.0);
    }
}
