//! New shares when a device has slowed down, or come back: of batches at once, of hidden widths
//! when the next checkpoint is written.
//!
//! [`Rebalancer`] decides when, on shares of the whole work. What a rank has of it follows from its
//! share of the batch and, in model-centric layers, from its slice: operations are counted, as times
//! of the two parts are not known apart.

use hexa_moe::parallel::fleet::Workload;
use hexa_moe::parallel::{
    Communicator, LayerPlan, Mode, ParallelPlan, RebalanceOptions, Rebalancer, split_proportional,
};

use super::plan::width_multiple;
use crate::train::error::Result;

/// The whole work, for a [`Rebalancer`] that shares out whole numbers.
const WORK: f64 = (1 << 20) as f64;

/// Watches the ranks' computing times.
#[derive(Debug)]
pub(super) struct Rebalance {
    options: RebalanceOptions,
    work: Work,
    rebalancer: Rebalancer,
    /// A plan whose hidden widths are not in force yet.
    pending: Option<ParallelPlan>,
}

/// A decision, the same on all ranks.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Resplit {
    /// Images of each rank in a whole batch, from now on.
    pub batch: Vec<usize>,
    /// What was changed, and why.
    pub reason: String,
}

impl Rebalance {
    /// Watches ranks that share out a model's work by `plan`; `forward_flops` are those of one
    /// image through the whole model.
    pub(super) fn new(
        threshold: f64,
        workload: &Workload,
        forward_flops: u64,
        plan: &ParallelPlan,
    ) -> Result<Self> {
        let options = RebalanceOptions {
            threshold,
            ..RebalanceOptions::default()
        };
        let work = Work::new(workload, forward_flops);
        let rebalancer = Rebalancer::new(options, work.shares(plan), 1)?;
        Ok(Rebalance {
            options,
            work,
            rebalancer,
            pending: None,
        })
    }

    /// Tells all ranks this rank's computing time of a step, and decides; all ranks call it after
    /// each step. While widths wait for a checkpoint, nothing is decided.
    pub(super) fn observe(
        &mut self,
        comm: &dyn Communicator,
        busy_s: f64,
        plan: &ParallelPlan,
    ) -> Result<Option<Resplit>> {
        if self.pending.is_some() {
            return Ok(None);
        }
        let Some(speeds) = self.rebalancer.observe(comm, busy_s)? else {
            return Ok(None);
        };
        let speeds: Vec<f64> = speeds.into_iter().map(|share| share as f64).collect();
        let wanted = split_anew(plan, &speeds)?;
        // Whole images and multiples of units may leave nothing of what shares promise.
        let gains = self.work.slowest(&wanted, &speeds) * (1.0 + self.options.min_gain)
            < self.work.slowest(plan, &speeds);
        if !gains {
            self.rebalancer = self.watch(plan)?;
            return Ok(None);
        }
        let reason = self.reason(plan, &wanted, &speeds);
        let batch = wanted.batch.clone();
        self.rebalancer = self.watch(&wanted)?;
        self.pending = (wanted.layers != plan.layers).then_some(wanted);
        Ok(Some(Resplit { batch, reason }))
    }

    fn watch(&self, plan: &ParallelPlan) -> Result<Rebalancer> {
        Ok(Rebalancer::new(self.options, self.work.shares(plan), 1)?)
    }

    /// The plan whose widths wait for a checkpoint.
    pub(super) fn pending(&self) -> Option<&ParallelPlan> {
        self.pending.as_ref()
    }

    fn reason(&self, plan: &ParallelPlan, wanted: &ParallelPlan, speeds: &[f64]) -> String {
        let times = self.work.times(plan, speeds);
        let working = || times.iter().enumerate().filter(|(_, time)| **time > 0.0);
        let slowest = working().max_by(|a, b| a.1.total_cmp(b.1));
        let fastest = working().min_by(|a, b| a.1.total_cmp(b.1));
        let mut text = match (slowest, fastest) {
            (Some((slow, slow_s)), Some((fast, fast_s))) => format!(
                "rank {slow} takes {:.2} times as long as rank {fast}",
                slow_s / fast_s
            ),
            _ => String::new(),
        };
        text += &format!(
            "; images of a batch {} instead of {}",
            colons(&wanted.batch),
            colons(&plan.batch)
        );
        let layers = plan.layers.iter().zip(&wanted.layers).enumerate();
        for (number, (old, new)) in layers.filter(|(_, (old, new))| old != new) {
            text += &format!(
                "; at the next checkpoint, hidden units of layer {number} {} instead of {}",
                colons(&new.widths),
                colons(&old.widths)
            );
        }
        text
    }
}

