//! The pipeline-shared cache: bytes held for gathered weights do not grow with depth.

use burn::backend::Autodiff;
use hexa_moe::MoeConfig;
use hexa_moe::backends::Cpu;
use hexa_moe::parallel::{Mode, ParallelContext, comm::local};

use crate::equivalence::Net;
use crate::support::{Rng, tensor};

type B = Autodiff<Cpu>;

/// Bytes held after a forward pass, and the most that were held in it and its backward pass.
fn bytes(layers: usize, shared: bool) -> [usize; 3] {
    let config = MoeConfig::new(6, 10, 3);
    let ranks = local::world(2).into_iter().map(|comm| {
        let config = config.clone();
        std::thread::spawn(move || {
            let context = ParallelContext::with_cache(comm, shared);
            let net = Net::<B>::new(&config, layers).parallel(&context, Mode::DataCentric, &[7, 3]);
            let x = tensor::<B, 2>(&Rng::new(3).vec(30), [5, 6]);
            let loss = net.forward(x).unwrap().loss();
            let held = context.cache().bytes_held();
            drop(loss.backward());
            context.check().unwrap();
            [
                held,
                context.cache().peak_bytes(),
                context.cache().bytes_held(),
            ]
        })
    });
    let ranks: Vec<_> = ranks.collect();
    let all: Vec<[usize; 3]> = ranks.into_iter().map(|r| r.join().unwrap()).collect();
    assert_eq!(all[0], all[1]);
    all[0]
}

#[test]
fn bytes_do_not_grow_with_depth() {
    let layer = 4 * 3 * (6 * 10 + 10 + 10 * 6);
    let shallow = bytes(2, true);
    assert_eq!(shallow, [layer, layer, 0]);
    assert_eq!(bytes(8, true), shallow);
}

#[test]
fn without_sharing_they_grow_linearly() {
    let layer = 4 * 3 * (6 * 10 + 10 + 10 * 6);
    assert_eq!(bytes(2, false)[..2], [2 * layer, 2 * layer]);
    assert_eq!(bytes(8, false)[..2], [8 * layer, 8 * layer]);
}
