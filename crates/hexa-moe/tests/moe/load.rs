//! Load statistics.

use hexa_moe::load::{load_entropy, tile_waste};
use hexa_moe::{LoadStats, MoeConfig, RouterMeans, Routing, TrainingBackend};
use hexa_ops::backend_test;
use hexa_ops::testing::oracle::Gating;

use burn::tensor::{Int, Tensor};

use crate::host::HostMoe;
use crate::support::{Rng, assert_near, layer, tensor};

#[test]
fn entropy_of_the_load() {
    assert!((load_entropy(&[5, 5, 5]) - 1.0).abs() < 1e-12);
    assert_eq!(load_entropy(&[0, 9, 0]), 0.0);
    assert_eq!(load_entropy(&[7]), 1.0);
    assert_eq!(load_entropy(&[0, 0]), 1.0);
    assert_near("half", &[load_entropy(&[3, 3, 0, 0])], &[0.5], 1e-12);
}

#[test]
fn tile_waste_counts_missing_rows() {
    assert_eq!(tile_waste(&[3, 0, 5], 1), 0.0);
    // Tiles of 4: 1 + 0 + 3 rows are missing beside 8 slots.
    assert_eq!(tile_waste(&[3, 0, 5], 4), 0.5);
    assert_eq!(tile_waste(&[8, 4], 4), 0.0);
    assert_eq!(tile_waste(&[0, 0], 4), 0.0);
}

/// What each token's router says, from the naive loop's logits and gating.
fn expected_means(logits: &[f64], gating: &Gating, num_experts: usize) -> [f64; 3] {
    let mut means = [0.0; 3];
    let tokens = logits.len() / num_experts;
    for token in 0..tokens {
        let row = token * num_experts..(token + 1) * num_experts;
        let entropy: f64 = gating.probs[row.clone()].iter().map(|p| -p * p.ln()).sum();
        let log_sum_exp = logits[row].iter().map(|l| l.exp()).sum::<f64>().ln();
        means[0] += entropy / tokens as f64;
        means[2] += log_sum_exp * log_sum_exp / tokens as f64;
    }
    means[1] = gating.weights.iter().sum::<f64>() / gating.weights.len() as f64;
    means
}

/// Rows of whole tiles beyond the slots, counted tile by tile.
fn expected_waste(counts: &[u64], tile_rows: u64) -> f64 {
    let (mut rows, mut slots) = (0, 0);
    for &count in counts {
        let mut tiles = 0;
        while tiles * tile_rows < count {
            tiles += 1;
        }
        rows += tiles * tile_rows;
        slots += count;
    }
    (rows - slots) as f64 / slots as f64
}

fn means<B: TrainingBackend>() {
    // Tokens, d_model, experts, top-k: primes, one token, one expert, all experts chosen.
    for ([tokens, d_model, num_experts, top_k], normalize) in [
        ([13, 7, 5, 3], false),
        ([13, 7, 5, 3], true),
        ([1, 3, 2, 1], false),
        ([11, 5, 1, 1], false),
        ([17, 3, 3, 3], false),
        ([257, 11, 7, 2], false),
    ] {
        let config = MoeConfig::new(d_model, 5, num_experts)
            .with_top_k(top_k)
            .with_normalize_gate(normalize);
        let (moe, params) = layer::<B>(&config, 31);
        let x = Rng::new(32).vec(tokens * d_model);
        let host = HostMoe {
            config: &config,
            params: &params,
        };
        let gating = host.forward(&x).gating;
        let want = expected_means(&host.logits(&x), &gating, num_experts);

        let moe = moe.without_noise();
        let load = moe.forward(tensor::<B, 2>(&x, [tokens, d_model])).load;
        let report = load.read().unwrap();
        let router = report.router.unwrap();
        let shape = format!("{tokens} {d_model} {num_experts} {top_k}");
        assert_near(
            &format!("router means of {shape}"),
            &[router.entropy_nats, router.gate_weight, router.z],
            &want,
            1e-5,
        );
        let mut counts = vec![0; num_experts];
        for &id in &gating.expert_ids {
            counts[id] += 1;
        }
        assert_eq!(report.tokens_per_expert, counts, "{shape}");
        let tile_rows = hexa_ops::tile_rows::<B>(&B::Device::default()) as u64;
        assert_eq!(report.tile_waste, expected_waste(&counts, tile_rows));
    }
}
backend_test!(router_means_are_those_of_the_naive_loop, means);

/// A certain router, whose other probabilities are exactly zero, has no entropy, not NaN; and
/// layers that are read together are not mixed up.
fn together<B: TrainingBackend>() {
    let device = B::Device::default();
    let stats = |logits: [f64; 4], counts: [i32; 2], tile_rows| {
        let logits = tensor::<B, 2>(&logits, [2, 2]);
        LoadStats::<B> {
            tokens_per_expert: Tensor::<B, 1, Int>::from_data(counts, &device),
            routing: Some(Routing {
                gating: hexa_ops::topk_gating(logits.clone(), 1, false).unwrap(),
                noisy_logits: logits.clone() + 3.0,
                logits,
            }),
            tile_rows,
            global: None,
        }
    };
    let idle = LoadStats::<B> {
        tokens_per_expert: Tensor::zeros([2], &device),
        routing: None,
        tile_rows: 4,
        global: None,
    };
    let reports = LoadStats::read_all(&[
        stats([200.0, 0.0, 0.0, 200.0], [1, 1], 3),
        idle,
        stats([0.0, 0.0, 0.0, 0.0], [2, 0], 1),
    ])
    .unwrap();
    let means = |router: Option<RouterMeans>| {
        let router = router.unwrap();
        [router.entropy_nats, router.gate_weight, router.z]
    };
    let certain = means(reports[0].router);
    assert_near("certain", &certain[..2], &[0.0, 1.0], 1e-6);
    assert_near("certain, z", &certain[2..], &[4e4], 1e-6);
    assert_eq!((reports[1].router, reports[1].tile_waste), (None, 0.0));
    let ln2 = 2f64.ln();
    let want = [ln2, 0.5, ln2 * ln2];
    assert_near("undecided", &means(reports[2].router), &want, 1e-6);
    let rest: Vec<_> = reports
        .iter()
        .map(|r| (&r.tokens_per_expert[..], r.load_entropy, r.tile_waste))
        .collect();
    assert_eq!(
        rest,
        [
            (&[1, 1][..], 1.0, 2.0),
            (&[0, 0], 1.0, 0.0),
            (&[2, 0], 0.0, 0.0)
        ]
    );
}
backend_test!(layers_are_read_together, together);

/// A model may have none.
fn none<B: TrainingBackend>() {
    assert_eq!(LoadStats::<B>::read_all(&[]).unwrap(), []);
}
backend_test!(no_layers_are_read_without_a_wait, none);
