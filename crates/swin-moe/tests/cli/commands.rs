//! Every command besides `train`, once, on real input.

use std::fs;
use std::path::Path;

use safetensors::SafeTensors;

use crate::files::{image_folder, write_picture};
use crate::harness::{
    TOP1_LINEAR, fixture, last_checkpoint, run, sets, succeed, train_tiny, words,
};

fn command(line: String) -> String {
    succeed(&words(&line)).stdout
}

/// Settings that separate the two classes of [`image_folder`] in a few steps.
const FOLDER: [&str; 6] = [
    "model.in_chans=3",
    "train.batch_size=4",
    "train.epochs=30",
    "train.lr=1e-2",
    "augment.random_crop_padding=0",
    "moe.dropout=0.0",
];

#[test]
fn a_folder_is_learnt_evaluated_and_predicted() {
    let dir = tempfile::tempdir().unwrap();
    let folder = image_folder(&dir.path().join("images"));
    let run = dir.path().join("run");
    train_tiny(&run, &FOLDER, &format!("--data {}", folder.display()));
    let checkpoint = last_checkpoint(&run).display().to_string();
    let run = run.display();

    let said = command(format!("eval --run {run}"));
    assert!(
        said.contains("6 images: top-1 100.00 %, top-5 100.00 %"),
        "{said}"
    );
    let elsewhere = format!("--data {}", folder.display());
    let last = command(format!("eval --checkpoint {checkpoint} {elsewhere}"));
    assert!(last.contains("6 images: "), "{last}");

    let mut line = format!("predict --run {run}");
    let mut expected = Vec::new();
    for (number, (class, name)) in [(1, "up"), (0, "down"), (1, "up")].into_iter().enumerate() {
        // Pictures that were in neither split, in another format and size.
        let path = dir.path().join(format!("new-{number}.gif"));
        write_picture(&path, class, 9 + number as u32);
        line += &format!(" {}", path.display());
        expected.push((path.display().to_string(), name));
    }
    let tensors = dir.path().join("scores.safetensors");
    let said = command(format!("{line} --tensors {}", tensors.display()));
    let lines: Vec<&str> = said.lines().collect();
    assert_eq!(lines.len(), 3 * expected.len(), "{said}");
    let mut likeliest = Vec::new();
    for (lines, (path, name)) in lines.chunks(3).zip(&expected) {
        assert_eq!(lines[0], path);
        assert!(lines[1].ends_with(&format!(" %  {name}")), "{said}");
        let percent = |line: &str| {
            line.split('%')
                .next()
                .unwrap()
                .trim()
                .parse::<f64>()
                .unwrap()
        };
        let [first, second] = [percent(lines[1]), percent(lines[2])];
        assert!(
            first >= second && (first + second - 100.0).abs() < 0.02,
            "{said}"
        );
        likeliest.push(first);
    }

    // The same as numbers, with what the model saw.
    let tensors = swin_moe::weights::read_file(&tensors).unwrap();
    assert_eq!(tensors["images"].shape, [3, 3, 8, 8]);
    assert_eq!(tensors["logits"].shape, [3, 2]);
    let logits = tensors["logits"].as_floats().unwrap();
    for (logits, percent) in logits.chunks(2).zip(likeliest) {
        let likelier = 1.0 / (1.0 + (-(logits[0] - logits[1]).abs()).exp());
        assert!(
            (100.0 * f64::from(likelier) - percent).abs() < 0.01,
            "{said}"
        );
    }
}

/// `--run` takes the best checkpoint; exporting and importing keeps what it says of the digits.
#[test]
fn an_exported_model_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    train_tiny(&dir.path().join("run"), &[], "");
    command(format!(
        "export --run {} --output {}",
        path("run"),
        path("a.safetensors")
    ));
    // A run's own settings are those that its weights need.
    let settings = format!("{}/config.toml --set model.num_classes=10", path("run"));
    let again = path("again");
    let said = command(format!(
        "import {} --config {settings} --output {again}",
        path("a.safetensors")
    ));
    assert!(
        said.contains(&format!("swin-moe eval --run {again}")),
        "{said}"
    );
    command(format!(
        "export --run {again} --output {}",
        path("b.safetensors")
    ));
    let [a, b] = ["a.safetensors", "b.safetensors"].map(|name| fs::read(path(name)).unwrap());
    assert!(a == b, "the files differ");
    let eval = |run: &str| command(format!("eval --run {run}"));
    assert_eq!(eval(&path("run")), eval(&again));

    // An imported model can be trained further.
    let resumed = command(format!("train --resume {again} --max-steps 2"));
    assert!(resumed.contains("stopped at step 2"), "{resumed}");
}

