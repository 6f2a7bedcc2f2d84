//! The experts' feed-forward network with gate weighting and dropout.

use super::{Routing, activate, activation_slope, dropout_uniform};
use crate::types::Activation;

/// What defines one call of the expert FFN besides its tensors.
#[derive(Debug, Clone)]
pub struct Ffn {
    /// The routing.
    pub routing: Routing,
    /// Width of a token.
    pub d_model: usize,
    /// Width after the activation.
    pub d_ff: usize,
    /// Activation.
    pub activation: Activation,
    /// Probability that an activated value is zeroed.
    pub dropout: f32,
    /// Seed of the dropout mask; without one nothing is dropped.
    pub dropout_seed: Option<[u32; 2]>,
}

/// The differentiable inputs of the expert FFN, or their gradients.
#[derive(Debug, Clone, PartialEq)]
pub struct FfnTensors {
    /// Tokens: `[tokens, d_model]`.
    pub x: Vec<f64>,
    /// Gate weights: `[tokens, top_k]`.
    pub gates: Vec<f64>,
    /// First layer: `[num_experts, d_model, hidden_width]`.
    pub w1: Vec<f64>,
    /// First layer's bias: `[num_experts, hidden_width]`.
    pub b1: Option<Vec<f64>>,
    /// Second layer: `[num_experts, d_ff, d_model]`.
    pub w2: Vec<f64>,
    /// Second layer's bias: `[num_experts, d_model]`.
    pub b2: Option<Vec<f64>>,
}

impl FfnTensors {
    /// Number of inputs, absent ones included.
    pub const COUNT: usize = 6;

    /// The inputs by name, in the order of the fields.
    pub fn named(&self) -> [(&'static str, Option<&[f64]>); Self::COUNT] {
        [
            ("x", Some(&self.x)),
            ("gates", Some(&self.gates)),
            ("w1", Some(&self.w1)),
            ("b1", self.b1.as_deref()),
            ("w2", Some(&self.w2)),
            ("b2", self.b2.as_deref()),
        ]
    }

    fn field(&mut self, i: usize) -> Option<&mut Vec<f64>> {
        match i {
            0 => Some(&mut self.x),
            1 => Some(&mut self.gates),
            2 => Some(&mut self.w1),
            3 => self.b1.as_mut(),
            4 => Some(&mut self.w2),
            _ => self.b2.as_mut(),
        }
    }

    fn zeros_like(&self) -> Self {
        let mut zeros = self.clone();
        for i in 0..Self::COUNT {
            if let Some(values) = zeros.field(i) {
                values.fill(0.0);
            }
        }
        zeros
    }
}

/// What the forward pass of one slot leaves behind.
struct Slot {
    pre_activation: Vec<f64>,
    /// Factor that dropout applies to each activated value.
    kept: Vec<f64>,
    /// Activated values after dropout.
    activated: Vec<f64>,
    /// Output before the gate weight.
    output: Vec<f64>,
}

impl Ffn {
    /// Columns of the first layer.
    pub fn hidden_width(&self) -> usize {
        match self.activation {
            Activation::SwiGlu | Activation::GeGlu => 2 * self.d_ff,
            _ => self.d_ff,
        }
    }

    fn slot(&self, slot: usize, inputs: &FfnTensors) -> Slot {
        let (d, f, h) = (self.d_model, self.d_ff, self.hidden_width());
        let (token, expert) = (slot / self.routing.top_k, self.routing.expert_ids[slot]);
        let pre_activation: Vec<f64> = (0..h)
            .map(|j| {
                let products =
                    (0..d).map(|i| inputs.x[token * d + i] * inputs.w1[(expert * d + i) * h + j]);
                products.sum::<f64>() + inputs.b1.as_ref().map_or(0.0, |b| b[expert * h + j])
            })
            .collect();
        let kept: Vec<f64> = (0..f).map(|j| self.dropout_factor(slot, j)).collect();
        let activated: Vec<f64> = activate(self.activation, &pre_activation)
            .iter()
            .zip(&kept)
            .map(|(a, k)| a * k)
            .collect();
        let output = (0..d)
            .map(|o| {
                let products = (0..f).map(|j| activated[j] * inputs.w2[(expert * f + j) * d + o]);
                products.sum::<f64>() + inputs.b2.as_ref().map_or(0.0, |b| b[expert * d + o])
            })
            .collect();
        Slot {
            pre_activation,
            kept,
            activated,
            output,
        }
    }

