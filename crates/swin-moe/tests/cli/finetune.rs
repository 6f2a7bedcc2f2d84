//! Runs that start with another's weights, and linear probes. On the CPU.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use burn::tensor::{Tensor, TensorData};
use hexa_ops::backends::Cpu;
use swin_moe::config::Config;
use swin_moe::data::Batch;
use swin_moe::settings::model_config;
use swin_moe::train::TrainImages;
use swin_moe::weights::{ImportOptions, import_file};

use crate::files::image_folder;
use crate::harness::{
    TINY, TOP1_LINEAR, fixture, last_checkpoint, run, sets, succeed, train_tiny, words,
};
use crate::runs::{numbers, records, tensors};

/// A model of another size than [`TINY`]'s, with shifted windows, of pictures of three channels.
const COLOURED: [&str; 6] = [
    "model.in_chans=3",
    "model.image_size=16",
    "model.depths=[2,1]",
    "moe.blocks=[[1],[0]]",
    "train.batch_size=8",
    "train.epochs=2",
];

/// What a run was evaluated with: its weights by name, or their averages.
fn evaluated(run: &Path) -> BTreeMap<String, Vec<u8>> {
    let all = tensors(run);
    let of = |prefix: &str| -> BTreeMap<String, Vec<u8>> {
        let named = all.iter().filter_map(|(name, bytes)| {
            Some((name.strip_prefix(prefix)?.to_owned(), bytes.clone()))
        });
        named.collect()
    };
    let mut weights = of("model.");
    weights.extend(of("optimizer.average."));
    weights
}

fn is_head(name: &str) -> bool {
    name.starts_with("head.")
}

/// Asserts that all but the head are the same to the bit.
#[track_caller]
fn assert_same_backbone(run: &Path, source: &BTreeMap<String, Vec<u8>>) {
    let weights = evaluated(run);
    assert!(weights.keys().eq(source.keys()));
    for (name, bytes) in &weights {
        assert!(is_head(name) || *bytes == source[name], "{name} differs");
    }
}

#[track_caller]
fn train_coloured(output: &Path, settings: &[&str], line: &str) -> String {
    train_tiny(output, &[&COLOURED, settings].concat(), line).stderr
}

