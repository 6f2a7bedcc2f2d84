//! Fleets: measuring, fits, shares, and the choice of modes against all there are.

use std::time::{Duration, Instant};

use burn::backend::Autodiff;
use burn::module::Module;
use burn::tensor::Tensor;
use hexa_moe::backends::Cpu;
use hexa_moe::parallel::fleet::{
    AffineTime, Calibration, FfnCost, FfnShape, Fleet, FleetError, LayerShape, LinkCost, Links,
    MeasuredStep, PlanTable, RankProfile, StepCost, Workload, balanced_plan, balanced_shares,
    calibrate, choose, predict, width_multiple,
};
use hexa_moe::parallel::{LayerPlan, Mode, ParallelContext, ParallelPlan, comm::local};
use hexa_moe::{Activation, MatmulPrecision};
use proptest::prelude::*;

fn shape(d_model: usize, d_ff: usize) -> FfnShape {
    FfnShape {
        d_model,
        d_ff,
        num_experts: 3,
        top_k: 2,
        activation: Activation::Gelu,
        bias: true,
        precision: MatmulPrecision::Strict,
    }
}

fn link(latency_s: f64, bytes_per_s: f64) -> LinkCost {
    LinkCost {
        latency_s,
        bytes_per_s,
    }
}

/// Ranks of these speeds, in multiply-adds per second, with links of this rate.
fn fleet(shapes: &[FfnShape], speeds: &[f64], bytes_per_s: f64) -> Fleet {
    let ranks = speeds.iter().enumerate().map(|(rank, speed)| RankProfile {
        name: format!("rank{rank}"),
        backend: "cpu".into(),
        memory_bytes: None,
        step: StepCost {
            fixed_s: 1e-4,
            sample_s: 2e4 / speed,
            parameter_s: 1e-10,
        },
        ffn: (shapes.iter())
            .map(|shape| FfnCost {
                shape: *shape,
                fixed_s: 1e-4,
                token_s: shape.d_model as f64 / speed,
                unit_s: (shape.num_experts * shape.d_model) as f64 / speed,
                token_unit_s: (shape.top_k * shape.d_model) as f64 / speed,
            })
            .collect(),
    });
    Fleet {
        version: 1,
        engine: "local".into(),
        replicated_params: 5000,
        links: Links {
            small_s: 2e-5,
            gather_weights: link(1e-4, bytes_per_s),
            reduce_weight_gradients: link(1e-4, 0.7 * bytes_per_s),
            gather_tokens: link(5e-5, 1.2 * bytes_per_s),
            reduce_tokens: link(5e-5, 0.9 * bytes_per_s),
            all_reduce: link(1e-4, bytes_per_s),
        },
        ranks: ranks.collect(),
    }
}

fn workload(shapes: &[FfnShape], tokens_per_sample: &[usize], batch: usize) -> Workload {
    let layers = shapes.iter().zip(tokens_per_sample);
    Workload {
        layers: layers
            .map(|(ffn, &tokens_per_sample)| LayerShape {
                ffn: *ffn,
                tokens_per_sample,
            })
            .collect(),
        batch,
        replicated_params: 5000,
        activation_bytes_per_sample: 1000,
    }
}

