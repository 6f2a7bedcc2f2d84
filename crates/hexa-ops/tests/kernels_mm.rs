//! ESMM, ESTMM, ESS and the combination in every element type, against f64 loops over host
//! slices, on the back-end that `HEXA_TEST_BACKEND` names.

use burn::tensor::{DType, Int, Tensor, TensorData, backend::Backend, ops::FloatTensor};
use hexa_ops::RowOrder;
use hexa_ops::backend::{EsmmArgs, ExpertKernels, RawExpertIndex};
use hexa_ops::backend_test;
use hexa_ops::host;
use hexa_ops::testing::backend::{TestBackend, skip};

const ORDERS: [RowOrder; 3] = [RowOrder::Token, RowOrder::Slot, RowOrder::Expert];

/// A routing, with the index built by a stable sort on the host.
#[derive(Debug, Clone)]
struct Routing {
    tokens: usize,
    top_k: usize,
    num_experts: usize,
    /// Expert of each slot.
    ids: Vec<usize>,
    /// Slot at each position.
    slots: Vec<usize>,
    /// Position of each slot.
    positions: Vec<usize>,
}

impl Routing {
    fn new(tokens: usize, top_k: usize, num_experts: usize, id: impl Fn(usize) -> usize) -> Self {
        let ids: Vec<usize> = (0..tokens * top_k).map(id).collect();
        assert!(ids.iter().all(|id| *id < num_experts));
        let mut slots: Vec<usize> = (0..ids.len()).collect();
        slots.sort_by_key(|slot| ids[*slot]);
        let mut positions = vec![0; ids.len()];
        for (position, slot) in slots.iter().enumerate() {
            positions[*slot] = position;
        }
        Routing {
            tokens,
            top_k,
            num_experts,
            ids,
            slots,
            positions,
        }
    }

    fn num_slots(&self) -> usize {
        self.ids.len()
    }

    /// Row of `slot` in a matrix of the given order.
    fn row(&self, slot: usize, order: RowOrder) -> usize {
        match order {
            RowOrder::Token => slot / self.top_k,
            RowOrder::Slot => slot,
            RowOrder::Expert => self.positions[slot],
        }
    }

    fn index<B: ExpertKernels>(&self, device: &B::Device) -> RawExpertIndex<B::IntTensorPrimitive> {
        let ints = |values: Vec<usize>| {
            let values: Vec<i32> = values.into_iter().map(|v| v as i32).collect();
            host::upload::<B, 1, Int>(values.as_slice().into(), device).into_primitive()
        };
        let counts: Vec<usize> = (0..self.num_experts)
            .map(|e| self.ids.iter().filter(|id| **id == e).count())
            .collect();
        let mut offsets = vec![0];
        for count in &counts {
            offsets.push(offsets[offsets.len() - 1] + count);
        }
        RawExpertIndex {
            counts: ints(counts),
            offsets: ints(offsets),
            slots: ints(self.slots.clone()),
            positions: ints(self.positions.clone()),
            tokens: self.tokens,
            top_k: self.top_k,
            num_experts: self.num_experts,
        }
    }
}

/// Small, odd and degenerate routings.
fn routings() -> Vec<Routing> {
    vec![
        Routing::new(1, 1, 1, |_| 0),
        Routing::new(1, 3, 3, |slot| slot),
        // Expert 2 of 5 is empty.
        Routing::new(37, 1, 5, |slot| [0, 1, 3, 4, 1, 1][slot * 7 % 6]),
        // All on the last expert, more than one tile of rows.
        Routing::new(131, 1, 4, |_| 3),
        // top_k = num_experts.
        Routing::new(29, 3, 3, |slot| (slot + slot / 3) % 3),
        // Whole tiles exactly.
        Routing::new(128, 2, 4, |slot| slot % 2 * 2),
    ]
}

/// Values that f16 and bf16 hold exactly, so that only sums are rounded.
fn values(len: usize, seed: u64) -> Vec<f64> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state % 17) as f64 / 8.0 - 1.0
        })
        .collect()
}

