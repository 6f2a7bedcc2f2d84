//! [`ExpertKernels`] under burn-fusion, as custom operations that are never fused.
//!
//! Every method registers one operation with the fusion server: its inputs, the shapes of its
//! outputs, which are known in advance, and what to run on the inner back-end's tensors once it
//! is the operation's turn.

use core::fmt::{Debug, Formatter};
use core::marker::PhantomData;

use burn::tensor::ops::{FloatTensor, IntTensor};
use burn::tensor::{DType, Element, FloatDType, Shape};
use burn_backend::backend::BackendTypes;

use burn_fusion::stream::{Operation, OperationStreams};
use burn_fusion::{Fusion, FusionBackend, FusionTensor};
use burn_ir::{CustomOpIr, HandleContainer, OperationIr, OperationOutput, TensorIr};

use super::{
    EsmmArgs, ExpertKernels, FfnActivationGradArgs, FfnActivationGrads, FfnBackwardArgs,
    FfnForward, FfnGrads, FfnWeights, RawExpertIndex, RawGating,
};
use crate::memory::DeviceMemory;
use crate::types::{FfnOptions, MatmulPrecision, RowOrder};

type Handles<B> = HandleContainer<<B as burn_ir::BackendIr>::Handle>;
type Lazy<B> = FusionTensor<<B as FusionBackend>::FusionRuntime>;

/// A tensor of the inner back-end that an operation has computed.
enum Computed<B: FusionBackend> {
    Float(FloatTensor<B>),
    Int(IntTensor<B>),
}

/// The inputs of a registered operation, to be taken in the order in which they were given.
struct Inputs<'a, B: FusionBackend> {
    handles: &'a mut Handles<B>,
    remaining: core::slice::Iter<'a, TensorIr>,
}

impl<B: FusionBackend> Inputs<'_, B> {
    fn next(&mut self) -> &TensorIr {
        self.remaining
            .next()
            .expect("an operation takes as many inputs as were registered for it")
    }

    fn float(&mut self) -> FloatTensor<B> {
        let ir = self.next().clone();
        self.handles.get_float_tensor::<B>(&ir)
    }

    fn int(&mut self) -> IntTensor<B> {
        let ir = self.next().clone();
        self.handles.get_int_tensor::<B>(&ir)
    }

    fn float_if(&mut self, given: bool) -> Option<FloatTensor<B>> {
        given.then(|| self.float())
    }

    fn int_if(&mut self, given: bool) -> Option<IntTensor<B>> {
        given.then(|| self.int())
    }

    fn index(&mut self, like: IndexSizes) -> RawExpertIndex<IntTensor<B>> {
        RawExpertIndex {
            counts: self.int(),
            offsets: self.int(),
            slots: self.int(),
            positions: self.int(),
            tokens: like.tokens,
            top_k: like.top_k,
            num_experts: like.num_experts,
        }
    }
}

/// What an index has besides its tensors.
#[derive(Clone, Copy)]
struct IndexSizes {
    tokens: usize,
    top_k: usize,
    num_experts: usize,
}

impl IndexSizes {
    fn of<I>(index: &RawExpertIndex<I>) -> Self {
        Self {
            tokens: index.tokens,
            top_k: index.top_k,
            num_experts: index.num_experts,
        }
    }

    fn num_slots(self) -> usize {
        self.tokens * self.top_k
    }
}

/// Appends an index's tensors in the order in which [`Inputs::index`] takes them.
fn push_index<T>(inputs: &mut Vec<T>, index: RawExpertIndex<T>) {
    inputs.extend([index.counts, index.offsets, index.slots, index.positions]);
}

/// A custom operation: its description and what it runs.
struct CustomOp<B, F> {
    desc: CustomOpIr,
    run: F,
    backend: PhantomData<fn() -> B>,
}

impl<B, F> Debug for CustomOp<B, F> {
    fn fmt(&self, f: &mut Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("CustomOp")
            .field("desc", &self.desc)
            .finish_non_exhaustive()
    }
}

