//! The dense product.

use burn::tensor::{FloatDType, Tensor, TensorPrimitive};
use hexa_ops::host::download;
use hexa_ops::testing::backend::skip;
use hexa_ops::testing::oracle::Matmul;
use hexa_ops::{ExpertKernels, MatmulPrecision, backend_test};

use crate::{Numbers, assert_close, float, floats, raw};

fn product(lhs: &[f64], rhs: &[f64], [batches, m, k, n]: [usize; 4]) -> Vec<f64> {
    Matmul {
        lhs,
        rhs,
        batches,
        m,
        k,
        n,
    }
    .forward()
}

fn check<K: ExpertKernels>(
    what: &str,
    lhs: Tensor<K, 3>,
    rhs: Tensor<K, 3>,
    precision: MatmulPrecision,
) {
    let [batches, m, k] = lhs.dims();
    let n = rhs.dims()[2];
    let host = |tensor: &Tensor<K, 3>| -> Vec<f64> {
        download(tensor.clone()).unwrap().iter::<f64>().collect()
    };
    let expected = product(&host(&lhs), &host(&rhs), [batches, m, k, n]);
    let (shape, got) = floats::<K, 3>(K::dense_matmul(
        raw(lhs),
        raw(rhs),
        precision,
        FloatDType::F32,
    ));
    assert_eq!(shape, [batches, m, n], "{what}");
    // Entries are at most one. Each of the k roundings of strict f32 errs by half a unit of a
    // partial sum; TF32 keeps eleven bits of each factor.
    let atol = match precision {
        MatmulPrecision::Strict => 6e-8 * k.max(16) as f64,
        _ => 1e-3 * (k as f64).sqrt().max(4.0),
    };
    assert_close(what, &got, &expected, [atol, 0.0]);
}

const SHAPES: [[usize; 4]; 26] = [
    [1, 1, 1, 1],
    [3, 1, 1, 1],
    [1, 1, 37, 1],
    [1, 37, 1, 1],
    [1, 1, 1, 37],
    [1, 1, 19, 23],
    [1, 23, 19, 1],
    [1, 23, 1, 19],
    [2, 7, 5, 3],
    [3, 31, 37, 29],
    [1, 64, 64, 64],
    [1, 65, 33, 130],
    // K in odd numbers of stages: where double-buffered kernels read past the end.
    [1, 128, 8, 64],
    [1, 40, 32, 48],
    [1, 40, 96, 48],
    [1, 40, 160, 288],
    [1, 100, 288, 36],
    [5, 16, 24, 16],
    [2, 4, 500, 4],
    [7, 2, 2, 2],
    [1, 2, 300, 1],
    [2, 1, 300, 2],
    // Sums that are cut into 3, 12 and 8 parts; and two products, whose sums are not.
    [1, 9, 768, 20],
    [1, 70, 3072, 5],
    [1, 130, 2048, 65],
    [2, 9, 768, 20],
];

fn shapes<K: ExpertKernels>() {
    let mut numbers = Numbers(10);
    for precision in [MatmulPrecision::Strict, MatmulPrecision::Tf32] {
        for shape @ [batches, m, k, n] in SHAPES {
            let lhs = float::<K, 3>(&numbers.values(batches * m * k), [batches, m, k]);
            let rhs = float::<K, 3>(&numbers.values(batches * k * n), [batches, k, n]);
            check(&format!("{shape:?} {precision:?}"), lhs, rhs, precision);
        }
    }
}
backend_test!(kernels products_of_all_shapes, shapes);

/// Half-precision operands: sums in f32, handed out as they are or rounded once.
fn half_precision<K: ExpertKernels>() {
    let device = Default::default();
    let mut numbers = Numbers(14);
    for (dtype, precision, unit) in [
        (FloatDType::BF16, MatmulPrecision::Bf16, 1.0 / 256.0),
        (FloatDType::F16, MatmulPrecision::F16, 1.0 / 2048.0),
    ] {
        if !<K as ExpertKernels>::supports_precision(&device, precision) {
            skip("half_precision_products", &format!("no {dtype:?} here"));
            continue;
        }
        for shape @ [batches, m, k, n] in SHAPES {
            let rounded = |numbers: &mut Numbers, dims: [usize; 3]| {
                float::<K, 3>(&numbers.values(dims.iter().product()), dims).cast(dtype)
            };
            let lhs = rounded(&mut numbers, [batches, m, k]);
            let rhs = rounded(&mut numbers, [batches, k, n]);
            let host = |tensor: &Tensor<K, 3>| -> Vec<f64> {
                let wide = tensor.clone().cast(FloatDType::F32);
                download(wide).unwrap().iter::<f64>().collect()
            };
            let expected = product(&host(&lhs), &host(&rhs), shape);
            for (out, unit) in [(FloatDType::F32, 0.0), (dtype, unit)] {
                let what = format!("{shape:?} {dtype:?} to {out:?}");
                let y = K::dense_matmul(raw(lhs.clone()), raw(rhs.clone()), precision, out);
                let y = Tensor::<K, 3>::from_primitive(TensorPrimitive::Float(y));
                assert_eq!(FloatDType::from(y.dtype()), out, "{what}");
                assert_eq!(y.dims(), [batches, m, n], "{what}");
                let atol = 6e-8 * k.max(16) as f64;
                assert_close(&what, &host(&y), &expected, [atol, unit]);
            }
        }
    }
}
backend_test!(kernels half_precision_products, half_precision);

