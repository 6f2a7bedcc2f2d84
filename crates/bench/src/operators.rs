//! The operators by themselves: ESMM as the layer's four products with rows have it, ESTMM and ESS.
//! With one expert ESMM is a dense product.

use anyhow::{Result, ensure};
use burn::tensor::backend::Backend;
use burn::tensor::{DType, Distribution, Int, Tensor, TensorData};
use hexa_ops::testing::compare::{host, relative_error};
use hexa_ops::testing::oracle::Routing;
use hexa_ops::{EsmmOptions, ExpertIndex, ExpertKernels, RowOrder, esmm, ess, estmm, topk_gating};
use serde::Serialize;

use crate::case::{Setting, Shape, gumbel_logits, time};
use crate::verify::tolerance;

/// Rows of a result that are compared at most.
const ROWS: usize = 23;

/// Multiplications that the comparison of one operator may take.
const WORK: usize = 1 << 28;

/// One operator, timed.
#[derive(Debug, Serialize)]
pub struct Timing {
    /// Its name, and what it multiplies.
    pub operator: &'static str,
    /// Seconds of each repetition, ascending.
    pub seconds: Vec<f64>,
    /// Floating-point operations.
    pub flops: f64,
    /// Bytes of its operands and its result, each once.
    pub bytes: f64,
}

/// An ESMM of the layer.
struct Product<'a, B: Backend> {
    name: &'static str,
    a: &'a Tensor<B, 2>,
    w: &'a Tensor<B, 3>,
    options: EsmmOptions,
}

/// Times each operator at the shape, after comparing parts of its result with sums in f64.
///
/// # Errors
/// An operator that refuses or is wrong, and failures of the device.
pub fn measure<B: ExpertKernels>(
    setting: Setting,
    repetitions: u32,
    device: &B::Device,
) -> Result<Vec<Timing>> {
    let Setting {
        shape, dtype, skew, ..
    } = setting;
    let Shape {
        tokens,
        d_model,
        d_ff,
        num_experts,
        top_k,
    } = shape;
    let slots = tokens * top_k;
    let random = |rows, columns| -> Tensor<B, 2> {
        Tensor::<B, 2>::random([rows, columns], Distribution::Normal(0.0, 1.0), device).cast(dtype)
    };
    let stack = |rows: usize, columns: usize| -> Tensor<B, 3> {
        let scaled = Distribution::Normal(0.0, (rows as f64).powf(-0.5));
        Tensor::<B, 3>::random([num_experts, rows, columns], scaled, device).cast(dtype)
    };
    let gating = topk_gating(
        gumbel_logits::<B>(tokens, num_experts, skew, device),
        top_k,
        true,
    )?;
    let index = ExpertIndex::from_gating(&gating);
    let ids = gating.expert_ids.into_data();
    let ids = ids.iter::<i64>().map(|id| id as usize).collect();
    let check = Check::new(Routing::new(tokens, top_k, num_experts, ids), dtype);

    let (x, h) = (random(tokens, d_model), random(slots, d_ff));
    let (w1, w2) = (stack(d_model, d_ff), stack(d_ff, d_model));
    let options = |x_order, transposed, out_order| EsmmOptions {
        x_order,
        transposed,
        out_order,
    };
    let (token, slot, expert) = (RowOrder::Token, RowOrder::Slot, RowOrder::Expert);
    let products = [
        ("ESMM x W1", &x, &w1, options(token, false, expert)),
        ("ESMM h W2", &h, &w2, options(expert, false, slot)),
        ("ESMM dy W2ᵀ", &x, &w2, options(token, true, expert)),
        ("ESMM dh W1ᵀ", &h, &w1, options(expert, true, slot)),
    ]
    .map(|(name, a, w, options)| Product {
        name,
        a,
        w,
        options,
    });

    let element = dtype.size() as f64;
    let matrix = (d_model * d_ff) as f64;
    let flops = 2.0 * slots as f64 * matrix;
    let weights = num_experts as f64 * matrix;
    let rows = (tokens * d_model + slots * d_ff) as f64;
    let mut timings = Vec::new();
    let mut add = |operator, flops, elements: f64, work: &dyn Fn() -> Result<()>| -> Result<()> {
        timings.push(Timing {
            operator,
            seconds: time::<B>(repetitions, device, work)?,
            flops,
            bytes: elements * element,
        });
        Ok(())
    };
    for product in &products {
        let run = || -> Result<_> {
            let Product { a, w, options, .. } = product;
            Ok(esmm((*a).clone(), (*w).clone(), None, &index, *options)?)
        };
        check.rows(product, run()?)?;
        // A result in the tokens' width has a row for each slot.
        let elements = match product.options.x_order {
            RowOrder::Token => rows,
            _ => (slots * (d_model + d_ff)) as f64,
        };
        add(product.name, flops, elements + weights, &|| run().map(drop))?;
    }
    let sums = || -> Result<_> { Ok(estmm(x.clone(), token, h.clone(), expert, &index)?) };
    check.sums(&x, &h, sums()?)?;
    add("ESTMM xᵀ h", flops, rows + weights, &|| sums().map(drop))?;
    let sum = || -> Result<_> { Ok(ess(h.clone(), expert, &index)?) };
    check.sum(&h, sum()?)?;
    let elements = ((slots + num_experts) * d_ff) as f64;
    add("ESS h", (slots * d_ff) as f64, elements, &|| {
        sum().map(drop)
    })?;
    Ok(timings)
}

