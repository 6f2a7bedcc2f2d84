//! Runs whose modes and shares were chosen by measurements: what is chosen, remembered, overridden
//! and reported. On the CPU, ranks as threads.

use std::fs;
use std::path::Path;

use hexa_moe::parallel::fleet::{Fleet, LinkCost};
use hexa_moe::parallel::{LayerPlan, Mode, ParallelPlan};
use swin_moe::train::run_dir::RunDir;

use crate::harness::{TINY, run, sets, succeed, words};
use crate::ranks::{QUIET, assert_close, train_quiet};

/// A fleet for the tiny model whose times are set by hand: rank 1 takes three times as long as rank
/// 0 for everything, and links make weights cheap to move in the first layer, tokens in the second.
fn made_up(path: &Path) {
    let line = format!(
        "calibrate --ranks 2 --seconds 1e-4 --output {}",
        path.display()
    );
    let mut arguments = words(&line);
    arguments.extend(sets(&[&TINY[..], &QUIET].concat()));
    succeed(&arguments);
    let mut fleet = Fleet::load(path).unwrap();
    for (rank, slow) in fleet.ranks.iter_mut().zip([1.0, 3.0]) {
        rank.step.fixed_s = 0.0;
        rank.step.sample_s = 1e-6 * slow;
        rank.step.parameter_s = 1e-9 * slow;
        for cost in &mut rank.ffn {
            cost.fixed_s = 0.0;
            cost.token_s = 0.0;
            cost.unit_s = 0.0;
            cost.token_unit_s = 1e-10 * slow;
        }
    }
    let link = |bytes_per_s| LinkCost {
        latency_s: 0.0,
        bytes_per_s,
    };
    let links = &mut fleet.links;
    links.small_s = 0.0;
    (links.gather_weights, links.reduce_weight_gradients) = (link(1e6), link(1e6));
    (links.gather_tokens, links.reduce_tokens) = (link(2e7), link(2e7));
    fleet.save(path).unwrap();
}

/// What [`made_up`] leads to: 240 images as 3:1, and so with slices of 16 and 32 units.
fn expected(modes: [Mode; 2]) -> ParallelPlan {
    ParallelPlan {
        layers: vec![
            LayerPlan {
                mode: modes[0],
                widths: vec![12, 4],
            },
            LayerPlan {
                mode: modes[1],
                widths: vec![24, 8],
            },
        ],
        batch: vec![180, 60],
    }
}

fn plan_of(run: &Path) -> Option<ParallelPlan> {
    let run = RunDir::open(run).unwrap();
    run.load_last().unwrap().0.state.plan
}

fn resume(run: &Path, line: &str) -> String {
    succeed(&words(&format!("train --resume {} {line}", run.display()))).stderr
}

/// Numbers of a row of the report's comparison.
fn row(report: &str, label: &str) -> Vec<f64> {
    let (_, row) = report.split_once(label).unwrap();
    let (row, _) = row.split_once("</tr>").unwrap();
    let cells = row.split("<td>").skip(1);
    let number = |cell: &str| cell.split('<').next().unwrap().parse().unwrap();
    cells.map(number).collect()
}

#[test]
fn a_fleet_is_remembered_with_its_run() {
    let dir = tempfile::tempdir().unwrap();
    let fleet = dir.path().join("fleet.toml");
    made_up(&fleet);
    let fleet = fleet.display();
    let one = dir.path().join("one");
    train_quiet(&one, &[], "--max-steps 14");
    let output = dir.path().join("several");
    train_quiet(&output, &[], &format!("--fleet {fleet} --max-steps 6"));
    // The mode is chosen for each layer.
    let mixed = expected([Mode::DataCentric, Mode::ModelCentric]);
    assert_eq!(plan_of(&output), Some(mixed.clone()));

    // Resumed: the same, predicted and compared as before.
    let said = resume(&output, "--max-steps 9");
    let shares = "rank 0 of 2: 180 of 240 images of a batch; hidden units by layer: 12 of 16 \
                  (DataCentric), 24 of 32 (ModelCentric); predicted";
    assert!(said.contains(shares), "{said}");
    assert_eq!(plan_of(&output), Some(mixed));
    let report = fs::read_to_string(output.join("report.html")).unwrap();
    assert!(report.contains("median of 2<"), "{report}");
    // Three f32 numbers: predicted, measured and their ratio.
    for label in [
        "whole step, ms",
        "rank 0 (rank0, cpu, 180 images)",
        "rank 1 (rank1",
    ] {
        let numbers = row(&report, label);
        assert!(
            numbers.len() == 3 && numbers.iter().all(|&n| n > 0.0),
            "{label} {numbers:?}"
        );
    }
    // Weights of 3 · (8 · 16 + 16 + 16 · 8) numbers are moved twice, 960 tokens of 16 numbers four
    // times and their two gate weights, ids and gradients thrice; to one other rank, in f32.
    let bytes = 4 * (2 * 3 * (8 * 16 + 16 + 16 * 8) + 960 * (4 * 16 + 3 * 2));
    let mebi = bytes as f64 / 1048576.0;
    let moved = row(&report, "moved by MoE layers, MiB");
    assert!((moved[0] / mebi - 1.0).abs() < 0.01, "{moved:?} {mebi}");
    assert!((moved[1] / mebi - 1.0).abs() < 0.02, "{moved:?} {mebi}");

    // Overridden: first the mode of all layers, then the shares, which then stay overridden.
    resume(
        &output,
        &format!("--fleet {fleet} --mode model --max-steps 10"),
    );
    assert_eq!(plan_of(&output), Some(expected([Mode::ModelCentric; 2])));
    resume(&output, "--max-steps 11");
    assert_eq!(plan_of(&output), Some(expected([Mode::ModelCentric; 2])));
    resume(&output, "--mode data --split 1,2 --max-steps 12");
    let said = resume(&output, "--max-steps 13");
    assert!(said.contains("rank 0 of 2: 80 of 240 images"), "{said}");
    assert_eq!(plan_of(&output), None);
    resume(&output, "--ranks 1 --max-steps 14");
    assert_close(&output, &one, 0, 1e-4);
}

#[test]
fn without_a_fleet_file_ranks_are_measured_first() {
    let dir = tempfile::tempdir().unwrap();
    let one = dir.path().join("one");
    train_quiet(&one, &[], "--max-steps 4");
    let output = dir.path().join("several");
    let settings = [&TINY[..], &QUIET].concat();
    let line = format!(
        "train --ranks 2 --mode auto --max-steps 2 --output {}",
        output.display()
    );
    let mut arguments = words(&line);
    arguments.extend(sets(&settings));
    let said = succeed(&arguments).stderr;
    assert!(
        said.contains("measuring 2 ranks") && said.contains("predicted"),
        "{said}"
    );
    let fleet = Fleet::load(&output.join("fleet.toml")).unwrap();
    assert_eq!((fleet.world_size(), fleet.engine.as_str()), (2, "local"));
    let plan = plan_of(&output).unwrap();
    let said = resume(&output, "--max-steps 4");
    assert!(!said.contains("measuring"), "{said}");
    assert_eq!(plan_of(&output), Some(plan));
    assert_close(&output, &one, 0, 1e-4);

    // Nothing is trained in an evaluation.
    let line = format!("eval --run {} --ranks 2 --mode auto", output.display());
    let said = run(&words(&line));
    assert_eq!(said.status, Some(1));
    assert!(
        said.stderr.contains("choose --mode data or model"),
        "{}",
        said.stderr
    );
}