fn colons(shares: &[usize]) -> String {
    let shares: Vec<String> = shares.iter().map(usize::to_string).collect();
    shares.join(":")
}

/// The same modes with shares in proportion to `speeds`. Slices of data-centric layers stay: they
/// cost no time.
fn split_anew(plan: &ParallelPlan, speeds: &[f64]) -> Result<ParallelPlan> {
    let layers = plan.layers.iter().map(|layer| {
        let d_ff = layer.widths.iter().sum();
        Ok(LayerPlan {
            mode: layer.mode,
            widths: match layer.mode {
                Mode::DataCentric => layer.widths.clone(),
                Mode::ModelCentric => {
                    split_proportional(d_ff, speeds, width_multiple(d_ff, speeds.len()))?
                }
            },
        })
    });
    Ok(ParallelPlan {
        layers: layers.collect::<Result<_>>()?,
        batch: split_proportional(plan.batch.iter().sum(), speeds, 1)?,
    })
}

/// Operations of a step.
#[derive(Debug)]
struct Work {
    /// Of one image, outside of the experts.
    rest: f64,
    /// Of one image, in each layer's experts.
    experts: Vec<f64>,
}

impl Work {
    fn new(workload: &Workload, forward_flops: u64) -> Self {
        let experts: Vec<f64> = workload
            .layers
            .iter()
            .map(|layer| layer.ffn.flops(layer.tokens_per_sample, layer.ffn.d_ff))
            .collect();
        // The backward pass takes twice what the forward pass does.
        let all = 3.0 * forward_flops as f64;
        Work {
            rest: (all - experts.iter().sum::<f64>()).max(0.0),
            experts,
        }
    }

    /// Each rank's operations.
    fn of_ranks(&self, plan: &ParallelPlan) -> Vec<f64> {
        let all: usize = plan.batch.iter().sum();
        let of_rank = |rank: usize| {
            let own = plan.batch[rank] as f64;
            let layers = self.experts.iter().zip(&plan.layers);
            let experts = layers.map(|(flops, layer)| match layer.mode {
                Mode::DataCentric => flops * own,
                Mode::ModelCentric => {
                    let d_ff: usize = layer.widths.iter().sum();
                    flops * all as f64 * layer.widths[rank] as f64 / d_ff.max(1) as f64
                }
            });
            self.rest * own + experts.sum::<f64>()
        };
        (0..plan.batch.len()).map(of_rank).collect()
    }

    /// Each rank's share of [`WORK`].
    fn shares(&self, plan: &ParallelPlan) -> Vec<usize> {
        let work = self.of_ranks(plan);
        let all: f64 = work.iter().sum();
        let share = |work: f64| (work / all.max(1.0) * WORK).round() as usize;
        work.into_iter().map(share).collect()
    }

    /// Times of the ranks at these speeds, in any unit.
    fn times(&self, plan: &ParallelPlan, speeds: &[f64]) -> Vec<f64> {
        let work = self.of_ranks(plan).into_iter().zip(speeds);
        let time = |(work, speed): (f64, &f64)| if work > 0.0 { work / speed } else { 0.0 };
        work.map(time).collect()
    }