/// Views of the operands that are not contiguous, by name; the matrices stay the same.
fn views<K: ExpertKernels>(dense: Tensor<K, 3>) -> [(&'static str, Tensor<K, 3>); 4] {
    let [batches, rows, columns] = dense.dims();
    let transposed = dense
        .clone()
        .swap_dims(1, 2)
        .mul_scalar(1.0)
        .swap_dims(1, 2);
    let batch_last = dense
        .clone()
        .permute([1, 2, 0])
        .mul_scalar(1.0)
        .permute([2, 0, 1]);
    let batch_middle = dense
        .clone()
        .swap_dims(0, 1)
        .mul_scalar(1.0)
        .swap_dims(0, 1);
    let padding = Tensor::zeros([batches, rows, 5], &dense.device());
    let padded = Tensor::cat(vec![dense, padding], 2).slice([0..batches, 0..rows, 0..columns]);
    [
        ("transposed", transposed),
        ("batch last", batch_last),
        ("batch in the middle", batch_middle),
        ("padded", padded),
    ]
}

fn strides<K: ExpertKernels>() {
    let mut numbers = Numbers(11);
    for [batches, m, k, n] in [
        [1, 17, 24, 9],
        [3, 8, 16, 12],
        [2, 33, 5, 1],
        [2, 1, 7, 33],
        [1, 6, 1024, 10],
    ] {
        let lhs = float::<K, 3>(&numbers.values(batches * m * k), [batches, m, k]);
        let rhs = float::<K, 3>(&numbers.values(batches * k * n), [batches, k, n]);
        for (name, view) in views(lhs.clone()) {
            let what = format!("{name} left, {m}×{k}×{n}");
            check(&what, view, rhs.clone(), MatmulPrecision::Strict);
        }
        for (name, view) in views(rhs) {
            let what = format!("{name} right, {m}×{k}×{n}");
            check(&what, lhs.clone(), view, MatmulPrecision::Strict);
        }
    }
}
backend_test!(kernels operands_may_have_any_strides, strides);

fn broadcast<K: ExpertKernels>() {
    let mut numbers = Numbers(12);
    let lhs = float::<K, 3>(&numbers.values(3 * 5 * 8), [3, 5, 8]);
    let rhs = float::<K, 3>(&numbers.values(8 * 4), [1, 8, 4]).expand([3, 8, 4]);
    check("batch", lhs.clone(), rhs, MatmulPrecision::Strict);
    let row = float::<K, 3>(&numbers.values(12), [3, 1, 4]).expand([3, 8, 4]);
    check("rows", lhs, row, MatmulPrecision::Strict);
}
backend_test!(kernels operands_may_be_broadcast, broadcast);

fn empty<K: ExpertKernels>() {
    for [batches, m, k, n] in [[0, 2, 3, 4], [2, 0, 3, 4], [2, 3, 4, 0], [2, 3, 0, 4]] {
        let lhs = float::<K, 3>(&vec![1.0; batches * m * k], [batches, m, k]);
        let rhs = float::<K, 3>(&vec![1.0; batches * k * n], [batches, k, n]);
        let out = K::dense_matmul(raw(lhs), raw(rhs), MatmulPrecision::Strict, FloatDType::F32);
        let (shape, got) = floats::<K, 3>(out);
        assert_eq!(shape, [batches, m, n]);
        assert!(
            got.iter().all(|&value| value == 0.0),
            "an empty sum is zero"
        );
    }
}
backend_test!(kernels empty_axes_give_empty_results_or_zeros, empty);

fn ranks<K: ExpertKernels>() {
    let mut numbers = Numbers(13);
    let (a, b) = (numbers.values(2 * 3 * 5 * 4), numbers.values(2 * 3 * 4 * 7));
    let expected = product(&a, &b, [6, 5, 4, 7]);
    let lhs = raw(float::<K, 4>(&a, [2, 3, 5, 4]));
    let rhs = raw(float::<K, 4>(&b, [2, 3, 4, 7]));
    let out = K::dense_matmul(lhs, rhs, MatmulPrecision::Strict, FloatDType::F32);
    let (shape, got) = floats::<K, 4>(out);
    assert_eq!(shape, [2, 3, 5, 7]);
    assert_close("rank 4", &got, &expected, [1e-6, 1e-6]);

    let expected = product(&a[..20], &b[..28], [1, 5, 4, 7]);
    let lhs = raw(float::<K, 2>(&a[..20], [5, 4]));
    let rhs = raw(float::<K, 2>(&b[..28], [4, 7]));
    let out = K::dense_matmul(lhs, rhs, MatmulPrecision::Strict, FloatDType::F32);
    assert_close("rank 2", &floats::<K, 2>(out).1, &expected, [1e-6, 1e-6]);
}
backend_test!(kernels ranks_two_and_four, ranks);