/// A step of two ranks played through: clocks that meet at every layer.
fn simulate(fleet: &Fleet, work: &Workload, plan: &ParallelPlan) -> f64 {
    let batch = work.batch as f64;
    let layers = work.layers.len();
    let last_data = (0..layers)
        .rev()
        .find(|&l| plan.layers[l].mode == Mode::DataCentric);
    let mut clock = 0.0f64;
    for (l, (layer, how)) in work.layers.iter().zip(&plan.layers).enumerate() {
        let (ffn, links) = (layer.ffn, &fleet.links);
        let weights = 4.0 * (ffn.num_experts * (2 * ffn.d_model * ffn.d_ff + ffn.d_ff)) as f64;
        let tokens = batch * layer.tokens_per_sample as f64;
        let rows = 4.0 * tokens * ffn.d_model as f64;
        let mut ready = Vec::new();
        let mut passes = Vec::new();
        for (r, rank) in fleet.ranks.iter().enumerate() {
            let cost = rank.ffn.iter().find(|cost| cost.shape == ffn).unwrap();
            let own = plan.batch[r] as f64;
            let (t, u) = match how.mode {
                Mode::DataCentric => (own * layer.tokens_per_sample as f64, ffn.d_ff as f64),
                Mode::ModelCentric => (tokens, how.widths[r] as f64),
            };
            let mut at = clock;
            if own > 0.0 {
                at += (rank.step.fixed_s + own * rank.step.sample_s) / layers as f64;
            }
            ready.push(at);
            passes.push(if t * u > 0.0 {
                cost.fixed_s + t * cost.token_s + u * cost.unit_s + t * u * cost.token_unit_s
            } else {
                0.0
            });
        }
        // Everybody's tokens are there when the last rank has brought its own.
        let all_ready = ready.iter().copied().fold(0.0, f64::max);
        let done = ready
            .iter()
            .zip(&passes)
            .map(|(ready, pass)| match how.mode {
                Mode::DataCentric => ready + pass,
                Mode::ModelCentric => all_ready + pass,
            });
        clock = done.fold(0.0, f64::max) + 2.0 * links.small_s;
        let time = |link: &LinkCost, bytes: f64| link.latency_s + bytes / link.bytes_per_s;
        clock += match how.mode {
            Mode::DataCentric => {
                let gathers = if last_data == Some(l) { 1.0 } else { 2.0 };
                gathers * time(&links.gather_weights, weights)
                    + time(&links.reduce_weight_gradients, weights)
            }
            Mode::ModelCentric => {
                let gates = 4.0 * tokens * ffn.top_k as f64;
                2.0 * time(&links.gather_tokens, rows)
                    + 2.0 * time(&links.reduce_tokens, rows)
                    + 3.0 * (links.small_s + gates / links.gather_tokens.bytes_per_s)
            }
        };
    }
    let dense = work.replicated_params as f64;
    clock += fleet.links.all_reduce.latency_s + 4.0 * dense / fleet.links.all_reduce.bytes_per_s;
    let update = |r: usize| {
        let slices: f64 = (work.layers.iter().zip(&plan.layers))
            .map(|(l, how)| (l.ffn.num_experts * (2 * l.ffn.d_model + 1) * how.widths[r]) as f64)
            .sum();
        (dense + slices) * fleet.ranks[r].step.parameter_s
    };
    clock + (0..fleet.ranks.len()).map(update).fold(0.0, f64::max)
}

