//! NCCL with ranks as threads, one per CUDA device that there is. `tests/mpi` runs the same with ranks
//! as processes.

mod collectives;
#[allow(dead_code, reason = "shared with the tests of other engines")]
#[path = "../parallel/equivalence.rs"]
mod equivalence;
mod shared;
#[allow(dead_code, reason = "shared with the tests of the layer on one device")]
#[path = "../moe/support.rs"]
mod support;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use burn::backend::Autodiff;
use hexa_moe::backends::{Cpu, Cuda};
use hexa_moe::parallel::comm::nccl::{NcclCommunicator, device_count, obstacle};
use hexa_moe::parallel::comm::{CommError, local};
use hexa_moe::parallel::{Communicator, Mode};
use hexa_ops::testing::backend::skip;
use hexa_ops::testing::watch::watched;

use equivalence::{Case, cases, check, check_on};
use shared::Shared;

const TIMEOUT: Duration = Duration::from_secs(60);

/// Two jobs at a time on one device may wait for each other.
static DEVICES: Mutex<()> = Mutex::new(());

/// Runs `rank` as every rank of a job over all devices; says why if there are none.
fn job<T: Send>(
    name: &str,
    rank: impl Fn(Result<NcclCommunicator, CommError>) -> T + Sync,
    device: impl Fn(usize) -> usize + Sync,
) -> Vec<T> {
    if let Some(reason) = obstacle() {
        skip(name, &reason);
        return Vec::new();
    }
    let _devices = DEVICES.lock().unwrap_or_else(PoisonError::into_inner);
    let ranks = local::world_with_timeout(device_count(), TIMEOUT);
    println!("{name}: {} rank(s)", ranks.len());
    std::thread::scope(|scope| {
        let (rank, device) = (&rank, &device);
        let threads: Vec<_> = ranks
            .into_iter()
            .enumerate()
            .map(|(i, comm)| {
                scope.spawn(move || rank(NcclCommunicator::init(comm, device(i), TIMEOUT)))
            })
            .collect();
        threads
            .into_iter()
            .map(|t| t.join().expect("a rank panicked"))
            .collect()
    })
}

#[test]
fn host_collectives_compute_what_they_say() {
    job(
        "host collectives",
        |comm| collectives::on_host(&comm.unwrap()).unwrap(),
        |i| i,
    );
}

#[test]
fn device_collectives_compute_what_they_say() {
    let rank = |comm: Result<NcclCommunicator, CommError>| {
        collectives::on_device(&comm.unwrap()).unwrap();
    };
    if obstacle().is_none() {
        watched::<Cuda>(|| drop(job("device collectives", rank, |i| i)));
    } else {
        job("device collectives", rank, |i| i);
    }
}

#[test]
fn counts_that_disagree_are_an_error_on_all_ranks() {
    let rank = |comm: Result<NcclCommunicator, CommError>| {
        let comm = comm.unwrap();
        let ranks = comm.world_size();
        // Alone, a rank can only disagree with its own tensor.
        let own = if comm.rank() + 1 == ranks { 3 } else { 2 };
        let error = comm.all_gather_v("layer 4: w1", vec![0.0; own], &vec![2; ranks]);
        let error = error.unwrap_err();
        assert_eq!(comm.barrier("later"), Err(error.clone()));
        (error, ranks)
    };
    for (error, ranks) in job("counts", rank, |i| i) {
        let expected = CommError::Length {
            tensor: "layer 4: w1".to_owned(),
            rank: ranks - 1,
            sent: 3,
            expected: 2,
        };
        assert_eq!(error, expected);
    }
}

#[test]
fn a_device_that_is_not_there_is_an_error_on_all_ranks() {
    let rank = |comm: Result<NcclCommunicator, CommError>| comm.unwrap_err().to_string();
    for (i, error) in job("device 99", rank, |i| if i == 0 { 99 } else { i })
        .iter()
        .enumerate()
    {
        let part = if i == 0 {
            "no CUDA device 99"
        } else {
            "rank(s) [0] could not join"
        };
        assert!(error.contains(part), "{error}");
    }
}

/// All cases, computed on the CPU: data go through page-locked memory.
#[test]
fn layers_on_the_host_equal_one_device() {
    let rank = |comm: Result<NcclCommunicator, CommError>| {
        let comm = Shared(Arc::new(comm.unwrap()));
        for case in cases(comm.world_size()) {
            let outcome = check::<Autodiff<Cpu>, Autodiff<Cpu>>(comm.clone(), &case);
            outcome.unwrap_or_else(|e| panic!("rank {} of {case:?}: {e}", comm.rank()));
        }
    };
    job("layers on the host", rank, |i| i);
}

/// Computed on the devices, where tensors stay.
#[test]
fn layers_on_devices_equal_one_device() {
    let rank = |comm: Result<NcclCommunicator, CommError>| {
        let comm = Shared(Arc::new(comm.unwrap()));
        let cases = shared::cases_without_empty_ranks(comm.world_size());
        assert!(cases.iter().any(|case| case.mode == Mode::DataCentric));
        assert!(cases.iter().any(|case| case.mode == Mode::ModelCentric));
        for case in cases {
            let case = Case {
                tolerance: 1e-4,
                ..case
            };
            let device = comm.0.device();
            let outcome = check_on::<Autodiff<Cuda>, Autodiff<Cpu>>(comm.clone(), &case, device);
            outcome.unwrap_or_else(|e| panic!("rank {} of {case:?}: {e}", comm.rank()));
        }
    };
    if obstacle().is_none() {
        watched::<Cuda>(|| drop(job("layers on devices", rank, |i| i)));
    } else {
        job("layers on devices", rank, |i| i);
    }
}