fn upload<B: Backend, const D: usize>(
    data: &[f64],
    shape: [usize; D],
    dtype: DType,
    device: &B::Device,
) -> Tensor<B, D> {
    host::upload(
        TensorData::new(data.to_vec(), shape).convert_dtype(dtype),
        (device, dtype),
    )
}

fn raw<B: Backend, const D: usize>(tensor: Tensor<B, D>) -> FloatTensor<B> {
    tensor.into_primitive().tensor()
}

fn download<B: Backend, const D: usize>(
    tensor: FloatTensor<B>,
    shape: [usize; D],
    dtype: DType,
) -> Vec<f64> {
    let tensor = Tensor::<B, D>::from_primitive(burn::tensor::TensorPrimitive::Float(tensor));
    assert_eq!(tensor.dims(), shape);
    assert_eq!(tensor.dtype(), dtype);
    host::download(tensor).unwrap().iter::<f64>().collect()
}

/// Fails unless every value is within the type's rounding of its reference.
fn compare(got: &[f64], want: &[f64], dtype: DType, what: &str) {
    let tolerance = match dtype {
        DType::F64 => 1e-12,
        DType::F32 => 1e-5,
        DType::F16 => 1e-3,
        _ => 8e-3,
    };
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        assert!(
            (got - want).abs() <= tolerance * want.abs().max(1.0),
            "{what}: element {i} is {got}, want {want}"
        );
    }
}

/// What all checks of one run share.
struct Check<'a, B: Backend> {
    device: &'a B::Device,
    routing: &'a Routing,
    dtype: DType,
}