#[test]
fn a_run_goes_on_at_another_size_with_a_head_for_other_classes() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let folder = image_folder(&path("images"));
    let source = path("source");
    // One epoch, so that the best checkpoint is the last.
    let average = ["train.ema_decay=0.9", "train.epochs=1"];
    train_coloured(&source, &average, &format!("--data {}", folder.display()));
    let weights = evaluated(&source);

    // Twelve tokens a side in windows of three, and then six; there were eight in windows of two.
    let init = format!("init.run={}", source.display());
    let larger = [init.as_str(), "model.image_size=24", "model.window_size=3"];
    let start = path("start");
    let said = train_coloured(&start, &larger, "--max-steps 0");
    assert_same_backbone(&start, &weights);
    let head = &evaluated(&start)["head.weight"];
    assert_eq!(head.len(), 16 * 10 * 4);
    for line in [
        "starting with the weights of the run",
        "the head is fresh: the weights know 2 classes, the data 10",
        "model.pretrained_window_sizes = [2, 2]",
    ] {
        assert!(said.contains(line), "{line}: {said}");
    }
    let config = fs::read_to_string(start.join("config.toml")).unwrap();
    assert!(
        config.contains("pretrained_window_sizes = [2, 2]"),
        "{config}"
    );

    // The same from a checkpoint, and from the weights as a file.
    let checkpoint = path("from-checkpoint");
    let init = format!("init.run={}", last_checkpoint(&source).display());
    train_coloured(&checkpoint, &[&init, larger[1], larger[2]], "--max-steps 0");
    assert_eq!(tensors(&checkpoint), tensors(&start));
    let exported = path("weights.safetensors");
    succeed(&words(&format!(
        "export --run {} --output {}",
        source.display(),
        exported.display()
    )));
    let file = path("from-file");
    let init = format!("init.weights={}", exported.display());
    let said = train_coloured(&file, &[&init, larger[1], larger[2]], "--max-steps 0");
    assert!(said.contains("the weights know 2 classes"), "{said}");
    assert!(said.contains("pretrained_window_sizes = [2, 2]"), "{said}");
    assert_eq!(tensors(&file), tensors(&start));

    // What the settings say of the windows counts; the head of as many classes is kept.
    let again = path("again");
    let init = format!("init.run={}", start.display());
    let chosen = [init.as_str(), "model.pretrained_window_sizes=[3,0]"];
    let said = train_coloured(&again, &chosen, "--max-steps 0");
    assert!(
        said.contains("the head is theirs, too: 10 classes"),
        "{said}"
    );
    assert!(!said.contains("is scaled to"), "{said}");
    assert_eq!(evaluated(&again), evaluated(&start));

    // It learns, and goes on without its source.
    let [unbroken, broken] = ["unbroken", "broken"].map(path);
    let init = format!("init.run={}", source.display());
    let larger = [init.as_str(), larger[1], larger[2], "train.epochs=1"];
    train_coloured(&unbroken, &larger, "--max-steps 4");
    assert_ne!(evaluated(&unbroken), evaluated(&start));
    train_coloured(&broken, &larger, "--max-steps 1");
    fs::remove_dir_all(&source).unwrap();
    succeed(&words(&format!(
        "train --max-steps 4 --resume {}",
        broken.display()
    )));
    assert_eq!(numbers(&unbroken), numbers(&broken));
    assert_eq!(tensors(&unbroken), tensors(&broken));
    let report = fs::read_to_string(broken.join("report.html")).unwrap();
    assert!(report.contains("those of the run"), "{report}");
}

#[test]
fn published_weights_are_fine_tuned_at_another_size() {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("top1.toml");
    fs::write(&config, TOP1_LINEAR).unwrap();
    let output = dir.path().join("run");
    let mut line = words(&format!(
        "train --max-steps 0 --config {} --output {}",
        config.display(),
        output.display()
    ));
    let weights = fixture("top1_linear/checkpoint.pth");
    line.extend(sets(&[
        &format!("init.weights={}", weights.display()),
        "model.image_size=48",
        "model.window_size=6",
        "train.batch_size=2",
    ]));
    let said = succeed(&line).stderr;
    assert!(said.contains("the head is theirs, too"), "{said}");
    assert!(said.contains("pretrained_window_sizes = [4, 4]"), "{said}");

    // Exported at its new size, it is the published weights again, its tables aside.
    let exported = dir.path().join("back.safetensors");
    succeed(&words(&format!(
        "export --run {} --output {}",
        output.display(),
        exported.display()
    )));
    let published = swin_moe::weights::read_file(&weights).unwrap();
    let ours = swin_moe::weights::read_file(&exported).unwrap();
    let tables = [
        "relative_coords_table",
        "relative_position_index",
        "attn_mask",
    ];
    let is_table = |name: &str| tables.iter().any(|table| name.ends_with(table));
    let mut compared = 0;
    for (name, tensor) in published.iter().filter(|(name, _)| !is_table(name)) {
        assert_eq!(tensor, &ours[name], "{name}");
        compared += 1;
    }
    assert!(compared > 40, "{compared}");
}

/// A linear probe's settings: [`TINY`]'s noise, dropout and stochastic depth must play no part.
fn probe(source: &Path) -> Vec<String> {
    [
        "init.freeze=backbone",
        "train.epochs=2",
        "train.warmup_epochs=0",
        "train.lr=0.02",
        "train.min_lr=0.005",
        "train.weight_decay=0.3",
        "train.clip_grad=0",
    ]
    .map(str::to_owned)
    .into_iter()
    .chain([format!("init.run={}", source.display())])
    .collect()
}