    fn slowest(&self, plan: &ParallelPlan, speeds: &[f64]) -> f64 {
        self.times(plan, speeds).into_iter().fold(0.0, f64::max)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use hexa_moe::parallel::Mode::{DataCentric, ModelCentric};
    use hexa_moe::parallel::fleet::{FfnShape, LayerShape};
    use hexa_ops::TrainingBackend;

    use super::*;
    use crate::backend::BackendKind;
    use crate::config::{Config, DIGITS_TOML};
    use crate::testing::generator_lock;
    use crate::train::metrics::{Record, StepRecord, read_records};
    use crate::train::ranks::{RankJob, Seat, launch};
    use crate::train::run_dir::RunDir;
    use crate::train::setup::Start;
    use crate::train::{
        Control, Images, Outcome, ParallelOverrides, ResumeRequest, TrainRequest, resume,
    };

    fn plan(mode: Mode, batch: &[usize], widths: [&[usize]; 2]) -> ParallelPlan {
        ParallelPlan {
            layers: widths
                .map(|widths| LayerPlan {
                    mode,
                    widths: widths.to_vec(),
                })
                .to_vec(),
            batch: batch.to_vec(),
        }
    }

    /// Operations by hand: images and slices weigh what they cost.
    #[test]
    fn work_follows_images_and_slices() {
        let ffn = FfnShape {
            d_model: 3,
            d_ff: 10,
            num_experts: 2,
            top_k: 1,
            activation: hexa_ops::Activation::Gelu,
            bias: true,
            precision: hexa_ops::MatmulPrecision::Strict,
        };
        let workload = Workload {
            layers: vec![
                LayerShape {
                    ffn,
                    tokens_per_sample: 4,
                };
                2
            ],
            batch: 5,
            replicated_params: 1,
            activation_bytes_per_sample: 1,
        };
        // Each layer 6 · 4 · 3 · 2 · 10 = 1,440, forwards 480; 140 forwards for all else.
        let work = Work::new(&workload, 2 * 480 + 140);
        let data = plan(DataCentric, &[2, 3], [&[10, 0], &[0, 10]]);
        assert_eq!(work.of_ranks(&data), [6600.0, 9900.0]);
        let model = plan(ModelCentric, &[2, 3], [&[10, 0], &[4, 6]]);
        assert_eq!(
            work.of_ranks(&model),
            [840.0 + 7200.0 + 2880.0, 1260.0 + 4320.0]
        );
        assert_eq!(work.times(&data, &[2.0, 1.0]), [3300.0, 9900.0]);
    }

    const QUIET_AND_TINY: [&str; 15] = [
        "model.embed_dim=8",
        "model.depths=[1,1]",
        "model.num_heads=[2,2]",
        "model.window_size=2",
        "model.drop_path_rate=0",
        "moe.blocks=[[0],[0]]",
        "moe.num_experts=3",
        "moe.top_k=2",
        "moe.aux_loss=gshard",
        "moe.gate_noise=0",
        "train.batch_size=96",
        "train.epochs=2",
        "train.log_every=1",
        "train.eval_every_epochs=2",
        "checkpoint.every_steps=13",
    ];

    /// A run whose ranks say that they compute for as long as a test wants.
    #[derive(Clone)]
    struct Faked {
        start: Start,
        busy_s: Option<fn(rank: usize, images: usize) -> f64>,
    }

    impl RankJob for Faked {
        type Output = Outcome;

        fn run<B: TrainingBackend>(self, device: &B::Device, mut seat: Seat) -> Result<Outcome> {
            seat.fake_busy_s = self.busy_s;
            self.start.run::<B>(device, seat)
        }
    }

    fn train(
        output: &Path,
        settings: &[&str],
        max_steps: u64,
        busy_s: Option<fn(usize, usize) -> f64>,
    ) -> RunDir {
        let settings = [&QUIET_AND_TINY[..], settings].concat();
        let config = Config::from_toml(DIGITS_TOML, "digits", &settings).unwrap();
        let parallel = config.parallel.clone();
        let start = Start {
            images: Images::open(&config).unwrap(),
            origin: None,
            request: TrainRequest {
                name: "tiny".to_owned(),
                config,
                backend: BackendKind::Cpu,
                output: output.to_path_buf(),
                fleet: None,
                control: Control {
                    max_steps: Some(max_steps),
                    ..Control::default()
                },
            },
        };
        let job = Faked { start, busy_s };
        launch(BackendKind::Cpu, &parallel, job).unwrap().run
    }

    fn steps(run: &RunDir) -> Vec<StepRecord> {
        let records = read_records(&run.metrics()).unwrap();
        let steps = records.into_iter().filter_map(|record| match record {
            Record::Step(step) => Some(step),
            Record::Eval(_) => None,
        });
        steps.collect()
    }

    #[track_caller]
    fn assert_close(several: &RunDir, one: &RunDir, until: u64) {
        let (several, one) = (steps(several), steps(one));
        assert_eq!(several.last().map(|step| step.step), Some(until));
        for (a, b) in several.iter().zip(&one) {
            assert_eq!(a.step, b.step);
            for (x, y) in [
                (a.loss, b.loss),
                (a.grad_norm.unwrap(), b.grad_norm.unwrap()),
            ] {
                assert!(
                    (x - y).abs() <= 1e-4 * y.abs().max(1.0),
                    "step {}: {x} and {y}",
                    a.step
                );
            }
        }
    }

    /// Seconds of a rank that takes three times as long for an image as the other.
    fn one_of_two_is_slow(rank: usize, images: usize) -> f64 {
        images as f64 * [1.0, 3.0][rank]
    }

    #[test]
    fn losses_are_those_of_one_rank_whatever_is_split_anew() {
        let _lock = generator_lock();
        let dir = tempfile::tempdir().unwrap();
        let one = train(&dir.path().join("one"), &[], 26, None);
        let auto = ["parallel.ranks=2", "parallel.rebalance=auto"];
        let unequal = [96 * 3 / 4, 96 / 4];
        for (mode, widths, says) in [
            // Slices of the data-centric mode cost no time, and stay.
            ("data", [[8, 8], [16, 16]], "72:24 instead of 48:48"),
            (
                "model",
                [[12, 4], [24, 8]],
                "hidden units of layer 1 24:8 instead of 16:16",
            ),
        ] {
            let setting = format!("parallel.mode={mode}");
            let settings = [&auto[..], &[&setting]].concat();
            let output = dir.path().join(mode);
            let run = train(&output, &settings, 24, Some(one_of_two_is_slow));
            assert_close(&run, &one, 24);
            // A window of eight steps, the last of four over the threshold is the eleventh.
            let log = fs::read_to_string(output.join("rank-1.log")).unwrap();
            let line = "after step 11: rank 1 takes 3.00 times as long as rank 0";
            assert!(log.contains(line) && log.contains(says), "{log}");
            assert_eq!(log.matches("after step").count(), 1, "{log}");
            let (checkpoint, _) = run.load_last().unwrap();
            let expected = plan(
                match mode {
                    "data" => DataCentric,
                    _ => ModelCentric,
                },
                &unequal,
                [&widths[0], &widths[1]],
            );
            assert_eq!(checkpoint.state.plan, Some(expected));
            // The slices were taken at the checkpoint behind the decision, and written as such.
            let taken = log.contains("24 of 96 images of a batch; hidden units by layer: 4 of 16");
            assert_eq!(taken, mode == "model", "{log}");

            // A resumed run goes on with these shares, without rebalancing as well.
            let parallel = ParallelOverrides {
                rebalance: Some(crate::config::Rebalance::Off),
                ..ParallelOverrides::default()
            };
            resume(ResumeRequest {
                run: output.clone(),
                backend: None,
                data: None,
                parallel,
                fleet: None,
                control: Control {
                    max_steps: Some(26),
                    ..Control::default()
                },
            })
            .unwrap();
            assert_close(&run, &one, 26);
            let log = fs::read_to_string(output.join("rank-1.log")).unwrap();
            let (_, resumed) = log.rsplit_once("rank 1 of 2: ").unwrap();
            let [first, second] = [widths[0][1], widths[1][1]];
            let shares =
                format!("24 of 96 images of a batch; hidden units by layer: {first} of 16 ");
            assert!(resumed.starts_with(&shares), "{resumed}");
            assert!(resumed.contains(&format!(", {second} of 32 ")), "{resumed}");
        }
    }

    /// Equally fast ranks, and a slow one whose share cannot become smaller, are left alone.
    #[test]
    fn nothing_is_split_anew_without_a_gain() {
        let _lock = generator_lock();
        let dir = tempfile::tempdir().unwrap();
        let settings = [
            "parallel.ranks=2",
            "parallel.rebalance=auto",
            "parallel.rebalance_threshold=0.5",
        ];
        let nearly: fn(usize, usize) -> f64 = |rank, images| images as f64 * [1.0, 1.45][rank];
        let run = train(&dir.path().join("nearly"), &settings, 24, Some(nearly));
        assert_eq!(run.load_last().unwrap().0.state.plan, None);
        // Three images: 2:1 with equal speeds is a ratio of two, and no better split.
        let small = [&settings[..], &["train.batch_size=3"]].concat();
        let equal: fn(usize, usize) -> f64 = |_, images| images as f64;
        let run = train(&dir.path().join("small"), &small, 24, Some(equal));
        assert_eq!(run.load_last().unwrap().0.state.plan, None);
    }
}
