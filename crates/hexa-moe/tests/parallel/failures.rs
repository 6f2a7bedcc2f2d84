//! Ranks that disagree or are lost: an error on all others, never a hang.

use std::time::Duration;

use burn::backend::Autodiff;
use hexa_moe::backends::Cpu;
use hexa_moe::parallel::comm::local::{self, LocalCommunicator};
use hexa_moe::parallel::comm::{Collective, CommError};
use hexa_moe::parallel::{Communicator, Mode, ParallelContext, exchange_gradients};
use hexa_moe::{MoeConfig, MoeError};

use crate::equivalence::Net;
use crate::support::{Rng, tensor};

/// Runs `rank` as every rank of three.
fn job<T: Send>(rank: impl Fn(LocalCommunicator) -> T + Sync) -> Vec<Option<T>> {
    std::thread::scope(|scope| {
        let rank = &rank;
        let threads: Vec<_> = local::world_with_timeout(3, Duration::from_secs(20))
            .into_iter()
            .map(|comm| scope.spawn(move || rank(comm)))
            .collect();
        threads.into_iter().map(|t| t.join().ok()).collect()
    })
}

#[test]
fn collectives_compute_what_they_say() {
    let outcomes = job(|comm| {
        let me = comm.rank() as f32;
        let part = vec![me; comm.rank()];
        assert_eq!(
            comm.all_gather_v("g", part, &[0, 1, 2]).unwrap(),
            [1.0, 2.0, 2.0]
        );
        let addend = (comm.rank() != 1).then(|| vec![1.0 + me, 2.0, 3.0]);
        let sum = comm.reduce_scatter_v("s", addend, &[1, 0, 2]).unwrap();
        assert_eq!(sum, [&[4.0][..], &[], &[4.0, 6.0]][comm.rank()]);
        assert_eq!(comm.all_reduce("r", vec![me, 1.0]).unwrap(), [3.0, 3.0]);
        assert_eq!(comm.broadcast("b", vec![me; 2], 2, 2).unwrap(), [2.0, 2.0]);
        let all = comm.all_gather_u32("u", vec![comm.rank() as u32]).unwrap();
        assert_eq!(all, [0, 1, 2]);
        // Two in flight, waited for out of order; one that nobody waits for.
        let addend = || Collective::AllReduce { data: vec![me] };
        let first = comm.start("first", addend());
        drop(comm.start("dropped", addend()));
        let second = comm.start("second", addend());
        assert_eq!(second.wait().unwrap().into_f32(), [3.0]);
        assert_eq!(first.wait().unwrap().into_f32(), [3.0]);
        comm.barrier("end").unwrap();
    });
    assert_eq!(outcomes, [Some(()); 3]);
}

/// Sums are in the order of ranks: (1e8 + 1) − 1e8 is 0 in f32, in any other order 1.
#[test]
fn sums_are_in_rank_order() {
    for _ in 0..20 {
        let outcomes = job(|comm| {
            let addend = vec![[1e8, 1.0, -1e8][comm.rank()]];
            comm.all_reduce("sum", addend).unwrap()
        });
        assert_eq!(outcomes, vec![Some(vec![0.0]); 3]);
    }
}

#[test]
fn counts_that_disagree_are_an_error_on_all_ranks() {
    let outcomes = job(|comm| {
        let counts = if comm.rank() == 2 {
            [2, 3, 1]
        } else {
            [2, 2, 2]
        };
        let data = vec![0.0; counts[comm.rank()]];
        comm.all_gather_v("layer 4: w1", data, &counts).unwrap_err()
    });
    for error in outcomes {
        let error = error.unwrap();
        assert!(
            matches!(
                error,
                CommError::Counts {
                    rank: 2,
                    other: 0,
                    ..
                }
            ),
            "{error}"
        );
        let text = error.to_string();
        for part in ["layer 4: w1", "[2, 3, 1]", "[2, 2, 2]"] {
            assert!(text.contains(part), "{text}");
        }
    }
}

