//! Being told how far a backward pass has come.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use burn::tensor::Tensor;
use hexa_ops::testing::compare::host;
use hexa_ops::{TrainingBackend, backend_test, when_reached};

use crate::cases::tensor;

fn told_in_order<B: TrainingBackend>() {
    let clock = Arc::new(AtomicU32::new(1));
    let [first, last] = [(); 2].map(|()| Arc::new(AtomicU32::new(0)));
    let mark = |x: Tensor<B, 2>, at: &Arc<AtomicU32>| {
        let (clock, at) = (clock.clone(), at.clone());
        let note = move || at.store(clock.fetch_add(1, Ordering::SeqCst), Ordering::SeqCst);
        when_reached(x, note).unwrap()
    };
    let moments = || [&first, &last].map(|at| at.load(Ordering::SeqCst));

    let x = tensor::<B, 2>(&[1.0, -2.0, 3.0], [1, 3]);
    // Nobody differentiates this one, neither here nor without autodiff.
    let y = mark(x.clone(), &first) + 1.0;
    assert_eq!(host(y), [2.0, -1.0, 4.0]);
    assert_eq!(
        host(when_reached(x.clone().inner(), || panic!()).unwrap()),
        host(x.clone())
    );

    let x = x.require_grad();
    let near_the_leaf = mark(x.clone(), &last);
    let y = mark(near_the_leaf * 2.0, &first);
    assert_eq!(moments(), [0, 0]);
    let grads = (y.clone() * y).sum().backward();
    assert_eq!(moments(), [1, 2]);
    let slopes = Tensor::<B, 2>::from_inner(x.grad(&grads).unwrap());
    assert_eq!(host(slopes), [8.0, -16.0, 24.0]);
}

backend_test!(backward_passes_tell_how_far_they_are, told_in_order);