/// From a run and from the file that it exports; what comes out can be evaluated and trained.
#[test]
fn a_dense_run_is_upcycled() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    let dense = path("dense");
    train_tiny(&dir.path().join("dense"), &["moe.blocks=[[],[]]"], "");
    let weights = path("dense.safetensors");
    command(format!("export --run {dense} --output {weights}"));

    let sets = "--set moe.blocks=[[0],[0]] --set moe.normalize_gate=true";
    let settings = format!("{dense}/config.toml --set model.num_classes=10");
    let scores = |run: &str| {
        let said = command(format!("eval --run {run}"));
        let line = said.lines().find(|line| line.contains("top-1"));
        line.unwrap().to_owned()
    };
    for (output, source) in [
        ("from-run", format!("--run {dense}")),
        (
            "from-file",
            format!("--weights {weights} --config {settings}"),
        ),
    ] {
        let output = path(output);
        let said = command(format!("upcycle {source} {sets} --output {output}"));
        assert!(said.contains("outputs equal the dense model's"), "{said}");
        assert_eq!(scores(&output), scores(&dense));
        let resumed = command(format!("train --resume {output} --max-steps 1"));
        assert!(resumed.contains("stopped at step 1"), "{resumed}");
    }
    let noisy = path("noisy");
    let said = command(format!(
        "upcycle --run {dense} {sets} --noise 0.3 --output {noisy}"
    ));
    assert!(
        said.contains("outputs differ from the dense model's"),
        "{said}"
    );
    let again = run(&words(&format!(
        "upcycle --run {noisy} --output {}",
        path("again")
    )));
    assert_eq!(again.status, Some(1));
    assert!(
        again.stderr.contains("it has experts already"),
        "{}",
        again.stderr
    );
}

#[test]
fn the_published_checkpoint_is_imported() {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("published.toml");
    fs::write(&config, TOP1_LINEAR).unwrap();
    let [output, exported] = ["run", "weights.safetensors"].map(|name| dir.path().join(name));
    let pth = fixture("top1_linear/checkpoint.pth");
    let [pth, config] = [pth, config].map(|path| path.display().to_string());
    let import = |output: &Path, more: &str| {
        let output = output.display();
        words(&format!(
            "import {pth} --config {config} --output {output} {more}"
        ))
    };
    succeed(&import(&output, ""));
    let exported_path = exported.display();
    command(format!(
        "export --run {} --output {exported_path}",
        output.display()
    ));
    // The exported weights take the checkpoint's place in the reference case.
    let case = dir.path().join("case");
    fs::create_dir(&case).unwrap();
    for name in ["config.json", "io.safetensors"] {
        fs::copy(fixture("top1_linear").join(name), case.join(name)).unwrap();
    }
    fs::copy(&exported, case.join("weights.safetensors")).unwrap();
    let said = command(format!("parity {}", case.display()));
    assert!(said.contains("passed: largest relative error"), "{said}");

    // What does not fit is listed, and kept out if the user wishes so.
    let partial = dir.path().join("partial");
    let wider = "--set model.num_classes=11";
    assert_ne!(run(&import(&partial, wider)).status, Some(0));
    let said = succeed(&import(&partial, &format!("{wider} --allow-partial")));
    assert!(said.stdout.contains("head.weight"), "{}", said.stdout);
}

#[test]
fn parity_passes_on_both_cases_and_fails_when_asked_for_too_much() {
    let cases = ["top1_linear", "top2_cosine"].map(|case| fixture(case).display().to_string());
    let line = format!("parity {}", cases.join(" "));
    let said = command(line.clone());
    assert_eq!(said.matches("passed: ").count(), 2, "{said}");
    let said = run(&words(&format!("{line} --tolerance 1e-12")));
    assert_eq!(said.status, Some(1));
    assert!(said.stdout.contains("FAILED"), "{}", said.stdout);
}

/// The last line but the memory's: name, parameters, …
fn total(info: &str) -> Vec<String> {
    let line = info.lines().find(|line| line.starts_with("total")).unwrap();
    words(line)
}