#[test]
fn lengths_and_orders_that_disagree_are_errors_on_all_ranks() {
    let outcomes = job(|comm| {
        let data = vec![0.0; if comm.rank() == 1 { 3 } else { 2 }];
        comm.all_gather_v("w2", data, &[2; 3]).unwrap_err()
    });
    for error in outcomes {
        let expected = CommError::Length {
            tensor: "w2".to_owned(),
            rank: 1,
            sent: 3,
            expected: 2,
        };
        assert_eq!(error, Some(expected));
    }
    let outcomes = job(|comm| {
        let name = if comm.rank() == 1 { "b" } else { "a" };
        let error = comm.all_reduce(name, vec![0.0]).unwrap_err();
        // Fail-stop: the communicator stays failed.
        assert_eq!(comm.barrier("later"), Err(error.clone()));
        error
    });
    for error in outcomes {
        assert!(
            matches!(error, Some(CommError::Order { rank: 1, .. })),
            "{error:?}"
        );
    }
}

#[test]
fn a_rank_that_panics_ends_the_others() {
    let outcomes = job(|comm| {
        assert!(comm.rank() != 1, "this rank is meant to die");
        comm.all_reduce("gradients", vec![0.0]).unwrap_err()
    });
    assert_eq!(outcomes[1], None);
    for rank in [0, 2] {
        let error = outcomes[rank].clone().unwrap();
        assert!(error.to_string().contains("rank 1 panicked"), "{error}");
    }
}

/// A rank that is slow to take the result of a collective still gets it when another rank, which
/// had taken part, is lost before.
#[test]
fn what_all_ranks_came_to_outlives_a_rank() {
    let mut world = local::world_with_timeout(2, Duration::from_secs(20));
    let (other, comm) = (world.pop().unwrap(), world.pop().unwrap());
    let addend = |x: f32| Collective::AllReduce { data: vec![x] };
    let slow = comm.start("before", addend(1.0));
    assert_eq!(other.all_reduce("before", vec![2.0]), Ok(vec![3.0]));
    drop(other);
    let alone = comm.start("between", addend(1.0));
    let error = comm.barrier("after").unwrap_err();
    assert!(
        matches!(error, CommError::RankLost { rank: 1, .. }),
        "{error}"
    );
    assert_eq!(slow.wait().unwrap().into_f32(), [3.0]);
    assert_eq!(alone.wait(), Err(error.clone()));
    assert_eq!(comm.barrier("later"), Err(error));
}

#[test]
fn a_rank_that_hangs_is_named_in_time() {
    let mut world = local::world_with_timeout(2, Duration::from_millis(50));
    let (_silent, comm) = (world.pop(), world.swap_remove(0));
    let error = comm.barrier("start").unwrap_err();
    assert!(
        matches!(&error, CommError::Timeout { ranks, .. } if ranks == &[1]),
        "{error}"
    );
}

/// A rank dies between the passes: the others' backward passes end, and the error comes out.
#[test]
fn a_loss_in_the_backward_pass_is_reported() {
    for mode in [Mode::DataCentric, Mode::ModelCentric] {
        let outcomes = job(|comm| {
            let rank = comm.rank();
            let context = ParallelContext::new(comm);
            let config = MoeConfig::new(4, 6, 2);
            let net = Net::<Autodiff<Cpu>>::new(&config, 2).parallel(&context, mode, &[2; 3]);
            let x = tensor(&Rng::new(3).vec(12), [3, 4]);
            let loss = net.forward(x).unwrap().loss();
            assert!(rank != 2, "this rank is meant to die");
            let mut grads = loss.backward();
            let mut grads = burn::optim::GradientsParams::from_module(&mut grads, &net);
            exchange_gradients(&context, &net, &mut grads).unwrap_err()
        });
        for rank in [0, 1] {
            let error = outcomes[rank].clone().unwrap();
            let lost = matches!(error, MoeError::Comm(CommError::RankLost { rank: 2, .. }));
            assert!(lost, "{error}");
        }
    }
}