/// What is compared with sums in f64.
struct Check {
    routing: Routing,
    /// Slot at each position, and position of each slot.
    slots: Vec<usize>,
    positions: Vec<usize>,
    allowed: f64,
}

impl Check {
    fn new(routing: Routing, dtype: DType) -> Self {
        let slots = routing.slots();
        let mut positions = vec![0; slots.len()];
        for (position, &slot) in slots.iter().enumerate() {
            positions[slot] = position;
        }
        Self {
            routing,
            slots,
            positions,
            allowed: tolerance(dtype),
        }
    }

    /// Row of a slot in a matrix of this order.
    fn row(&self, slot: usize, order: RowOrder) -> usize {
        match order {
            RowOrder::Token => slot / self.routing.top_k,
            RowOrder::Slot => slot,
            RowOrder::Expert => self.positions[slot],
        }
    }

    /// Rows all over the result, the first and the last position's among them.
    fn rows<B: Backend>(&self, product: &Product<'_, B>, result: Tensor<B, 2>) -> Result<()> {
        let Product {
            name,
            a,
            w,
            options,
        } = product;
        let [_, rows, columns] = w.dims();
        let count = (WORK / (rows * columns))
            .clamp(2, ROWS)
            .min(self.slots.len());
        let last = self.slots.len() - 1;
        let chosen: Vec<usize> = (0..count)
            .map(|i| self.slots[i * last / (count - 1).max(1)])
            .collect();
        let rows_of = |order| {
            let rows = chosen.iter().map(|&slot| self.row(slot, order));
            rows.collect::<Vec<_>>()
        };
        let got = host(select(&result, 0, &rows_of(options.out_order)));
        let inputs = host(select(a, 0, &rows_of(options.x_order)));
        let [_, width] = a.dims();
        let mut expected = Vec::with_capacity(got.len());
        for (&slot, input) in chosen.iter().zip(inputs.chunks(width)) {
            let expert = self.routing.expert_ids[slot];
            let matrix = (*w)
                .clone()
                .slice(expert..expert + 1)
                .reshape([rows, columns]);
            let matrix = host(if options.transposed {
                matrix.transpose()
            } else {
                matrix
            });
            let out = matrix.len() / width;
            let mut row = vec![0.0; out];
            for (&x, weights) in input.iter().zip(matrix.chunks(out)) {
                for (sum, weight) in row.iter_mut().zip(weights) {
                    *sum += x * weight;
                }
            }
            expected.extend(row);
        }
        self.close(name, &got, &expected)
    }

    /// The elements of every expert in three rows and three columns.
    fn sums<B: Backend>(
        &self,
        x: &Tensor<B, 2>,
        h: &Tensor<B, 2>,
        result: Tensor<B, 3>,
    ) -> Result<()> {
        let [_, m, n] = result.dims();
        let (rows, columns) = (three(m), three(n));
        let got = host(select(&select(&result, 1, &rows), 2, &columns));
        let (x, h) = (host(select(x, 1, &rows)), host(select(h, 1, &columns)));
        let mut expected = vec![0.0; self.routing.num_experts * rows.len() * columns.len()];
        for (position, &slot) in self.slots.iter().enumerate() {
            let expert = self.routing.expert_ids[slot];
            for i in 0..rows.len() {
                let x = x[self.row(slot, RowOrder::Token) * rows.len() + i];
                for j in 0..columns.len() {
                    expected[(expert * rows.len() + i) * columns.len() + j] +=
                        x * h[position * columns.len() + j];
                }
            }
        }
        self.close("ESTMM", &got, &expected)
    }

