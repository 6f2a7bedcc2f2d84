//! Device code of the activation and its gradients.

use cubecl::prelude::*;

use super::math::{Curve, curve_derivative, curve_value, dropout_uniform};

/// Dropout's parameters; not read without a seed.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
pub struct Dropout {
    /// Probability of zeroing a value.
    pub probability: f32,
    /// `1 / (1 − probability)`, in the accumulator's type.
    pub scale: InputScalar,
}

/// Whether column `column` of slot `slot` survives.
#[cube]
fn is_kept<I: Int>(
    seed: &ComptimeOption<Tensor<I>>,
    slot: u32,
    column: usize,
    probability: f32,
) -> bool {
    #[comptime]
    match seed {
        ComptimeOption::Some(seed) => {
            let s0 = u32::cast_from(seed[0]);
            let s1 = u32::cast_from(seed[seed.stride(0)]);
            dropout_uniform(s0, s1, slot, column as u32) >= probability
        }
        ComptimeOption::None => true.runtime(),
    }
}

/// `value · scale` where kept, else zero; `value` without dropout.
#[cube]
fn scaled<A: Float>(value: A, kept: bool, dropout: &Dropout, #[comptime] has_dropout: bool) -> A {
    if comptime!(has_dropout) {
        select(kept, value * dropout.scale.get::<A>(), A::new(0.0))
    } else {
        value
    }
}

/// `dropout(act(h))`, one unit per activated value.
#[cube(launch_unchecked, address_type = "dynamic")]
#[allow(clippy::too_many_arguments)]
pub fn activate<F: Float, A: Float, I: Int>(
    pre_activation: &Tensor<F>,
    slots: &Array<I>,
    seed: &ComptimeOption<Tensor<I>>,
    activated: &mut Array<F>,
    dropout: &Dropout,
    d_ff: usize,
    num_elements: usize,
    #[comptime] curve: Curve,
    #[comptime] gated: bool,
    #[define(F, A, I)] _dtypes: [StorageType; 3],
) {
    if ABSOLUTE_POS >= num_elements {
        terminate!();
    }
    let position = ABSOLUTE_POS / d_ff;
    let column = ABSOLUTE_POS % d_ff;
    let row = position * pre_activation.stride(0);
    let step = pre_activation.stride(1);

    let value = if comptime!(gated) {
        let gate = A::cast_from(pre_activation[row + 2 * column * step]);
        let value = A::cast_from(pre_activation[row + (2 * column + 1) * step]);
        curve_value::<A>(gate, curve) * value
    } else {
        curve_value::<A>(A::cast_from(pre_activation[row + column * step]), curve)
    };
    let slot = u32::cast_from(slots[position]);
    let kept = is_kept::<I>(seed, slot, column, dropout.probability);
    let has_dropout = seed.is_some();
    activated[ABSOLUTE_POS] = F::cast_from(scaled::<A>(value, kept, dropout, has_dropout));
}

/// Inputs of [`activate_vjp`] that are indexed by token or expert.
#[derive(CubeType, CubeLaunch)]
pub struct OutputBias<F: Float> {
    /// Gradient of the output: `[tokens, d_model]`.
    pub grad_output: Tensor<F>,
    /// The second layer's bias: `[num_experts, d_model]`.
    pub bias: Tensor<F>,
}