/// Softmax regression on fixed features with AdamW, in f64: written from the formulas.
struct Regression {
    classes: usize,
    /// `[width, classes]` and then `[classes]`.
    params: Vec<f64>,
    first: Vec<f64>,
    second: Vec<f64>,
    steps: i32,
}

impl Regression {
    fn new(weight: Vec<f64>, bias: Vec<f64>) -> Self {
        let classes = bias.len();
        let params = [weight, bias].concat();
        Self {
            classes,
            first: vec![0.0; params.len()],
            second: vec![0.0; params.len()],
            params,
            steps: 0,
        }
    }

    /// Mean cross entropy and its gradient.
    fn loss(&self, features: &[Vec<f64>], labels: &[u32]) -> (f64, Vec<f64>) {
        let mut loss = 0.0;
        let mut gradient = vec![0.0; self.params.len()];
        let images = features.len() as f64;
        for (x, &label) in features.iter().zip(labels) {
            let (weight, bias) = self.params.split_at(x.len() * self.classes);
            let logits: Vec<f64> = (0..self.classes)
                .map(|class| {
                    let product = x.iter().enumerate();
                    let product = product.map(|(i, x)| x * weight[i * self.classes + class]);
                    product.sum::<f64>() + bias[class]
                })
                .collect();
            let sum: f64 = logits.iter().map(|logit| logit.exp()).sum();
            loss += (sum.ln() - logits[label as usize]) / images;
            for class in 0..self.classes {
                let target = f64::from(class == label as usize);
                let error = (logits[class].exp() / sum - target) / images;
                for (i, x) in x.iter().enumerate() {
                    gradient[i * self.classes + class] += error * x;
                }
                gradient[x.len() * self.classes + class] += error;
            }
        }
        (loss, gradient)
    }

    /// Decay acts on the weight alone.
    fn step(&mut self, gradient: &[f64], lr: f64) {
        self.steps += 1;
        let weights = self.params.len() - self.classes;
        for (i, &g) in gradient.iter().enumerate() {
            self.first[i] = 0.9 * self.first[i] + 0.1 * g;
            self.second[i] = 0.999 * self.second[i] + 0.001 * g * g;
            let first = self.first[i] / (1.0 - 0.9f64.powi(self.steps));
            let second = self.second[i] / (1.0 - 0.999f64.powi(self.steps));
            let decay = if i < weights { 0.3 } else { 0.0 };
            self.params[i] -= lr * decay * self.params[i];
            self.params[i] -= lr * first / (second.sqrt() + 1e-8);
        }
    }
}

fn floats(bytes: &[u8]) -> Vec<f64> {
    let values = bytes.as_chunks::<4>().0.iter();
    values.map(|&b| f64::from(f32::from_le_bytes(b))).collect()
}