#[test]
fn info_counts_what_a_checkpoint_holds() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("run");
    train_tiny(&run, &["moe.shared_d_ff=5"], "--max-steps 1");
    let info = command(format!("info --run {}", run.display()));
    for layer in [
        "patch_embed",
        "layers.1.blocks.0.attn",
        "mlp (experts)",
        "norm, head",
    ] {
        assert!(info.contains(layer), "{layer}: {info}");
    }
    assert!(
        info.contains("training memory, f32, batch of 240"),
        "{info}"
    );

    let checkpoint = last_checkpoint(&run);
    let bytes = fs::read(checkpoint.join("rank-0000.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let elements: usize = file
        .iter()
        .filter(|(name, _)| name.starts_with("model."))
        .map(|(_, view)| view.shape().iter().product::<usize>())
        .sum();
    let total = total(&info);
    assert_eq!(total[2], "k", "{info}");
    let thousands: f64 = total[1].parse().unwrap();
    assert!(
        (thousands - elements as f64 / 1e3).abs() <= 0.005,
        "{elements}: {info}"
    );

    // The same from the file and from the settings.
    let from_file = command(format!("info --checkpoint {}", checkpoint.display()));
    assert_eq!(from_file, info);
    let mut arguments = words("info");
    arguments.extend(sets(&crate::harness::TINY));
    arguments.extend(sets(&["moe.shared_d_ff=5"]));
    assert_eq!(succeed(&arguments).stdout, info);
}

/// The shared expert has the width that was asked for, not the MLPs'.
#[test]
fn the_shared_expert_has_its_own_width() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("run");
    train_tiny(&run, &["moe.shared_d_ff=5"], "--max-steps 1");
    let exported = dir.path().join("weights.safetensors");
    command(format!(
        "export --run {} --output {}",
        run.display(),
        exported.display()
    ));
    let bytes = fs::read(&exported).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    for (stage, dim) in [(0, 8), (1, 16)] {
        let layer = format!("layers.{stage}.blocks.0.mlp._moe_layer");
        let shape = |name: &str| {
            file.tensor(&format!("{layer}.{name}"))
                .unwrap()
                .shape()
                .to_vec()
        };
        assert_eq!(shape("shared.batched_fc1_w"), [1, 5, dim]);
        assert_eq!(shape("shared.batched_fc2_w"), [1, 5, dim]);
        assert_eq!(shape("experts.batched_fc1_w"), [3, 2 * dim, dim]);
    }
}

#[test]
fn info_describes_the_published_model() {
    let config = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs/swin-moe-small.toml");
    let config = config.display();
    let info = command(format!(
        "info --config {config} --set model.num_classes=21841"
    ));
    assert_eq!(total(&info)[2], "M", "{info}");
}

#[test]
fn a_measured_fleet_is_planned_for() {
    let dir = tempfile::tempdir().unwrap();
    let fleet = dir.path().join("fleet.toml");
    let line = format!(
        "calibrate --ranks 2 --seconds 1e-4 --output {}",
        fleet.display()
    );
    let settings = [
        "train.batch_size=8",
        "model.depths=[1,1]",
        "moe.blocks=[[0],[0]]",
    ];
    let mut arguments = words(&line);
    arguments.extend(sets(&settings));
    let said = succeed(&arguments).stdout;
    assert!(said.contains("rank1 (cpu)"), "{said}");

    let mut arguments = words(&format!("plan --fleet {}", fleet.display()));
    arguments.extend(sets(&settings));
    let said = succeed(&arguments).stdout;
    assert!(said.contains("batch of 8, 2 ranks"), "{said}");
    assert!(said.contains("predicted step time"), "{said}");
    // Hidden units of both layers and all samples are given to somebody.
    let column =
        |line: &str, at: usize| -> String { line.split_whitespace().nth(at).unwrap().to_owned() };
    let layers: Vec<&str> = said
        .lines()
        .filter(|line| line.contains("-centric "))
        .collect();
    let layers: Vec<usize> = layers
        .iter()
        .filter(|line| !line.contains("all layers"))
        .map(|line| {
            column(line, 2)
                .split(':')
                .map(|n| n.parse::<usize>().unwrap())
                .sum()
        })
        .collect();
    assert_eq!(layers, [128, 256]);
    let samples = said
        .lines()
        .filter(|line| line.contains("rank0 ") || line.contains("rank1 "));
    let samples: usize = samples
        .map(|line| column(line, 3).parse::<usize>().unwrap())
        .sum();
    assert_eq!(samples, 8);

    // The same shares train.
    let output = dir.path().join("run");
    let line = format!(
        "train --max-steps 2 --fleet {} --output {}",
        fleet.display(),
        output.display()
    );
    let mut train = words(&line);
    train.extend(sets(&settings));
    let said = succeed(&train);
    assert!(
        said.stderr.contains("of 8 images of a batch") && said.stderr.contains("; predicted "),
        "{}",
        said.stderr
    );
    assert!(said.stdout.contains("stopped at step 2"), "{}", said.stdout);
    train.extend(words("--ranks 3"));
    let said = run(&train);
    assert!(
        said.stderr.contains("the fleet has 2 ranks, 3 are wanted"),
        "{}",
        said.stderr
    );

    // Measured on another model, or with too little memory.
    arguments.extend(sets(&["moe.num_experts=5"]));
    let said = run(&arguments);
    assert_eq!(said.status, Some(1));
    assert!(
        said.stderr.contains("calibrate with the configuration"),
        "{}",
        said.stderr
    );
    let text = fs::read_to_string(&fleet).unwrap();
    let poor = text
        .lines()
        .map(|line| match line.starts_with("memory_bytes") {
            true => "memory_bytes = 1000\n".to_owned(),
            false => format!("{line}\n"),
        });
    fs::write(&fleet, poor.collect::<String>()).unwrap();
    let mut arguments = words(&format!("plan --fleet {}", fleet.display()));
    arguments.extend(sets(&settings));
    let said = run(&arguments);
    assert_eq!(said.status, Some(1));
    assert!(
        said.stderr.contains("lower the batch size"),
        "{}",
        said.stderr
    );
}

