//! Index, gating, activation and dense product, kernel by kernel, against loops in f64 on the
//! back-end that `HEXA_TEST_BACKEND` names.

mod activation;
mod dense;
mod fusion;
mod gating;
mod index;

use burn::tensor::backend::Backend;
use burn::tensor::ops::{FloatTensor, IntTensor};
use burn::tensor::{Int, Tensor, TensorData, TensorPrimitive};
use hexa_ops::host::{download, upload};

/// Reproducible numbers in `[-1, 1)`, exact in f32.
struct Numbers(u64);

impl Numbers {
    fn draw(&mut self) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 33
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.draw() % bound as u64) as usize
    }

    fn values(&mut self, len: usize) -> Vec<f64> {
        (0..len)
            .map(|_| (self.draw() >> 11) as f64 / f64::from(1 << 19) - 1.0)
            .collect()
    }
}

fn float<B: Backend, const D: usize>(values: &[f64], shape: [usize; D]) -> Tensor<B, D> {
    upload(TensorData::new(values.to_vec(), shape), &Default::default())
}

fn int<B: Backend, const D: usize>(values: &[i64], shape: [usize; D]) -> Tensor<B, D, Int> {
    upload(TensorData::new(values.to_vec(), shape), &Default::default())
}

fn raw<B: Backend, const D: usize>(tensor: Tensor<B, D>) -> FloatTensor<B> {
    tensor.into_primitive().tensor()
}

fn tensor<B: Backend, const D: usize>(primitive: FloatTensor<B>) -> Tensor<B, D> {
    Tensor::from_primitive(TensorPrimitive::Float(primitive))
}

/// Shape and elements of a float result.
fn floats<B: Backend, const D: usize>(primitive: FloatTensor<B>) -> ([usize; D], Vec<f64>) {
    let tensor = tensor::<B, D>(primitive);
    (
        tensor.dims(),
        download(tensor).unwrap().iter::<f64>().collect(),
    )
}

/// Elements of an int result of rank `D`.
fn ints<B: Backend, const D: usize>(primitive: IntTensor<B>) -> Vec<usize> {
    download(Tensor::<B, D, Int>::from_primitive(primitive))
        .unwrap()
        .iter::<i64>()
        .map(|value| usize::try_from(value).expect("no result is negative"))
        .collect()
}

/// Fails on shapes, on anything not finite and on a difference above `atol + rtol · |expected|`.
#[track_caller]
fn assert_close(what: &str, got: &[f64], expected: &[f64], [atol, rtol]: [f64; 2]) {
    assert_eq!(got.len(), expected.len(), "{what}: number of elements");
    for (i, (&got, &expected)) in got.iter().zip(expected).enumerate() {
        let difference = (got - expected).abs();
        assert!(
            difference <= atol + rtol * expected.abs(),
            "{what}, element {i}: {got:e}, expected {expected:e}"
        );
    }
}