    /// The sums of every expert in three columns.
    fn sum<B: Backend>(&self, h: &Tensor<B, 2>, result: Tensor<B, 2>) -> Result<()> {
        let columns = three(h.dims()[1]);
        let got = host(select(&result, 1, &columns));
        let h = host(select(h, 1, &columns));
        let mut expected = vec![0.0; self.routing.num_experts * columns.len()];
        for (row, &slot) in h.chunks(columns.len()).zip(&self.slots) {
            let expert = self.routing.expert_ids[slot];
            for (sum, x) in expected[expert * columns.len()..].iter_mut().zip(row) {
                *sum += x;
            }
        }
        self.close("ESS", &got, &expected)
    }

    fn close(&self, name: &str, got: &[f64], expected: &[f64]) -> Result<()> {
        let error = relative_error(got, expected);
        ensure!(
            error <= self.allowed,
            "{name} differs from sums in f64 by {error:e} (relative norm), allowed is {:e}",
            self.allowed
        );
        Ok(())
    }
}

/// The first, a middle and the last of `len`.
fn three(len: usize) -> Vec<usize> {
    vec![0, len / 2, len - 1]
}

fn select<B: Backend, const D: usize>(
    tensor: &Tensor<B, D>,
    dim: usize,
    indices: &[usize],
) -> Tensor<B, D> {
    let indices: Vec<i32> = indices.iter().map(|&i| i as i32).collect();
    let indices = TensorData::from(indices.as_slice());
    let indices = Tensor::<B, 1, Int>::from_data(indices, &tensor.device());
    tensor.clone().select(dim, indices)
}

#[cfg(all(test, feature = "cpu"))]
mod tests {
    use hexa_ops::Favor;
    use hexa_ops::backends::Cpu;

    use super::*;

    #[test]
    fn operators_are_verified_at_odd_shapes() {
        for (num_experts, top_k, skew) in [(1, 1, 0.0), (5, 3, 1.2), (4, 4, 0.0)] {
            let setting = Setting {
                shape: Shape {
                    tokens: 37,
                    d_model: 9,
                    d_ff: 14,
                    num_experts,
                    top_k,
                },
                dtype: DType::F32,
                skew,
                favor: Favor::Speed,
            };
            let timings = measure::<Cpu>(setting, 1, &Default::default()).unwrap();
            assert_eq!(timings.len(), 6);
            assert_eq!(timings[0].flops, (2 * 37 * top_k * 9 * 14) as f64);
        }
    }

    #[test]
    fn a_wrong_result_is_told() {
        let routing = Routing::new(3, 1, 2, vec![1, 0, 1]);
        let check = Check::new(routing, DType::F32);
        let h = Tensor::<Cpu, 2>::ones([3, 4], &Default::default());
        let right = Tensor::from_data([[1.0; 4], [2.0; 4]], &Default::default());
        assert!(check.sum(&h, right).is_ok());
        let wrong = check.sum(&h, Tensor::ones([2, 4], &Default::default()));
        assert!(wrong.unwrap_err().to_string().contains("ESS differs"));

        // Expert 0 has the middle token, expert 1 the others.
        let x = Tensor::<Cpu, 2>::from_data([[1.0], [2.0], [3.0]], &Default::default());
        let sums = |a, b| Tensor::<Cpu, 3>::from_data([[[a]], [[b]]], &Default::default());
        let ones = Tensor::<Cpu, 2>::ones([3, 1], &Default::default());
        assert!(check.sums(&x, &ones, sums(2.0, 4.0)).is_ok());
        let wrong = check.sums(&x, &ones, sums(4.0, 2.0));
        assert!(wrong.unwrap_err().to_string().contains("ESTMM differs"));

        let product = Product {
            name: "ESMM",
            a: &x,
            w: &sums(10.0, 100.0),
            options: EsmmOptions {
                out_order: RowOrder::Expert,
                ..EsmmOptions::default()
            },
        };
        let rows = |rows: [[f64; 1]; 3]| Tensor::<Cpu, 2>::from_data(rows, &Default::default());
        let right = rows([[20.0], [100.0], [300.0]]);
        assert!(check.rows(&product, right).is_ok());
        let wrong = check.rows(&product, rows([[100.0], [20.0], [300.0]]));
        assert!(wrong.unwrap_err().to_string().contains("ESMM differs"));
    }
}