/// Gradients through activation, dropout and gate weighting, one cube per position.
#[cube(launch_unchecked, address_type = "dynamic")]
#[allow(clippy::too_many_arguments)]
pub fn activate_vjp<F: Float, A: Float, I: Int>(
    pre_activation: &Tensor<F>,
    grad_activated: &Tensor<F>,
    gates: &Tensor<F>,
    output_bias: &ComptimeOption<OutputBias<F>>,
    slots: &Array<I>,
    offsets: &Array<I>,
    seed: &ComptimeOption<Tensor<I>>,
    grad_pre_activation: &mut Array<F>,
    weighted_activated: &mut Array<F>,
    grad_gates: &mut Array<F>,
    dropout: &Dropout,
    num_slots: usize,
    num_experts: usize,
    #[comptime] curve: Curve,
    #[comptime] gated: bool,
    #[comptime] num_units: usize,
    #[define(F, A, I)] _dtypes: [StorageType; 3],
) {
    // Surplus cubes redo the last position, and only their writes are left out: all units of a
    // cube must reach the barriers below.
    let writes = CUBE_POS < num_slots;
    let position = min(CUBE_POS, num_slots - 1);
    let slot = u32::cast_from(slots[position]);
    let top_k = gates.shape(1);
    let token = slot as usize / top_k;
    let choice = slot as usize % top_k;
    let gate_weight = A::cast_from(gates[token * gates.stride(0) + choice * gates.stride(1)]);
    let d_ff = grad_activated.shape(1);
    let has_dropout = seed.is_some();

    let mut sum = A::new(0.0);
    let mut column = UNIT_POS as usize;
    while column < d_ff {
        let upstream = A::cast_from(
            grad_activated[position * grad_activated.stride(0) + column * grad_activated.stride(1)],
        );
        let kept = is_kept::<I>(seed, slot, column, dropout.probability);
        let through = gate_weight * scaled::<A>(upstream, kept, dropout, has_dropout);
        let row = position * pre_activation.stride(0);
        let step = pre_activation.stride(1);
        let out = position * d_ff + column;
        let value = if comptime!(gated) {
            let gate = A::cast_from(pre_activation[row + 2 * column * step]);
            let value = A::cast_from(pre_activation[row + (2 * column + 1) * step]);
            let curve_of_gate = curve_value::<A>(gate, curve);
            if writes {
                grad_pre_activation[2 * out] =
                    F::cast_from(through * value * curve_derivative::<A>(gate, curve));
                grad_pre_activation[2 * out + 1] = F::cast_from(through * curve_of_gate);
            }
            curve_of_gate * value
        } else {
            let h = A::cast_from(pre_activation[row + column * step]);
            if writes {
                grad_pre_activation[out] = F::cast_from(through * curve_derivative::<A>(h, curve));
            }
            curve_value::<A>(h, curve)
        };
        let activated = scaled::<A>(value, kept, dropout, has_dropout);
        if writes {
            weighted_activated[out] = F::cast_from(gate_weight * activated);
        }
        sum += upstream * activated;
        column += CUBE_DIM as usize;
    }

    #[comptime]
    match output_bias {
        ComptimeOption::Some(terms) => {
            let expert = expert_at::<I>(offsets, position, num_experts);
            let mut m = UNIT_POS as usize;
            while m < terms.bias.shape(1) {
                let grad = terms.grad_output
                    [token * terms.grad_output.stride(0) + m * terms.grad_output.stride(1)];
                let bias = terms.bias[expert * terms.bias.stride(0) + m * terms.bias.stride(1)];
                sum += A::cast_from(grad) * A::cast_from(bias);
                m += CUBE_DIM as usize;
            }
        }
        ComptimeOption::None => {}
    }

    let total = cube_sum::<A>(sum, num_units);
    if UNIT_POS == 0u32 && writes {
        grad_gates[slot as usize] = F::cast_from(total);
    }
}

/// The expert whose range of positions holds `position`.
#[cube]
fn expert_at<I: Int>(offsets: &Array<I>, position: usize, num_experts: usize) -> usize {
    let mut low = 0usize;
    let mut high = num_experts;
    while low + 1 < high {
        let middle = (low + high) / 2;
        if u32::cast_from(offsets[middle]) as usize <= position {
            low = middle;
        } else {
            high = middle;
        }
    }
    low
}

/// Sum over the cube's units, a power of two, in an order that depends on nothing else.
#[cube]
fn cube_sum<A: Float>(own: A, #[comptime] num_units: usize) -> A {
    let mut sums = SharedMemory::<A>::new(num_units);
    sums[UNIT_POS as usize] = own;
    let mut width = CUBE_DIM / 2u32;
    while width > 0u32 {
        sync_cube();
        if UNIT_POS < width {
            let right = sums[(UNIT_POS + width) as usize];
            sums[UNIT_POS as usize] += right;
        }
        width /= 2u32;
    }
    sync_cube();
    sums[0]
}