impl<B: ExpertKernels> Check<'_, B> {
    fn rows(&self, order: RowOrder) -> usize {
        order.num_rows(self.routing.tokens, self.routing.top_k)
    }

    fn upload<const D: usize>(&self, data: &[f64], shape: [usize; D]) -> FloatTensor<B> {
        raw(upload::<B, D>(data, shape, self.dtype, self.device))
    }

    fn esmm(&self, width_in: usize, width_out: usize, transposed: bool, with_bias: bool) {
        let r = self.routing;
        let w = values(r.num_experts * width_in * width_out, 2);
        let bias = values(r.num_experts * width_out, 3);
        for (x_order, out_order) in [
            (RowOrder::Token, RowOrder::Expert),
            (RowOrder::Slot, RowOrder::Slot),
            (RowOrder::Expert, RowOrder::Slot),
        ] {
            let x = values(self.rows(x_order) * width_in, 1);
            let mut want = vec![0.0; r.num_slots() * width_out];
            for (slot, e) in r.ids.iter().enumerate() {
                for j in 0..width_out {
                    let mut sum = if with_bias {
                        bias[e * width_out + j]
                    } else {
                        0.0
                    };
                    for i in 0..width_in {
                        let at = if transposed {
                            j * width_in + i
                        } else {
                            i * width_out + j
                        };
                        sum += x[r.row(slot, x_order) * width_in + i]
                            * w[e * width_in * width_out + at];
                    }
                    want[r.row(slot, out_order) * width_out + j] = sum;
                }
            }
            let w_shape = if transposed {
                [r.num_experts, width_out, width_in]
            } else {
                [r.num_experts, width_in, width_out]
            };
            let got = B::esmm(EsmmArgs {
                x: self.upload(&x, [self.rows(x_order), width_in]),
                x_order,
                w: self.upload(&w, w_shape),
                transposed,
                bias: with_bias.then(|| self.upload(&bias, [r.num_experts, width_out])),
                out_order,
                index: r.index::<B>(self.device),
            });
            let got = download::<B, 2>(got, [r.num_slots(), width_out], self.dtype);
            let what = format!("esmm {r:?} {x_order:?} {out_order:?} {transposed} {with_bias}");
            compare(&got, &want, self.dtype, &what);
        }
    }

    fn estmm(&self, m: usize, n: usize) {
        let r = self.routing;
        for (a_order, b_order) in ORDERS.into_iter().zip([ORDERS[2], ORDERS[0], ORDERS[1]]) {
            let a = values(self.rows(a_order) * m, 4);
            let b = values(self.rows(b_order) * n, 5);
            let mut want = vec![0.0; r.num_experts * m * n];
            for (slot, e) in r.ids.iter().enumerate() {
                for i in 0..m {
                    for j in 0..n {
                        want[(e * m + i) * n + j] +=
                            a[r.row(slot, a_order) * m + i] * b[r.row(slot, b_order) * n + j];
                    }
                }
            }
            let got = B::estmm(
                self.upload(&a, [self.rows(a_order), m]),
                a_order,
                self.upload(&b, [self.rows(b_order), n]),
                b_order,
                r.index::<B>(self.device),
            );
            let got = download::<B, 3>(got, [r.num_experts, m, n], self.dtype);
            compare(
                &got,
                &want,
                self.dtype,
                &format!("estmm {r:?} {a_order:?} {b_order:?}"),
            );
            self.exactly_zero_when_empty(&got);
        }
    }

    fn ess(&self, n: usize, gated: bool) {
        let r = self.routing;
        let gates = values(r.num_slots(), 6);
        for order in ORDERS {
            let x = values(self.rows(order) * n, 7);
            let mut want = vec![0.0; r.num_experts * n];
            for (slot, e) in r.ids.iter().enumerate() {
                let gate = if gated { gates[slot] } else { 1.0 };
                for j in 0..n {
                    want[e * n + j] += gate * x[r.row(slot, order) * n + j];
                }
            }
            let got = B::ess(
                self.upload(&x, [self.rows(order), n]),
                order,
                gated.then(|| self.upload(&gates, [r.tokens, r.top_k])),
                r.index::<B>(self.device),
            );
            let got = download::<B, 2>(got, [r.num_experts, n], self.dtype);
            compare(
                &got,
                &want,
                self.dtype,
                &format!("ess {r:?} {order:?} {gated}"),
            );
            self.exactly_zero_when_empty(&got);
        }
    }

    fn combine(&self, n: usize, gated: bool) {
        let r = self.routing;
        let gates = values(r.num_slots(), 8);
        for order in [RowOrder::Slot, RowOrder::Expert] {
            let y = values(r.num_slots() * n, 9);
            let mut want = vec![0.0; r.tokens * n];
            for slot in 0..r.num_slots() {
                let gate = if gated { gates[slot] } else { 1.0 };
                for j in 0..n {
                    want[slot / r.top_k * n + j] += gate * y[r.row(slot, order) * n + j];
                }
            }
            let got = B::combine(
                self.upload(&y, [r.num_slots(), n]),
                order,
                gated.then(|| self.upload(&gates, [r.tokens, r.top_k])),
                r.index::<B>(self.device),
            );
            let got = download::<B, 2>(got, [r.tokens, n], self.dtype);
            compare(
                &got,
                &want,
                self.dtype,
                &format!("combine {r:?} {order:?} {gated}"),
            );
        }
    }

    fn exactly_zero_when_empty(&self, per_expert: &[f64]) {
        let len = per_expert.len() / self.routing.num_experts;
        for e in (0..self.routing.num_experts).filter(|e| !self.routing.ids.contains(e)) {
            let block = &per_expert[e * len..(e + 1) * len];
            assert!(
                block.iter().all(|v| v.to_bits() == 0),
                "expert {e} is empty"
            );
        }
    }
}

