//! Sums over an evaluation: accuracy, loss and experts' load.

use burn::tensor::backend::Backend;
use hexa_moe::load::load_entropy;
use hexa_moe::{LoadReport, LoadStats, RouterMeans};

use super::error::Result;
use super::metrics::LayerLoad;

/// Accuracy and loss over images seen so far, in f64.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Tally {
    /// Images seen.
    pub images: u64,
    /// Of these, the label had the highest score.
    pub top1: u64,
    /// Of these, the label was among the five highest scores.
    pub top5: u64,
    /// Sum of the cross entropy.
    pub loss: f64,
}

impl Tally {
    /// Adds a batch. `logits`: `[labels.len(), num_classes]`, row-major.
    pub fn add(&mut self, logits: &[f32], labels: &[usize]) {
        let num_classes = logits.len() / labels.len().max(1);
        for (row, &label) in logits.chunks_exact(num_classes.max(1)).zip(labels) {
            let rank = rank(row, label);
            self.images += 1;
            self.top1 += u64::from(rank == 0);
            self.top5 += u64::from(rank < 5);
            self.loss += cross_entropy(row, label);
        }
    }

    /// Percentage of images with the label at the top.
    pub fn top1_percent(&self) -> f32 {
        self.percent(self.top1)
    }

    /// Percentage of images with the label among the first five.
    pub fn top5_percent(&self) -> f32 {
        self.percent(self.top5)
    }

    /// Mean cross entropy.
    pub fn mean_loss(&self) -> f32 {
        (self.loss / self.images.max(1) as f64) as f32
    }

    fn percent(&self, count: u64) -> f32 {
        (100.0 * count as f64 / self.images.max(1) as f64) as f32
    }
}

/// How many classes score higher than `label`; equal scores count by order, NaN beats all.
fn rank(row: &[f32], label: usize) -> usize {
    let own = row[label];
    row.iter()
        .enumerate()
        .filter(|&(class, &score)| {
            let below = score < own || (score == own && class >= label);
            !below
        })
        .count()
}

fn cross_entropy(row: &[f32], label: usize) -> f64 {
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let max = f64::from(max);
    let sum: f64 = row.iter().map(|&s| (f64::from(s) - max).exp()).sum();
    max + sum.ln() - f64::from(row[label])
}

/// Softmax of one row, in f64.
pub fn softmax(row: &[f32]) -> Vec<f64> {
    let max = f64::from(row.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let exps: Vec<f64> = row.iter().map(|&s| (f64::from(s) - max).exp()).collect();
    let sum: f64 = exps.iter().sum();
    exps.into_iter().map(|e| e / sum).collect()
}

/// Load of the parts of a step together, one entry for each of `num_layers` MoE layers. `loads`:
/// those of the layers, part by part. This waits for the device, once.
///
/// # Errors
/// [`super::TrainError`] if the device reports a failure.
pub(super) fn read_loads<B: Backend>(
    loads: &[LoadStats<B>],
    num_layers: usize,
) -> Result<Vec<LayerLoad>> {
    let mut tally = LoadTally::default();
    for part in LoadStats::read_all(loads)?.chunks_exact(num_layers.max(1)) {
        tally.add(part);
    }
    Ok(tally.loads())
}

/// Load of the experts over several batches.
#[derive(Debug, Clone, Default)]
pub struct LoadTally {
    layers: Vec<LayerTally>,
}

/// Sums of one layer.
#[derive(Debug, Clone, Default)]
struct LayerTally {
    tokens_per_expert: Vec<u64>,
    /// Of batches' tile waste and means, each times the batch's slots.
    tile_waste: f64,
    router: RouterMeans,
}

impl LoadTally {
    /// Adds a batch: one report for each MoE layer, in order.
    pub fn add(&mut self, reports: &[LoadReport]) {
        self.layers.resize(reports.len(), LayerTally::default());
        for (sums, report) in self.layers.iter_mut().zip(reports) {
            let counts = &mut sums.tokens_per_expert;
            counts.resize(report.tokens_per_expert.len(), 0);
            for (sum, count) in counts.iter_mut().zip(&report.tokens_per_expert) {
                *sum += count;
            }
            let slots = report.tokens_per_expert.iter().sum::<u64>() as f64;
            sums.tile_waste += report.tile_waste * slots;
            if let Some(router) = report.router {
                sums.router.entropy_nats += router.entropy_nats * slots;
                sums.router.gate_weight += router.gate_weight * slots;
                sums.router.z += router.z * slots;
            }
        }
    }

    /// The sums so far.
    pub fn loads(&self) -> Vec<LayerLoad> {
        self.layers.iter().map(LayerTally::load).collect()
    }
}

impl LayerTally {
    fn load(&self) -> LayerLoad {
        let slots = self.tokens_per_expert.iter().sum::<u64>();
        let mean = |sum: f64| sum / slots.max(1) as f64;
        LayerLoad {
            entropy: load_entropy(&self.tokens_per_expert),
            tile_waste: mean(self.tile_waste),
            router: (slots > 0).then(|| RouterMeans {
                entropy_nats: mean(self.router.entropy_nats),
                gate_weight: mean(self.router.gate_weight),
                z: mean(self.router.z),
            }),
            tokens_per_expert: self.tokens_per_expert.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_ranks_and_loss() {
        let mut tally = Tally::default();
        let logits = [
            [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
            [0.0; 7],
            [9.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
        ];
        tally.add(&logits.concat(), &[6, 5, 2]);
        assert_eq!((tally.images, tally.top1, tally.top5), (3, 1, 1));
        tally.add(&logits.concat(), &[2, 0, 3]);
        assert_eq!((tally.images, tally.top1, tally.top5), (6, 2, 4));
        let mut uniform = Tally::default();
        uniform.add(&[0.5; 7], &[3]);
        assert!((uniform.loss - 7f64.ln()).abs() < 1e-12);
    }

    #[test]
    fn scores_that_are_no_numbers_are_never_right() {
        let mut tally = Tally::default();
        tally.add(&[f32::NAN; 3], &[0]);
        assert_eq!(tally.top1, 0);
    }

    #[test]
    fn means_are_weighted_by_slots() {
        let report = |counts: &[u64], tile_waste| LoadReport {
            tokens_per_expert: counts.to_vec(),
            load_entropy: 0.0,
            router: counts
                .iter()
                .any(|&count| count > 0)
                .then_some(RouterMeans {
                    entropy_nats: 2.0 * tile_waste,
                    gate_weight: 3.0 * tile_waste,
                    z: 4.0 * tile_waste,
                }),
            tile_waste,
        };
        let mut tally = LoadTally::default();
        tally.add(&[report(&[0, 0], 0.0)]);
        assert_eq!(tally.loads()[0].router, None);
        tally.add(&[report(&[30, 0], 0.1)]);
        tally.add(&[report(&[5, 5], 0.5)]);
        let loads = tally.loads();
        assert_eq!(loads[0].tokens_per_expert, [35, 5]);
        let router = loads[0].router.unwrap();
        for (got, want) in [
            (loads[0].tile_waste, 0.2),
            (router.entropy_nats, 0.4),
            (router.gate_weight, 0.6),
            (router.z, 0.8),
        ] {
            assert!((got - want).abs() < 1e-12, "{got}, not {want}");
        }
    }
}
