//! When shares are split anew, and that all ranks decide alike.

use hexa_moe::parallel::{Communicator, RebalanceOptions, Rebalancer, comm::local};
use proptest::prelude::*;

const OPTIONS: RebalanceOptions = RebalanceOptions {
    threshold: 0.2,
    window: 5,
    patience: 3,
    min_gain: 0.05,
};

/// Times of ranks that need `unit_s` seconds per unit.
fn times(shares: &[usize], unit_s: &[f64]) -> Vec<f64> {
    shares
        .iter()
        .zip(unit_s)
        .map(|(&n, s)| n as f64 * s)
        .collect()
}

/// Feeds steps of constant speeds; gives the steps after which shares changed.
fn run(rebalancer: &mut Rebalancer, unit_s: &[f64], steps: usize) -> Vec<usize> {
    let changed = (0..steps).filter(|_| {
        let times = times(rebalancer.shares(), unit_s);
        let shares = rebalancer.observe_all(&times).unwrap();
        if let Some(shares) = &shares {
            assert_eq!(shares, rebalancer.shares());
        }
        shares.is_some()
    });
    changed.collect()
}

#[test]
fn a_device_that_slows_down_gets_less_and_gets_it_back() {
    let mut rebalancer = Rebalancer::new(OPTIONS, vec![32, 32], 1).unwrap();
    assert!(run(&mut rebalancer, &[1.0, 1.0], 40).is_empty());
    // Median of five: three slow steps make it slow, three more are patience.
    assert_eq!(run(&mut rebalancer, &[1.0, 3.0], 40), [4]);
    assert_eq!(rebalancer.shares(), [48, 16]);
    assert_eq!(run(&mut rebalancer, &[1.0, 1.0], 40), [4]);
    assert_eq!(rebalancer.shares(), [32, 32]);
}

#[test]
fn a_few_slow_steps_and_steps_without_a_time_change_nothing() {
    let mut rebalancer = Rebalancer::new(OPTIONS, vec![8, 8], 1).unwrap();
    for step in 0..100 {
        let times = match step % 5 {
            0 => [8.0, 40.0],
            1 => [f64::NAN, 8.0],
            _ => [8.0, 8.0],
        };
        assert_eq!(rebalancer.observe_all(&times).unwrap(), None);
    }
}

#[test]
fn a_share_of_one_sample_is_not_shared_further() {
    // 1 and 2 of 3 samples: a ratio of two, and no better split.
    let mut rebalancer = Rebalancer::new(OPTIONS, vec![2, 1], 1).unwrap();
    assert!(run(&mut rebalancer, &[1.0, 1.0], 50).is_empty());
}

#[test]
fn improper_settings_are_refused() {
    let refused = |options, shares: &[usize], multiple| {
        let error = Rebalancer::new(options, shares.to_vec(), multiple).unwrap_err();
        assert!(error.to_string().contains("allowed is"), "{error}");
    };
    refused(OPTIONS, &[], 1);
    refused(OPTIONS, &[0, 0], 1);
    refused(OPTIONS, &[1], 0);
    refused(
        RebalanceOptions {
            window: 0,
            ..OPTIONS
        },
        &[1],
        1,
    );
    refused(
        RebalanceOptions {
            threshold: f64::NAN,
            ..OPTIONS
        },
        &[1],
        1,
    );
    let mut rebalancer = Rebalancer::new(OPTIONS, vec![4, 4], 1).unwrap();
    let error = rebalancer.observe_all(&[1.0]).unwrap_err().to_string();
    assert!(error.contains("one time per rank"), "{error}");
}

#[test]
fn ranks_decide_alike() {
    let ranks = local::world(3).into_iter().map(|comm| {
        std::thread::spawn(move || {
            let mut rebalancer = Rebalancer::new(OPTIONS, vec![16, 16, 16], 1).unwrap();
            let mut decisions = Vec::new();
            for step in 0..60 {
                let slow = if step > 20 && comm.rank() == 1 {
                    2.0
                } else {
                    1.0
                };
                let busy =
                    slow * rebalancer.shares()[comm.rank()] as f64 * (1.0 + step as f64 / 1e3);
                decisions.push(rebalancer.observe(&comm, busy).unwrap());
            }
            decisions
        })
    });
    let ranks: Vec<_> = ranks.collect();
    let all: Vec<_> = ranks.into_iter().map(|r| r.join().unwrap()).collect();
    assert_eq!(all[0], all[1]);
    assert_eq!(all[0], all[2]);
    let made: Vec<_> = all[0].iter().flatten().collect();
    assert_eq!(made, [&vec![19, 10, 19]]);
}

proptest! {
    /// Whatever the times, shares sum to the whole.
    #[test]
    fn shares_sum_exactly(
        shares in prop::collection::vec(0usize..50, 2..6),
        steps in prop::collection::vec(prop::collection::vec(0.001f64..10.0, 6), 1..60),
        multiple in 1usize..9,
    ) {
        prop_assume!(shares.iter().any(|&s| s > 0));
        let (total, ranks) = (shares.iter().sum::<usize>(), shares.len());
        let options = RebalanceOptions { window: 2, patience: 1, ..OPTIONS };
        let mut rebalancer = Rebalancer::new(options, shares, multiple).unwrap();
        for step in steps {
            if let Some(shares) = rebalancer.observe_all(&step[..ranks]).unwrap() {
                prop_assert_eq!(shares.iter().sum::<usize>(), total);
                prop_assert_eq!(shares.len(), ranks);
            }
        }
    }

    /// Noise within the threshold changes nothing, ever.
    #[test]
    fn noise_is_ignored(
        steps in prop::collection::vec(prop::collection::vec(1.0f64..1.19, 4), 1..80),
    ) {
        let mut rebalancer = Rebalancer::new(OPTIONS, vec![10, 20, 30, 40], 1).unwrap();
        for step in steps {
            prop_assert_eq!(rebalancer.observe_all(&step).unwrap(), None);
        }
    }

    /// A lasting slow-down beyond the threshold is answered once, in time, and with shares that
    /// bring the ranks together.
    #[test]
    fn a_slow_down_is_answered_once(
        unit_s in prop::collection::vec(1.0f64..4.0, 2..5),
        slow in 0usize..5,
        factor in 1.5f64..4.0,
    ) {
        let slow = slow % unit_s.len();
        let speeds: Vec<f64> = unit_s.iter().map(|s| 1.0 / s).collect();
        let shares = hexa_moe::parallel::split_proportional(1000, &speeds, 1).unwrap();
        let mut rebalancer = Rebalancer::new(OPTIONS, shares, 1).unwrap();
        prop_assert!(run(&mut rebalancer, &unit_s, 20).is_empty());
        let mut slowed = unit_s.clone();
        slowed[slow] *= factor;
        let changed = run(&mut rebalancer, &slowed, 60);
        prop_assert_eq!(changed.len(), 1);
        prop_assert!(changed[0] < OPTIONS.window + OPTIONS.patience);
        let times = times(rebalancer.shares(), &slowed);
        let slowest = times.iter().copied().fold(0.0, f64::max);
        let fastest = times.iter().copied().fold(f64::INFINITY, f64::min);
        prop_assert!(slowest <= 1.1 * fastest, "{times:?}");
    }
}