fn for_each_routing<B: ExpertKernels>(dtype: DType, run: impl Fn(&Check<'_, B>)) {
    let device = B::Device::default();
    if !B::supports_dtype(&device, dtype) {
        skip(
            "kernels_mm",
            &format!("no {dtype:?} on {}", B::name(&device)),
        );
        return;
    }
    for routing in &routings() {
        run(&Check {
            device: &device,
            routing,
            dtype,
        });
    }
}

fn all_operators<B: ExpertKernels>(dtype: DType) {
    // Each pair of widths compiles kernels of its own; an emulated device takes its time for them.
    let few =
        dtype != DType::F32 && TestBackend::selected().is_ok_and(|b| b.prefers_small_shapes());
    let widths = [(20, 36), (7, 67), (1, 1), (33, 132)];
    let widths = &widths[..if few { 2 } else { widths.len() }];
    for_each_routing::<B>(dtype, |check| {
        for &(a, b) in widths {
            for transposed in [false, true] {
                check.esmm(a, b, transposed, transposed == (a == 7));
            }
            check.estmm(a, b);
            check.ess(b, a == 7);
            check.combine(b, a != 20);
        }
    });
}

/// Two experts with many rows: ESTMM and ESS split their sums and add the parts.
fn split_sums<B: ExpertKernels>() {
    let routing = Routing::new(1500, 1, 2, |slot| usize::from(slot % 5 == 1));
    let check = Check::<B> {
        device: &B::Device::default(),
        routing: &routing,
        dtype: DType::F32,
    };
    check.estmm(3, 5);
    check.estmm(4, 8);
    check.ess(5, true);
    check.ess(8, false);
}

/// Views whose rows are not contiguous give the same bits as their contiguous copies.
fn strided_views<B: ExpertKernels>() {
    let device = B::Device::default();
    let routing = Routing::new(13, 2, 3, |slot| slot * 5 % 3);
    let x = upload::<B, 2>(&values(13 * 12, 1), [12, 13], DType::F32, &device).transpose();
    let w = upload::<B, 3>(&values(3 * 12 * 8, 2), [3, 8, 12], DType::F32, &device);
    let run = |x: Tensor<B, 2>, w: Tensor<B, 3>, transposed| {
        let y = B::esmm(EsmmArgs {
            x: raw(x),
            x_order: RowOrder::Token,
            w: raw(w),
            transposed,
            bias: None,
            out_order: RowOrder::Slot,
            index: routing.index::<B>(&device),
        });
        download::<B, 2>(y, [26, 8], DType::F32)
    };
    let copied = Tensor::from_data(x.to_data(), &device);
    let reference = run(copied, w.clone(), true);
    assert!(reference.iter().any(|v| *v != 0.0));
    assert_eq!(run(x.clone(), w.clone(), true), reference);
    assert_eq!(run(x, w.swap_dims(1, 2), false), reference);
}

/// Without tokens: empty results, and gradients that are exactly zero.
fn no_tokens<B: ExpertKernels>() {
    let device = B::Device::default();
    let routing = Routing::new(0, 2, 3, |_| 0);
    let check = Check::<B> {
        device: &device,
        routing: &routing,
        dtype: DType::F32,
    };
    check.esmm(4, 8, false, true);
    check.estmm(4, 7);
    check.ess(5, true);
    check.combine(8, true);
}

fn in_f32<B: ExpertKernels>() {
    all_operators::<B>(DType::F32);
}

fn in_f16<B: ExpertKernels>() {
    all_operators::<B>(DType::F16);
}

fn in_bf16<B: ExpertKernels>() {
    all_operators::<B>(DType::BF16);
}

fn in_f64<B: ExpertKernels>() {
    all_operators::<B>(DType::F64);
}

backend_test!(kernels operators_match_the_oracle_in_f32, in_f32);
backend_test!(kernels operators_match_the_oracle_in_f16, in_f16);
backend_test!(kernels operators_match_the_oracle_in_bf16, in_bf16);
backend_test!(kernels operators_match_the_oracle_in_f64, in_f64);
backend_test!(kernels split_sums_match_the_oracle, split_sums);
backend_test!(kernels strided_views_are_read_in_place, strided_views);
backend_test!(kernels no_tokens_give_empty_results_and_zero_gradients, no_tokens);