/// The fastest of all batches, modes and widths (in sixteenths) of two ranks.
fn exhaustive(fleet: &Fleet, work: &Workload) -> (f64, ParallelPlan) {
    let mut best = (f64::INFINITY, None);
    let layers = work.layers.len();
    for own in 0..=work.batch {
        for modes in 0..1 << layers {
            let mode = |l: usize| match modes >> l & 1 {
                0 => Mode::DataCentric,
                _ => Mode::ModelCentric,
            };
            let mut plan = ParallelPlan {
                batch: vec![own, work.batch - own],
                layers: (0..layers)
                    .map(|l| LayerPlan {
                        mode: mode(l),
                        widths: vec![work.layers[l].ffn.d_ff, 0],
                    })
                    .collect(),
            };
            // Layers meet one after the other, so that each has its own best width.
            for l in 0..layers {
                let d_ff = work.layers[l].ffn.d_ff;
                let mut widths = (f64::INFINITY, Vec::new());
                for part in 0..=16 {
                    plan.layers[l].widths = vec![d_ff * part / 16, d_ff - d_ff * part / 16];
                    let seconds = simulate(fleet, work, &plan);
                    if seconds < widths.0 {
                        widths = (seconds, plan.layers[l].widths.clone());
                    }
                }
                plan.layers[l].widths = widths.1;
            }
            let seconds = simulate(fleet, work, &plan);
            if seconds < best.0 {
                best = (seconds, Some(plan));
            }
        }
    }
    (best.0, best.1.unwrap())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]

    /// The choice is as fast as the best of all plans, but for whole units; and what is predicted
    /// of it is what playing it through takes.
    #[test]
    fn the_choice_is_the_best_of_all(
        d_model in 8usize..64,
        tokens_per_sample in prop::array::uniform2(1usize..200),
        speeds in prop::array::uniform2(1e9f64..1e11),
        bytes_per_s in 1e7f64..1e10,
    ) {
        let shapes = [shape(d_model, 256), shape(2 * d_model, 512)];
        let fleet = fleet(&shapes, &speeds, bytes_per_s);
        let work = workload(&shapes, &tokens_per_sample, 24);
        let chosen = choose(&fleet, &work).unwrap();
        let played = simulate(&fleet, &work, &chosen.plan);
        prop_assert!((chosen.step_s / played - 1.0).abs() < 1e-9, "{} {played}", chosen.step_s);
        let (best, plan) = exhaustive(&fleet, &work);
        // Shares are balanced over the step, while ranks meet at every layer.
        prop_assert!(chosen.step_s <= 1.09 * best, "{chosen:?}\n{plan:?} {best}");
    }

    #[test]
    fn balanced_shares_sum_and_bring_ranks_together(
        total in 1usize..5000,
        times in prop::collection::vec((0.0f64..1.0, 1e-4f64..1e-1), 1..6),
        multiple in 1usize..17,
    ) {
        let times: Vec<AffineTime> = times
            .into_iter()
            .map(|(fixed_s, unit_s)| AffineTime { fixed_s, unit_s })
            .collect();
        let shares = balanced_shares(total, &times, multiple).unwrap();
        prop_assert_eq!(shares.iter().sum::<usize>(), total);
        // Nothing moved from the slowest rank to another makes a faster slowest one.
        let at = |t: &AffineTime, share: usize| match share {
            0 => 0.0,
            share => t.fixed_s + t.unit_s * share as f64,
        };
        let slowest = (times.iter().zip(&shares)).map(|(t, &share)| at(t, share));
        let slowest = slowest.fold(0.0, f64::max);
        if total.is_multiple_of(multiple) {
            for (time, &share) in times.iter().zip(&shares) {
                let more = at(time, share + multiple);
                prop_assert!(more >= slowest - 1e-12, "{times:?} {shares:?}");
            }
        }
    }

    /// Exact measurements give back the times that they were made with.
    #[test]
    fn ffn_fits_recover_known_costs(
        costs in prop::array::uniform4(prop_oneof![Just(0.0), 0.1f64..1.0]),
    ) {
        let known = FfnCost {
            shape: shape(8, 64),
            fixed_s: 1e-3 * costs[0],
            token_s: 1e-6 * costs[1],
            unit_s: 1e-5 * costs[2],
            token_unit_s: 1e-8 * costs[3],
        };
        prop_assume!(costs.iter().any(|&c| c > 0.0));
        let mut points = Vec::new();
        for tokens in [256, 1024, 4096] {
            for units in [16, 32, 64] {
                points.push((tokens, units, known.seconds(tokens, units)));
            }
        }
        let fitted = FfnCost::fit(known.shape, &points).unwrap();
        // Within the measured range and beyond it.
        for (tokens, units) in [(100, 16), (300, 20), (8192, 64)] {
            let ratio = fitted.seconds(tokens, units) / known.seconds(tokens, units);
            prop_assert!((ratio - 1.0).abs() < 1e-3, "{fitted:?} {known:?}");
        }
    }
}

#[test]
fn a_link_is_recovered_from_two_sizes() {
    let known = link(3e-5, 2e9);
    let fitted = LinkCost::fit(&[
        (1000, known.seconds(1000)),
        (9 << 20, known.seconds(9 << 20)),
    ]);
    let fitted = fitted.unwrap();
    assert!(
        (fitted.latency_s / known.latency_s - 1.0).abs() < 1e-6,
        "{fitted:?}"
    );
    assert!(
        (fitted.bytes_per_s / known.bytes_per_s - 1.0).abs() < 1e-6,
        "{fitted:?}"
    );
}

