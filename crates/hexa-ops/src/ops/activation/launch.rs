//! Host's side of the activation and its gradients.

use burn::tensor::DType;
use burn_cubecl::{CubeRuntime, tensor::CubeTensor};
use cubecl::prelude::{ComptimeOptionArgs, CubeDim, InputScalar, Tensor};

use super::kernel::{DropoutLaunch, OutputBiasLaunch, activate, activate_vjp};
use super::plan::{curve, units_per_row};
use crate::backend::{FfnActivationGradArgs, FfnActivationGrads, RawExpertIndex};
use crate::ops::device::{
    accumulator, address_type, contiguous, cube_per_item, dim, empty, unit_per_item,
};
use crate::types::FfnOptions;

/// Activation and dropout; contract in [`crate::ExpertKernels::ffn_activation`].
///
/// # Shapes
/// - `pre_activation`: `[slots, hidden_width]`, float, expert order; arithmetic in f32, in f64
///   for f64
/// - `dropout_seed`: `[2]`, int; needed where `options.dropout > 0`
/// - result: `[slots, d_ff]`, expert order
pub fn ffn_activation<R: CubeRuntime>(
    pre_activation: CubeTensor<R>,
    index: RawExpertIndex<CubeTensor<R>>,
    options: FfnOptions,
    dropout_seed: Option<CubeTensor<R>>,
) -> CubeTensor<R> {
    let gated = options.activation.is_gated();
    let num_slots = dim(&pre_activation, 0);
    let d_ff = dim(&pre_activation, 1) / options.activation.hidden_width(1);
    let dtype = pre_activation.dtype;
    let activated = empty(&pre_activation, [num_slots, d_ff], dtype);
    let num_elements = num_slots * d_ff;
    if num_elements == 0 {
        return activated;
    }
    let client = pre_activation.client.clone();
    let slots = contiguous(index.slots);
    let (cube_count, cube_dim) = unit_per_item(&client, num_elements);
    let address = address_type(&[&pre_activation, &activated, &slots]);
    let dtypes = [dtype.into(), accumulator(dtype).into(), slots.dtype.into()];
    // SAFETY: units past the last element leave at once; the other indices are products of
    // positions and columns within the tensors' shapes.
    unsafe {
        activate::launch_unchecked(
            &client,
            cube_count,
            cube_dim,
            address,
            pre_activation.into_tensor_arg(),
            slots.into_array_arg(),
            seed_arg(dropout_seed, options),
            activated.clone().into_array_arg(),
            dropout_arg(options, dtype),
            d_ff,
            num_elements,
            curve(options.activation),
            gated,
            dtypes,
        );
    }
    activated
}

/// Gradients through activation, dropout and gate weighting; contract in
/// [`crate::ExpertKernels::ffn_activation_backward`].
///
/// # Shapes
/// See [`FfnActivationGradArgs`] and [`FfnActivationGrads`]. The gate gradient is summed in f32,
/// in f64 for f64.
pub fn ffn_activation_backward<R: CubeRuntime>(
    args: FfnActivationGradArgs<CubeTensor<R>, CubeTensor<R>>,
) -> FfnActivationGrads<CubeTensor<R>> {
    let FfnActivationGradArgs {
        pre_activation,
        grad_activated,
        gates,
        output_bias,
        index,
        options,
        dropout_seed,
    } = args;
    let (num_slots, hidden_width) = (dim(&pre_activation, 0), dim(&pre_activation, 1));
    let d_ff = dim(&grad_activated, 1);
    let dtype = pre_activation.dtype;
    let grads = FfnActivationGrads {
        pre_activation: empty(&pre_activation, [num_slots, hidden_width], dtype),
        weighted_activated: empty(&pre_activation, [num_slots, d_ff], dtype),
        gates: empty(&pre_activation, [index.tokens, index.top_k], dtype),
    };
    if num_slots == 0 {
        return grads;
    }

    let client = pre_activation.client.clone();
    let (slots, offsets) = (contiguous(index.slots), contiguous(index.offsets));
    let mut address = address_type(&[
        &pre_activation,
        &grad_activated,
        &gates,
        &slots,
        &grads.pre_activation,
    ]);
    let mut width = d_ff;
    if let Some((grad_output, bias)) = &output_bias {
        address = address.max(address_type(&[grad_output, bias]));
        width = width.max(dim(bias, 1));
    }
    let num_units = units_per_row(width);
    let dtypes = [dtype.into(), accumulator(dtype).into(), slots.dtype.into()];
    // SAFETY: positions are clamped below `num_slots`, columns below the widths; slots and
    // offsets come from `expert_index`, so that tokens and experts are within their tensors.
    unsafe {
        activate_vjp::launch_unchecked(
            &client,
            cube_per_item(&client, num_slots),
            CubeDim::new_1d(num_units as u32),
            address,
            pre_activation.into_tensor_arg(),
            grad_activated.into_tensor_arg(),
            gates.into_tensor_arg(),
            output_bias
                .map(|(grad_output, bias)| {
                    OutputBiasLaunch::new(grad_output.into_tensor_arg(), bias.into_tensor_arg())
                })
                .into(),
            slots.into_array_arg(),
            offsets.into_array_arg(),
            seed_arg(dropout_seed, options),
            grads.pre_activation.clone().into_array_arg(),
            grads.weighted_activated.clone().into_array_arg(),
            grads.gates.clone().into_array_arg(),
            dropout_arg(options, dtype),
            num_slots,
            index.num_experts,
            curve(options.activation),
            options.activation.is_gated(),
            num_units,
            dtypes,
        );
    }
    grads
}

/// The seed where there is dropout: without it, the kernels are compiled without a mask.
fn seed_arg<R: CubeRuntime, I: cubecl::prelude::Int>(
    seed: Option<CubeTensor<R>>,
    options: FfnOptions,
) -> ComptimeOptionArgs<Tensor<I>, R> {
    seed.filter(|_| options.dropout > 0.0)
        .map(CubeTensor::into_tensor_arg)
        .into()
}

fn dropout_arg<R: CubeRuntime>(options: FfnOptions, dtype: DType) -> DropoutLaunch<R> {
    let scale = match accumulator(dtype) {
        DType::F64 => 1.0 / (1.0 - f64::from(options.dropout)),
        _ => f64::from(1.0 / (1.0 - options.dropout)),
    };
    DropoutLaunch::new(options.dropout, InputScalar::new(scale, accumulator(dtype)))
}
