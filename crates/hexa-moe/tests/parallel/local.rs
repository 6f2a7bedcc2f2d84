//! Ranks as threads against one device.

use std::time::Duration;

use burn::backend::Autodiff;
use hexa_moe::Activation;
use hexa_moe::backends::Cpu;
use hexa_moe::parallel::{Mode, comm::local};
use hexa_moe::{BalanceConfig, MoeConfig, RouterConfig};
use proptest::prelude::*;

use crate::equivalence::{Case, cases, check};

/// Runs all ranks of a case; the first rank that differs is the error.
fn run(case: &Case) -> Result<(), String> {
    let communicators = local::world_with_timeout(case.tokens.len(), Duration::from_secs(20));
    std::thread::scope(|scope| {
        let ranks: Vec<_> = communicators
            .into_iter()
            .enumerate()
            .map(|(rank, comm)| {
                let check = || check::<Autodiff<Cpu>, Autodiff<Cpu>>(comm, case);
                (rank, scope.spawn(check))
            })
            .collect();
        ranks.into_iter().try_for_each(|(rank, thread)| {
            let outcome = thread.join().map_err(|_| "panicked".to_owned());
            outcome
                .and_then(|outcome| outcome)
                .map_err(|error| format!("rank {rank} of {case:?}: {error}"))
        })
    })
}

fn equal(ranks: usize) {
    for case in cases(ranks) {
        if let Err(error) = run(&case) {
            panic!("{error}");
        }
    }
}

#[test]
fn one_rank_equals_one_device() {
    equal(1);
}

#[test]
fn two_ranks_equal_one_device() {
    equal(2);
}

#[test]
fn three_ranks_equal_one_device() {
    equal(3);
}

#[test]
fn four_ranks_equal_one_device() {
    equal(4);
}

fn any_case() -> impl Strategy<Value = Case> {
    let ranks = (1usize..=4).prop_flat_map(|ranks| {
        let tokens = prop::collection::vec(0usize..6, ranks);
        let split = prop::collection::vec(0u8..4, ranks);
        (tokens, split)
    });
    let config = (
        1usize..6,
        1usize..9,
        1usize..5,
        0usize..6,
        any::<[bool; 4]>(),
    );
    (ranks, config, 1usize..=3, any::<[bool; 2]>()).prop_map(
        |((mut tokens, split), (d, d_ff, experts, activation, flags), layers, modes)| {
            // Somebody has a token, and a slice.
            tokens[0] += 1;
            let mut split: Vec<f64> = split.into_iter().map(f64::from).collect();
            split[tokens.len() - 1] += 1.0;
            let router = RouterConfig::Cosine {
                dim: 3,
                init_temperature: 0.5,
            };
            Case {
                config: MoeConfig::new(d, d_ff, experts)
                    .with_top_k(if flags[0] { experts } else { 1 })
                    .with_router(if flags[1] {
                        router
                    } else {
                        RouterConfig::Linear
                    })
                    .with_activation(Activation::ALL[activation])
                    .with_bias(flags[2])
                    .with_train_fc2_bias(flags[3])
                    .with_balance(BalanceConfig::gshard(0.1).with_z_loss(0.1)),
                layers,
                mode: if modes[0] {
                    Mode::DataCentric
                } else {
                    Mode::ModelCentric
                },
                split,
                tokens,
                shared_cache: modes[1],
                tolerance: 2e-5,
            }
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..Default::default() })]

    #[test]
    fn any_split_equals_one_device(case in any_case()) {
        run(&case).map_err(TestCaseError::fail)?;
    }
}
