//! Load statistics.

use hexa_moe::load::{load_entropy, tile_waste};
use hexa_moe::{LoadReport, LoadStats, TrainingBackend};
use hexa_ops::backend_test;

use burn::tensor::{Int, Tensor};

use crate::support::{assert_near, tensor};

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

fn report<B: TrainingBackend>() {
    let device = B::Device::default();
    let uneven = [0.75, 0.25, 0.0, 0.0];
    let stats = LoadStats::<B> {
        tokens_per_expert: Tensor::<B, 1, Int>::from_data([2, 0, 1, 1], &device),
        probs: tensor::<B, 2>(&[[0.25; 4], uneven].concat(), [2, 4]),
        tile_rows: 3,
        router_entropy: None,
    };
    let LoadReport {
        tokens_per_expert,
        load_entropy,
        router_entropy,
        tile_waste,
    } = stats.read().unwrap();
    assert_eq!(tokens_per_expert, [2, 0, 1, 1]);
    assert_near("load entropy", &[load_entropy], &[0.75], 1e-12);
    let nats = -(0.75f64 * 0.75f64.ln() + 0.25 * 0.25f64.ln());
    let want = (1.0 + nats / 4f64.ln()) / 2.0;
    assert_near("router entropy", &[router_entropy], &[want], 1e-6);
    assert_eq!(tile_waste, 5.0 / 4.0);
}
backend_test!(a_report_reads_the_device, report);