#[test]
fn a_linear_probe_is_softmax_regression_on_the_features() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let source = path("source");
    train_tiny(&source, &["train.epochs=1"], "");
    let settings = probe(&source);
    let settings: Vec<&str> = settings.iter().map(String::as_str).collect();
    let [start, trained] = ["start", "trained"].map(path);
    train_tiny(&start, &settings, "--max-steps 0");
    let said = train_tiny(&trained, &settings, "").stderr;
    // 16 features, 10 classes, and biases.
    assert!(said.contains("linear probe: 170 of "), "{said}");

    let before = evaluated(&start);
    assert_eq!(before, evaluated(&source));
    assert_same_backbone(&trained, &before);
    let after = evaluated(&trained);
    for name in before.keys().filter(|name| is_head(name)) {
        assert_ne!(before[name], after[name], "{name}");
    }
    let moments: Vec<String> = tensors(&trained)
        .into_keys()
        .filter_map(|name| Some(name.strip_prefix("optimizer.first.")?.to_owned()))
        .collect();
    assert_eq!(moments, ["head.bias", "head.weight"]);

    // The features, from the library.
    let exported = path("weights.safetensors");
    succeed(&words(&format!(
        "export --run {} --output {}",
        source.display(),
        exported.display()
    )));
    let config = Config::load(Some(&trained.join("config.toml")), &[] as &[&str]).unwrap();
    let device = Default::default();
    let model = model_config(&config, 10).unwrap().init::<Cpu>(&device);
    let (model, _) = import_file(model.unwrap(), &exported, ImportOptions::default()).unwrap();
    let features = |batch: &Batch| -> Vec<Vec<f64>> {
        let images = TensorData::new(batch.images.clone(), batch.shape);
        let features = model.features(Tensor::from_data(images, &device)).unwrap();
        let rows = features.features.into_data().into_vec::<f32>().unwrap();
        let rows = rows.chunks_exact(16);
        rows.map(|row| row.iter().map(|&x| f64::from(x)).collect())
            .collect()
    };

    let mut regression =
        Regression::new(floats(&before["head.weight"]), floats(&before["head.bias"]));
    let images = TrainImages::open(&config).unwrap();
    let steps: Vec<_> = records(&trained)
        .into_iter()
        .filter(|record| record["kind"] == "step")
        .collect();
    let mut losses = Vec::new();
    for epoch in 0..2 {
        for batch in images
            .batches(240, config.train.seed, epoch, 0, None)
            .unwrap()
        {
            let batch = batch.unwrap();
            let record = &steps[losses.len()];
            let number = |key: &str| record[key].as_f64().unwrap();
            let (loss, gradient) = regression.loss(&features(&batch), &batch.labels);
            let norm = gradient.iter().map(|g| g * g).sum::<f64>().sqrt();
            let step = losses.len() + 1;
            let far = |a: f64, b: f64| (a - b).abs() > 2e-5 * b.abs();
            assert!(!far(number("ce_loss"), loss), "{step}: {record} {loss}");
            assert!(!far(number("loss"), loss), "{step}: {record} {loss}");
            assert!(!far(number("grad_norm"), norm), "{step}: {record} {norm}");
            regression.step(&gradient, number("lr"));
            losses.push(loss);
        }
    }
    assert_eq!(losses.len(), steps.len());
    assert!(losses[9] < losses[0] - 0.01, "{losses:?}");
}

/// Two ranks, of which one has no images, do what one does; a probe is resumed to the bit.
#[test]
fn a_linear_probe_repeats_on_ranks_and_after_a_stop() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let source = path("source");
    train_tiny(&source, &["train.epochs=1"], "");
    let settings = probe(&source);
    let settings: Vec<&str> = settings.iter().map(String::as_str).collect();
    let [alone, ranks, broken] = ["alone", "ranks", "broken"].map(path);
    train_tiny(&alone, &settings, "");
    train_tiny(&ranks, &settings, "--ranks 2 --split 1,0");
    let losses = |run: &Path| -> Vec<f64> {
        let steps = records(run).into_iter();
        let steps = steps.filter(|record| record["kind"] == "step");
        steps.map(|step| step["loss"].as_f64().unwrap()).collect()
    };
    let (one, two) = (losses(&alone), losses(&ranks));
    assert_eq!(one.len(), 10);
    assert_eq!(two.len(), 10);
    for (a, b) in one.iter().zip(&two) {
        assert!((a - b).abs() < 1e-5 * a, "{a} {b}");
    }

    train_tiny(&broken, &settings, "--max-steps 3");
    fs::remove_dir_all(&source).unwrap();
    let resume = words(&format!("train --resume {}", broken.display()));
    let said = succeed(&resume);
    assert!(said.stderr.contains("linear probe"), "{}", said.stderr);
    assert_eq!(numbers(&alone), numbers(&broken));
    assert_eq!(tensors(&alone), tensors(&broken));

    // A new run with the same settings does need the source.
    let mut line = words(&format!("train --output {}", path("new").display()));
    line.extend(sets(&TINY));
    line.extend(sets(&settings));
    assert_eq!(run(&line).status, Some(1));
}