#[test]
fn few_tokens_move_themselves_and_many_have_weights_move() {
    let shapes = [shape(16, 256)];
    let fleet = fleet(&shapes, &[3e9, 1e9], 1e9);
    let mode = |tokens_per_sample| {
        let chosen = choose(&fleet, &workload(&shapes, &[tokens_per_sample], 16)).unwrap();
        chosen.plan.layers[0].mode
    };
    assert_eq!(mode(1), Mode::ModelCentric);
    assert_eq!(mode(400), Mode::DataCentric);
}

#[test]
fn what_does_not_fit_is_not_chosen() {
    let shapes = [shape(64, 1024)];
    let mut fleet = fleet(&shapes, &[1e9, 1e9], 1e9);
    // Links so slow with tokens that weights would move, so much weight that only slices fit.
    fleet.links.gather_tokens.latency_s = 0.1;
    let work = workload(&shapes, &[40], 16);
    let free = choose(&fleet, &work).unwrap();
    assert_eq!(free.plan.layers[0].mode, Mode::DataCentric);
    let modes = [Mode::ModelCentric];
    let plan = balanced_plan(&fleet, &work, &modes).unwrap();
    let frugal = predict(&fleet, &work, &plan).unwrap();
    let enough = frugal.ranks.iter().map(|r| r.memory.total()).max().unwrap();
    assert!(enough < free.ranks[0].memory.total());
    for rank in &mut fleet.ranks {
        rank.memory_bytes = Some(enough);
    }
    let chosen = choose(&fleet, &work).unwrap();
    assert_eq!(chosen.plan.layers[0].mode, Mode::ModelCentric);

    fleet.ranks[1].memory_bytes = Some(enough / 2);
    let error = choose(&fleet, &work).unwrap_err();
    assert!(matches!(error, FleetError::Memory { .. }), "{error}");
    assert!(error.to_string().contains("rank `rank1` needs"), "{error}");
}

#[test]
fn the_table_names_modes_shares_and_ranks() {
    let shapes = [shape(16, 256), shape(32, 512)];
    let fleet = fleet(&shapes, &[3e9, 1e9], 1e9);
    let chosen = choose(&fleet, &workload(&shapes, &[1, 400], 16)).unwrap();
    let table = PlanTable {
        fleet: &fleet,
        chosen: &chosen,
        alternatives: &[(Mode::DataCentric, None)],
    };
    let text = table.to_string();
    for part in [
        "predicted step time",
        "all layers data-centric",
        "does not fit",
        "model-centric",
        "rank1",
        "MiB",
    ] {
        assert!(text.contains(part), "{part} in\n{text}");
    }
}

#[test]
fn bad_fleet_files_are_refused_in_words() {
    let good = fleet(&[shape(16, 64)], &[1e9], 1e9).to_toml();
    assert!(Fleet::parse(&good, "fleet.toml").is_ok());
    let cases = [
        ("version = 1", "version = 2", "version is 2, allowed is 1"),
        ("small_s", "smal_s", "unknown field `smal_s`"),
        ("small_s = 0.00002", "small_s = -1.0", "links.small_s is -1"),
        ("small_s = 0.00002", "small_s = nan", "links.small_s is NaN"),
        (
            "small_s = 0.00002",
            "small_s = \"x\"",
            "invalid type: string",
        ),
        (
            "bytes_per_s = 1000000000.0",
            "bytes_per_s = 0.0",
            "allowed is a number > 0",
        ),
        (
            "name = \"rank0\"",
            "name = rank0",
            "fleet.toml is no fleet file",
        ),
        (
            "backend = \"cpu\"",
            "backend = \"cpu\"\nmemory_bytes = 0",
            "memory_bytes of rank `rank0`",
        ),
        ("activation = \"gelu\"", "activation = \"gelo\"", "gelo"),
    ];
    for (from, to, expected) in cases {
        assert!(good.contains(from), "{from} in\n{good}");
        let error = Fleet::parse(&good.replace(from, to), "fleet.toml")
            .unwrap_err()
            .to_string();
        assert!(error.contains(expected), "{error}");
        assert!(error.contains("fleet.toml"), "{error}");
    }
    let none = good.split("[[ranks]]").next().unwrap();
    let none = none.replace("engine", "ranks = []\nengine");
    let error = Fleet::parse(&none, "fleet.toml").unwrap_err().to_string();
    assert!(error.contains("at least one [[ranks]]"), "{error}");
    let error = Fleet::load(std::path::Path::new("/nowhere/fleet.toml"))
        .unwrap_err()
        .to_string();
    assert!(error.contains("swin-moe calibrate"), "{error}");
}