#[test]
fn the_loader_alone_delivers_whole_epochs() {
    let said = command("loader --epochs 2 --set train.batch_size=100 --set data.workers=3".into());
    // Every fifth of 1,797 digits is for evaluation; the last 38 do not fill a batch.
    assert_eq!(said.lines().count(), 3, "{said}");
    assert!(said.starts_with("1438 images, 3 workers"), "{said}");
    assert_eq!(said.matches(": 1400 images in ").count(), 2, "{said}");
}

/// Least, median and most of what `throughput` says.
fn rates(said: &str) -> [f64; 3] {
    let line = said.lines().nth(1).unwrap();
    let numbers: Vec<f64> = line
        .split(|c: char| !(c.is_ascii_digit() || c == '.'))
        .filter_map(|word| word.parse().ok())
        .collect();
    let &[median, _windows, _steps, least, most] = numbers.as_slice() else {
        panic!("{said}");
    };
    [least, median, most]
}

#[test]
fn the_model_alone_is_timed() {
    let small = "--warmup 1 --windows 3 --steps 2 --batch-size 6 --set train.accumulation_steps=4";
    for (mode, head) in [
        ("", "train, f32, batch of 6, cpu ("),
        (
            "--mode train --set train.precision=bf16",
            "train, bf16, batch of 6, cpu (",
        ),
        ("--mode eval", "eval, f32, batch of 6, cpu ("),
    ] {
        let said = command(format!("throughput {small} {mode}"));
        assert!(said.starts_with(head), "{said}");
        assert!(said.contains("median of 3 windows of 2 steps"), "{said}");
        let [least, median, most] = rates(&said);
        assert!(0.0 < least && least <= median && median <= most, "{said}");
        assert!(said.contains("the device does not tell"), "{said}");
    }
    // The settings' own batches, of training and of evaluation.
    let set = "--set train.batch_size=3 --set train.eval_batch_size=5 --windows 1 --steps 1";
    for (mode, head) in [("train", "batch of 3,"), ("eval", "batch of 5,")] {
        let said = command(format!("throughput {set} --warmup 0 --mode {mode}"));
        assert!(said.contains(head), "{said}");
        let [least, median, most] = rates(&said);
        assert!(least == median && median == most, "{said}");
    }
}

#[test]
fn memory_is_predicted_by_what_takes_it() {
    let said = command("memory --steps 1 --batch-size 3 --set train.ema_decay=0.9".into());
    let probe: serde_json::Value = serde_json::from_str(&said).unwrap();
    let predicted = probe["predicted"].as_object().unwrap();
    let sum: u64 = predicted.values().filter_map(|value| value.as_u64()).sum();
    assert_eq!(probe["predicted_bytes"], sum, "{said}");
    // Burn's CPU back-end does not count; the process does.
    assert!(probe["measured_bytes"].is_null(), "{said}");
    assert!(probe["resident_bytes"].as_u64().unwrap() > sum, "{said}");
    // Two moments and the moving average, of every value of the model that is trained.
    let info = command("info".into());
    let params = total(&info)[1].parse::<f64>().unwrap() * 1e3;
    let optimizer = predicted["optimizer_bytes"].as_u64().unwrap() as f64;
    assert!(
        (optimizer / (12.0 * params) - 1.0).abs() < 0.02,
        "{info} {said}"
    );
}