impl<B, F> Operation<B::FusionRuntime> for CustomOp<B, F>
where
    B: FusionBackend,
    F: Fn(&mut Inputs<'_, B>) -> Vec<Computed<B>> + Send + Sync,
{
    fn execute(&self, handles: &mut Handles<B>) {
        let computed = (self.run)(&mut Inputs {
            handles,
            remaining: self.desc.inputs.iter(),
        });
        debug_assert_eq!(computed.len(), self.desc.outputs.len());
        for (ir, tensor) in self.desc.outputs.iter().zip(computed) {
            match tensor {
                Computed::Float(tensor) => handles.register_float_tensor::<B>(&ir.id, tensor),
                Computed::Int(tensor) => handles.register_int_tensor::<B>(&ir.id, tensor),
            }
        }
    }
}

/// Registers an operation. `inputs` is not empty; `run` returns one tensor per output, in order.
fn register<B, F>(
    name: &'static str,
    inputs: Vec<Lazy<B>>,
    outputs: Vec<(Shape, DType)>,
    run: F,
) -> Vec<Lazy<B>>
where
    B: FusionBackend,
    F: Fn(&mut Inputs<'_, B>) -> Vec<Computed<B>> + Send + Sync + 'static,
{
    let client = inputs[0].client.clone();
    let streams = OperationStreams::with_inputs(&inputs);
    let outputs: Vec<TensorIr> = outputs
        .into_iter()
        .map(|(shape, dtype)| TensorIr::uninit(client.create_empty_handle(), shape, dtype))
        .collect();
    let inputs: Vec<TensorIr> = inputs.into_iter().map(FusionTensor::into_ir).collect();
    let desc = CustomOpIr::new(name, &inputs, &outputs);
    let operation = CustomOp {
        desc: desc.clone(),
        run,
        backend: PhantomData,
    };
    client.register(streams, OperationIr::Custom(desc), operation)
}

/// [`register`] for the common case of one float result.
fn register_float<B, F>(
    name: &'static str,
    inputs: Vec<Lazy<B>>,
    shape: impl Into<Shape>,
    run: F,
) -> Lazy<B>
where
    B: FusionBackend,
    F: Fn(&mut Inputs<'_, B>) -> FloatTensor<B> + Send + Sync + 'static,
{
    let dtype = inputs[0].dtype;
    register::<B, _>(name, inputs, vec![(shape.into(), dtype)], move |inputs| {
        vec![Computed::Float(run(inputs))]
    })
    .output()
}

impl<B: FusionBackend + ExpertKernels> ExpertKernels for Fusion<B> {
    fn tile_rows(device: &Self::Device) -> usize {
        <B as ExpertKernels>::tile_rows(device)
    }

    fn topk_gating(
        logits: FloatTensor<Self>,
        top_k: usize,
        normalize: bool,
    ) -> RawGating<FloatTensor<Self>, IntTensor<Self>> {
        let [tokens, num_experts] = logits.shape.dims();
        let dtype = logits.dtype;
        let outputs = vec![
            (Shape::new([tokens, num_experts]), dtype),
            (Shape::new([tokens, top_k]), dtype),
            (
                Shape::new([tokens, top_k]),
                <B as BackendTypes>::IntElem::dtype(),
            ),
        ];
        let [probs, weights, expert_ids] =
            register::<B, _>("hexa_topk_gating", vec![logits], outputs, move |inputs| {
                let gating = <B as ExpertKernels>::topk_gating(inputs.float(), top_k, normalize);
                vec![
                    Computed::Float(gating.probs),
                    Computed::Float(gating.weights),
                    Computed::Int(gating.expert_ids),
                ]
            })
            .outputs();
        RawGating {
            probs,
            weights,
            expert_ids,
        }
    }

    fn topk_weights_backward(
        probs: FloatTensor<Self>,
        expert_ids: IntTensor<Self>,
        grad_weights: FloatTensor<Self>,
        normalize: bool,
    ) -> FloatTensor<Self> {
        let shape = probs.shape.clone();
        let inputs = vec![probs, expert_ids, grad_weights];
        register_float::<B, _>("hexa_topk_weights_backward", inputs, shape, move |inputs| {
            let (probs, ids, grad) = (inputs.float(), inputs.int(), inputs.float());
            B::topk_weights_backward(probs, ids, grad, normalize)
        })
    }

    fn softmax_backward(probs: FloatTensor<Self>, grad: FloatTensor<Self>) -> FloatTensor<Self> {
        let shape = probs.shape.clone();
        register_float::<B, _>(
            "hexa_softmax_backward",
            vec![probs, grad],
            shape,
            |inputs| B::softmax_backward(inputs.float(), inputs.float()),
        )
    }

    fn expert_index(
        expert_ids: IntTensor<Self>,
        num_experts: usize,
    ) -> RawExpertIndex<IntTensor<Self>> {
        let [tokens, top_k] = expert_ids.shape.dims();
        let dtype = expert_ids.dtype;
        let outputs = [num_experts, num_experts + 1, tokens * top_k, tokens * top_k]
            .map(|len| (Shape::new([len]), dtype))
            .to_vec();
        let [counts, offsets, slots, positions] = register::<B, _>(
            "hexa_expert_index",
            vec![expert_ids],
            outputs,
            move |inputs| {
                let index = <B as ExpertKernels>::expert_index(inputs.int(), num_experts);
                [index.counts, index.offsets, index.slots, index.positions]
                    .map(Computed::Int)
                    .into()
            },
        )
        .outputs();
        RawExpertIndex {
            counts,
            offsets,
            slots,
            positions,
            tokens,
            top_k,
            num_experts,
        }
    }

    fn esmm(args: EsmmArgs<FloatTensor<Self>, IntTensor<Self>>) -> FloatTensor<Self> {
        let EsmmArgs {
            x,
            x_order,
            w,
            transposed,
            bias,
            out_order,
            index,
        } = args;
        let sizes = IndexSizes::of(&index);
        let width = w.shape[if transposed { 1 } else { 2 }];
        let has_bias = bias.is_some();
        let mut inputs = vec![x, w];
        inputs.extend(bias);
        push_index(&mut inputs, index);
        let shape = [sizes.num_slots(), width];
        register_float::<B, _>("hexa_esmm", inputs, shape, move |inputs| {
            <B as ExpertKernels>::esmm(EsmmArgs {
                x: inputs.float(),
                x_order,
                w: inputs.float(),
                transposed,
                bias: inputs.float_if(has_bias),
                out_order,
                index: inputs.index(sizes),
            })
        })
    }

    fn estmm(
        a: FloatTensor<Self>,
        a_order: RowOrder,
        b: FloatTensor<Self>,
        b_order: RowOrder,
        index: RawExpertIndex<IntTensor<Self>>,
    ) -> FloatTensor<Self> {
        let sizes = IndexSizes::of(&index);
        let shape = [sizes.num_experts, a.shape[1], b.shape[1]];
        let mut inputs = vec![a, b];
        push_index(&mut inputs, index);
        register_float::<B, _>("hexa_estmm", inputs, shape, move |inputs| {
            let (a, b) = (inputs.float(), inputs.float());
            <B as ExpertKernels>::estmm(a, a_order, b, b_order, inputs.index(sizes))
        })
    }

    fn ess(
        x: FloatTensor<Self>,
        x_order: RowOrder,
        gates: Option<FloatTensor<Self>>,
        index: RawExpertIndex<IntTensor<Self>>,
    ) -> FloatTensor<Self> {
        let sizes = IndexSizes::of(&index);
        let shape = [sizes.num_experts, x.shape[1]];
        let has_gates = gates.is_some();
        let mut inputs = vec![x];
        inputs.extend(gates);
        push_index(&mut inputs, index);
        register_float::<B, _>("hexa_ess", inputs, shape, move |inputs| {
            let (x, gates) = (inputs.float(), inputs.float_if(has_gates));
            <B as ExpertKernels>::ess(x, x_order, gates, inputs.index(sizes))
        })
    }

    fn combine(
        y: FloatTensor<Self>,
        y_order: RowOrder,
        gates: Option<FloatTensor<Self>>,
        index: RawExpertIndex<IntTensor<Self>>,
    ) -> FloatTensor<Self> {
        let sizes = IndexSizes::of(&index);
        let shape = [sizes.tokens, y.shape[1]];
        let has_gates = gates.is_some();
        let mut inputs = vec![y];
        inputs.extend(gates);
        push_index(&mut inputs, index);
        register_float::<B, _>("hexa_combine", inputs, shape, move |inputs| {
            let (y, gates) = (inputs.float(), inputs.float_if(has_gates));
            B::combine(y, y_order, gates, inputs.index(sizes))
        })
    }

    fn ffn_activation(
        pre_activation: FloatTensor<Self>,
        index: RawExpertIndex<IntTensor<Self>>,
        options: FfnOptions,
        dropout_seed: Option<IntTensor<Self>>,
    ) -> FloatTensor<Self> {
        let sizes = IndexSizes::of(&index);
        let d_ff = pre_activation.shape[1] / options.activation.hidden_width(1);
        let shape = [pre_activation.shape[0], d_ff];
        let has_seed = dropout_seed.is_some();
        let mut inputs = vec![pre_activation];
        push_index(&mut inputs, index);
        inputs.extend(dropout_seed);
        register_float::<B, _>("hexa_ffn_activation", inputs, shape, move |inputs| {
            let (pre_activation, index) = (inputs.float(), inputs.index(sizes));
            B::ffn_activation(pre_activation, index, options, inputs.int_if(has_seed))
        })
    }

    fn ffn_activation_backward(
        args: FfnActivationGradArgs<FloatTensor<Self>, IntTensor<Self>>,
    ) -> FfnActivationGrads<FloatTensor<Self>> {
        let FfnActivationGradArgs {
            pre_activation,
            grad_activated,
            gates,
            output_bias,
            index,
            options,
            dropout_seed,
        } = args;
        let sizes = IndexSizes::of(&index);
        let dtype = pre_activation.dtype;
        let outputs = [&pre_activation, &grad_activated, &gates]
            .map(|tensor| (tensor.shape.clone(), dtype))
            .to_vec();
        let (has_bias, has_seed) = (output_bias.is_some(), dropout_seed.is_some());
        let mut inputs = vec![pre_activation, grad_activated, gates];
        inputs.extend(output_bias.into_iter().flat_map(|(dy, bias)| [dy, bias]));
        push_index(&mut inputs, index);
        inputs.extend(dropout_seed);
        let [pre_activation, weighted_activated, gates] = register::<B, _>(
            "hexa_ffn_activation_backward",
            inputs,
            outputs,
            move |inputs| {
                let grads = B::ffn_activation_backward(FfnActivationGradArgs {
                    pre_activation: inputs.float(),
                    grad_activated: inputs.float(),
                    gates: inputs.float(),
                    output_bias: has_bias.then(|| (inputs.float(), inputs.float())),
                    index: inputs.index(sizes),
                    options,
                    dropout_seed: inputs.int_if(has_seed),
                });
                [grads.pre_activation, grads.weighted_activated, grads.gates]
                    .map(Computed::Float)
                    .into()
            },
        )
        .outputs();
        FfnActivationGrads {
            pre_activation,
            weighted_activated,
            gates,
        }
    }

    fn expert_ffn(
        x: FloatTensor<Self>,
        gates: FloatTensor<Self>,
        weights: FfnWeights<FloatTensor<Self>>,
        index: RawExpertIndex<IntTensor<Self>>,
        options: FfnOptions,
        dropout_seed: Option<IntTensor<Self>>,
    ) -> FfnForward<FloatTensor<Self>> {
        let sizes = IndexSizes::of(&index);
        let layout = WeightLayout::of(&weights);
        let has_seed = dropout_seed.is_some();
        let outputs = vec![
            (x.shape.clone(), x.dtype),
            (
                Shape::new([sizes.num_slots(), weights.w1.shape[2]]),
                x.dtype,
            ),
        ];
        let mut inputs = vec![x, gates];
        layout.push(&mut inputs, weights);
        push_index(&mut inputs, index);
        inputs.extend(dropout_seed);
        let [output, pre_activation] =
            register::<B, _>("hexa_expert_ffn", inputs, outputs, move |inputs| {
                let (x, gates) = (inputs.float(), inputs.float());
                let (weights, index) = (layout.take(inputs), inputs.index(sizes));
                let seed = inputs.int_if(has_seed);
                let forward =
                    <B as ExpertKernels>::expert_ffn(x, gates, weights, index, options, seed);
                [forward.output, forward.pre_activation]
                    .map(Computed::Float)
                    .into()
            })
            .outputs();
        FfnForward {
            output,
            pre_activation,
        }
    }

    fn expert_ffn_backward(
        args: FfnBackwardArgs<FloatTensor<Self>, IntTensor<Self>>,
    ) -> FfnGrads<FloatTensor<Self>> {
        let FfnBackwardArgs {
            grad_output,
            x,
            gates,
            weights,
            pre_activation,
            index,
            options,
            dropout_seed,
            needs,
        } = args;
        let sizes = IndexSizes::of(&index);
        let layout = WeightLayout::of(&weights);
        let has_seed = dropout_seed.is_some();
        let bias_shape = |width: usize| Shape::new([sizes.num_experts, width]);
        let candidates = [
            (needs.x, x.shape.clone()),
            (needs.gates, gates.shape.clone()),
            (needs.w1, weights.w1.shape.clone()),
            (needs.b1, bias_shape(weights.w1.shape[2])),
            (needs.w2, weights.w2.shape.clone()),
            (needs.b2, bias_shape(weights.w2.shape[2])),
        ];
        let wanted = candidates.each_ref().map(|(wanted, _)| *wanted);
        let dtype = x.dtype;
        let outputs = candidates
            .into_iter()
            .filter_map(|(wanted, shape)| wanted.then_some((shape, dtype)))
            .collect();

        let mut inputs = vec![grad_output, x, gates];
        layout.push(&mut inputs, weights);
        inputs.push(pre_activation);
        push_index(&mut inputs, index);
        inputs.extend(dropout_seed);
        let mut computed =
            register::<B, _>("hexa_expert_ffn_backward", inputs, outputs, move |inputs| {
                let grads = <B as ExpertKernels>::expert_ffn_backward(FfnBackwardArgs {
                    grad_output: inputs.float(),
                    x: inputs.float(),
                    gates: inputs.float(),
                    weights: layout.take(inputs),
                    pre_activation: inputs.float(),
                    index: inputs.index(sizes),
                    options,
                    dropout_seed: inputs.int_if(has_seed),
                    needs,
                });
                [grads.x, grads.gates, grads.w1, grads.b1, grads.w2, grads.b2]
                    .into_iter()
                    .flatten()
                    .map(Computed::Float)
                    .collect()
            })
            .into_iter();
        let [x, gates, w1, b1, w2, b2] =
            wanted.map(|wanted| wanted.then(|| computed.next()).flatten());
        FfnGrads {
            x,
            gates,
            w1,
            b1,
            w2,
            b2,
        }
    }

    fn dense_matmul(
        lhs: FloatTensor<Self>,
        rhs: FloatTensor<Self>,
        precision: MatmulPrecision,
        out: FloatDType,
    ) -> FloatTensor<Self> {
        let last = lhs.shape.num_dims() - 1;
        let mut shape = lhs.shape.clone();
        shape[last] = rhs.shape[last];
        let outputs = vec![(shape, out.into())];
        register::<B, _>(
            "hexa_dense_matmul",
            vec![lhs, rhs],
            outputs,
            move |inputs| {
                let (lhs, rhs) = (inputs.float(), inputs.float());
                let y = <B as ExpertKernels>::dense_matmul(lhs, rhs, precision, out);
                vec![Computed::Float(y)]
            },
        )
        .output()
    }

    fn gelu(x: FloatTensor<Self>) -> FloatTensor<Self> {
        let shape = x.shape.clone();
        register_float::<B, _>("hexa_gelu", vec![x], shape, |inputs| {
            <B as ExpertKernels>::gelu(inputs.float())
        })
    }

    fn gelu_backward(x: FloatTensor<Self>, grad: FloatTensor<Self>) -> FloatTensor<Self> {
        let shape = x.shape.clone();
        register_float::<B, _>("hexa_gelu_backward", vec![x, grad], shape, |inputs| {
            <B as ExpertKernels>::gelu_backward(inputs.float(), inputs.float())
        })
    }

    fn supports_precision(device: &Self::Device, precision: MatmulPrecision) -> bool {
        <B as ExpertKernels>::supports_precision(device, precision)
    }

    fn device_memory(device: &Self::Device) -> Option<DeviceMemory> {
        <B as ExpertKernels>::device_memory(device)
    }
}

/// Which of the optional weights there are.
#[derive(Clone, Copy)]
struct WeightLayout {
    has_b1: bool,
    has_b2: bool,
}

impl WeightLayout {
    fn of<T>(weights: &FfnWeights<T>) -> Self {
        Self {
            has_b1: weights.b1.is_some(),
            has_b2: weights.b2.is_some(),
        }
    }

    /// Appends the weights in the order in which [`WeightLayout::take`] takes them.
    fn push<T>(self, inputs: &mut Vec<T>, weights: FfnWeights<T>) {
        inputs.extend([weights.w1, weights.w2]);
        inputs.extend(weights.b1);
        inputs.extend(weights.b2);
    }

    fn take<B: FusionBackend>(self, inputs: &mut Inputs<'_, B>) -> FfnWeights<FloatTensor<B>> {
        let (w1, w2) = (inputs.float(), inputs.float());
        FfnWeights {
            w1,
            b1: inputs.float_if(self.has_b1),
            w2,
            b2: inputs.float_if(self.has_b2),
        }
    }
}