#[test]
fn a_fleet_of_another_model_is_refused() {
    let fleet = fleet(&[shape(16, 64)], &[1e9, 1e9], 1e9);
    let other = workload(&[shape(16, 128)], &[1], 4);
    let error = choose(&fleet, &other).unwrap_err().to_string();
    assert!(error.contains("d_ff 128"), "{error}");
    let mut other = workload(&[shape(16, 64)], &[1], 4);
    other.replicated_params = 1;
    assert!(matches!(
        choose(&fleet, &other),
        Err(FleetError::Model { .. })
    ));
}

#[test]
fn hidden_units_come_in_what_kernels_like() {
    assert_eq!(width_multiple(1536, 4), 16);
    assert_eq!(width_multiple(128, 2), 8);
    assert_eq!(width_multiple(30, 2), 1);
}

/// A layer on its own, as a model to be measured.
struct OneLayer {
    layer: hexa_moe::Moe<Autodiff<Cpu>>,
}

impl MeasuredStep for OneLayer {
    fn expert_units(&self) -> usize {
        24
    }

    fn forward_backward(&mut self, samples: usize) -> Result<Duration, String> {
        let shape = [samples, self.layer.d_model];
        let start = Instant::now();
        let x = Tensor::<_, 2>::ones(shape, &Default::default());
        let out = self.layer.try_forward(x).map_err(|e| e.to_string())?;
        drop((out.output.sum() + out.aux_loss).backward());
        Ok(start.elapsed())
    }

    fn update(&mut self) -> Result<(u64, Duration), String> {
        Ok((self.layer.num_params() as u64, Duration::ZERO))
    }
}

#[test]
fn ranks_calibrate_together_and_agree() {
    let ffn = shape(6, 24);
    let work = workload(&[ffn, ffn], &[1, 1], 8);
    let ranks = local::world(2).into_iter().map(|comm| {
        let work = work.clone();
        std::thread::spawn(move || {
            let context = ParallelContext::new(comm);
            let config = hexa_moe::MoeConfig::new(6, 24, 3).with_top_k(2);
            let mut step = OneLayer {
                layer: config.init(&Default::default()).unwrap(),
            };
            let calibration = Calibration {
                workload: &work,
                batches: vec![4, 8],
                seconds: 1e-4,
                name: format!("part {}", context.rank()),
                backend: "cpu".into(),
                memory_bytes: None,
                engine: "local".into(),
            };
            let device = Default::default();
            calibrate::<Autodiff<Cpu>>(&context, &device, &calibration, &mut step).unwrap()
        })
    });
    let ranks: Vec<_> = ranks.collect();
    let fleets: Vec<Fleet> = ranks.into_iter().map(|r| r.join().unwrap()).collect();
    assert_eq!(fleets[0], fleets[1]);
    let fleet = &fleets[0];
    assert_eq!(fleet.ranks[1].name, "part 1");
    // One measurement for the one shape of both layers; what was measured took time.
    assert_eq!(fleet.ranks[0].ffn.len(), 1);
    assert!(fleet.ranks[0].ffn[0].seconds(8, 24) > 0.0);

    let folder = std::env::temp_dir().join(format!("hexa-fleet-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let path = folder.join("fleet.toml");
    fleet.save(&path).unwrap();
    assert_eq!(&Fleet::load(&path).unwrap(), fleet);
    std::fs::remove_dir_all(&folder).unwrap();
    assert_eq!(
        choose(fleet, &work)
            .unwrap()
            .plan
            .batch
            .iter()
            .sum::<usize>(),
        8
    );
}