    fn dropout_factor(&self, slot: usize, column: usize) -> f64 {
        let p = f64::from(self.dropout);
        match self.dropout_seed {
            Some(seed) if dropout_uniform(seed, slot, column) < p => 0.0,
            Some(_) => 1.0 / (1.0 - p),
            None => 1.0,
        }
    }

    /// Pre-activations in slot order: `[slots, hidden_width]`.
    pub fn pre_activations(&self, inputs: &FfnTensors) -> Vec<f64> {
        (0..self.routing.num_slots())
            .flat_map(|s| self.slot(s, inputs).pre_activation)
            .collect()
    }

    /// The output: `[tokens, d_model]`.
    pub fn forward(&self, inputs: &FfnTensors) -> Vec<f64> {
        let d = self.d_model;
        let mut y = vec![0.0; self.routing.tokens * d];
        for s in 0..self.routing.num_slots() {
            let output = self.slot(s, inputs).output;
            for (o, value) in output.iter().enumerate() {
                y[s / self.routing.top_k * d + o] += inputs.gates[s] * value;
            }
        }
        y
    }

    /// Gradients of all inputs from that of the output, by the chain rule, slot by slot.
    pub fn backward(&self, inputs: &FfnTensors, grad_output: &[f64]) -> FfnTensors {
        let mut grads = inputs.zeros_like();
        for s in 0..self.routing.num_slots() {
            self.slot_backward(s, inputs, grad_output, &mut grads);
        }
        grads
    }

    fn slot_backward(
        &self,
        s: usize,
        inputs: &FfnTensors,
        grad_output: &[f64],
        grads: &mut FfnTensors,
    ) {
        let (d, f, h) = (self.d_model, self.d_ff, self.hidden_width());
        let (token, expert) = (s / self.routing.top_k, self.routing.expert_ids[s]);
        let slot = self.slot(s, inputs);
        let dy = &grad_output[token * d..(token + 1) * d];

        let mut grad_activated = vec![0.0; f];
        for o in 0..d {
            grads.gates[s] += dy[o] * slot.output[o];
            let grad_out = inputs.gates[s] * dy[o];
            if let Some(b2) = &mut grads.b2 {
                b2[expert * d + o] += grad_out;
            }
            for (j, grad) in grad_activated.iter_mut().enumerate() {
                let w2_at = (expert * f + j) * d + o;
                grads.w2[w2_at] += slot.activated[j] * grad_out;
                *grad += inputs.w2[w2_at] * grad_out;
            }
        }
        for (g, kept) in grad_activated.iter_mut().zip(&slot.kept) {
            *g *= kept;
        }
        let grad_pre = activation_slope(self.activation, &slot.pre_activation, &grad_activated);
        for j in 0..h {
            if let Some(b1) = &mut grads.b1 {
                b1[expert * h + j] += grad_pre[j];
            }
            for i in 0..d {
                let w1_at = (expert * d + i) * h + j;
                grads.w1[w1_at] += inputs.x[token * d + i] * grad_pre[j];
                grads.x[token * d + i] += inputs.w1[w1_at] * grad_pre[j];
            }
        }
    }

    /// The same gradients by central differences of [`Ffn::forward`]: no formula is involved.
    pub fn central_differences(
        &self,
        inputs: &FfnTensors,
        grad_output: &[f64],
        step: f64,
    ) -> FfnTensors {
        let dot = |at: &FfnTensors| -> f64 {
            let y = self.forward(at);
            y.iter().zip(grad_output).map(|(y, g)| y * g).sum()
        };
        let mut grads = inputs.zeros_like();
        let mut moved = inputs.clone();
        for field in 0..FfnTensors::COUNT {
            let len = grads.field(field).map_or(0, |values| values.len());
            for i in 0..len {
                let mut value_at = |offset: f64| {
                    let place = moved.field(field).map(|values| &mut values[i]);
                    let place = place.expect("gradients have the fields of the inputs");
                    let before = *place;
                    *place += offset;
                    let value = dot(&moved);
                    if let Some(values) = moved.field(field) {
                        values[i] = before;
                    }
                    value
                };
                let slope = (value_at(step) - value_at(-step)) / (2.0 * step);
                if let Some(values) = grads.field(field) {
                    values[i] = slope;
                }
            }
        }
        grads
    }
}
