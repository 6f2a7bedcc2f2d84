//! What the commands do, beyond calling the library: defaults, and what a person reads.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use hexa_moe::parallel::fleet::Fleet;
use hexa_ops::TrainingBackend;

use super::Done;
use super::arguments;
use crate::backend::{BackendKind, Job, dispatch};
use crate::config::{Config, DataSource, Engine, Mode, Precision};
use crate::info::ModelInfo;
use crate::memory::TrainingMemory;
use crate::parity::{ParityError, ParityReport, run_parity};
use crate::settings::model_config;
use crate::train::metrics::{LayerLoad, WORST_CLASSES};
use crate::train::run_dir::{RunDir, default_output};
use crate::train::{
    Control, DenseSource, DeviceFaults, End, ImportRequest, Outcome, ParallelOverrides,
    ProbeRequest, ResumeRequest, StopFlag, TestImages, TrainImages, TrainRequest, Trained,
    UpcycleRequest, Verbosity, probe_memory, resume, step_shape,
};
use crate::weights::ImportOptions;

pub(super) fn train(arguments: arguments::Train, faults: DeviceFaults) -> Result<Done> {
    let control = Control {
        max_steps: arguments.max_steps,
        stop: stop_on_interrupt()?,
        faults,
        verbosity: Verbosity::Normal,
    };
    let outcome = match &arguments.resume {
        Some(run) => {
            let (parallel, fleet) = parallel(&arguments)?;
            resume(ResumeRequest {
                run: run.clone(),
                backend: arguments.backend,
                data: arguments.data,
                parallel,
                fleet,
                control,
            })?
        }
        None => crate::train::train(new_run(arguments, control)?)?,
    };
    if outcome.is_lead {
        summarise(&outcome);
    }
    Ok(match outcome.end {
        End::Interrupted => Done::Interrupted,
        End::Finished | End::MaxSteps => Done::Success,
    })
}

/// Settings of ranks, and the fleet that shares are chosen by, if one is given.
fn parallel(arguments: &arguments::Train) -> Result<(ParallelOverrides, Option<Fleet>)> {
    let mut overrides = ParallelOverrides {
        rebalance: arguments.rebalance,
        rebalance_threshold: arguments.rebalance_threshold,
        ..arguments.parallel.overrides()
    };
    let fleet = arguments.fleet.as_deref().map(Fleet::load).transpose()?;
    if let Some(fleet) = &fleet {
        // Processes are as many as mpirun has started.
        if overrides.engine != Some(Engine::Mpi) {
            overrides.ranks.get_or_insert(fleet.world_size());
        }
        overrides.mode.get_or_insert(Mode::Auto);
        overrides.split = Some(Vec::new());
    }
    Ok((overrides, fleet))
}

fn new_run(arguments: arguments::Train, control: Control) -> Result<TrainRequest> {
    let (overrides, fleet) = parallel(&arguments)?;
    let mut config = Config::load(arguments.config.as_deref(), &arguments.set)?;
    if let Some(folder) = arguments.data {
        config.data.source = DataSource::Folder(folder);
    }
    if let Some(seed) = arguments.seed {
        ensure!(
            i64::try_from(seed).is_ok(),
            "--seed is {seed}, allowed is 0..={}; give a smaller one",
            i64::MAX
        );
        config.train.seed = seed;
    }
    let config = overrides.apply(&config)?;
    let name = run_name(arguments.config.as_deref());
    Ok(TrainRequest {
        output: arguments.output.unwrap_or_else(|| default_output(&name)),
        name,
        config,
        backend: arguments.backend.unwrap_or(BackendKind::Cpu),
        fleet,
        control,
    })
}

/// Delivers epochs to nobody.
pub(super) fn loader(arguments: arguments::Loader) -> Result<Done> {
    let mut config = Config::load(arguments.config.as_deref(), &arguments.set)?;
    if let Some(folder) = arguments.data {
        config.data.source = DataSource::Folder(folder);
    }
    let images = TrainImages::open(&config)?;
    println!(
        "{} images, {} workers, batches of {}: {}",
        images.len(),
        config.data.num_workers(),
        config.train.batch_size,
        config.augment.summary()
    );
    for epoch in 0..arguments.epochs {
        let start = Instant::now();
        let mut delivered = 0;
        for batch in images.batches(config.train.batch_size, config.train.seed, epoch, 0, None)? {
            delivered += batch?.len();
        }
        let seconds = start.elapsed().as_secs_f64();
        println!(
            "epoch {}: {delivered} images in {seconds:.2} s, {:.0} images/s",
            epoch + 1,
            delivered as f64 / seconds
        );
    }
    Ok(Done::Success)
}

/// The name of the settings' file, without its ending.
fn run_name(config: Option<&Path>) -> String {
    config
        .and_then(Path::file_stem)
        .and_then(|stem| stem.to_str())
        .unwrap_or("digits")
        .to_owned()
}

/// The first Ctrl-C asks the run to stop after its step, the second ends the program.
fn stop_on_interrupt() -> Result<StopFlag> {
    let stop = StopFlag::default();
    let flag = stop.clone();
    ctrlc::set_handler(move || {
        if flag.raise() {
            std::process::exit(super::INTERRUPTED.into());
        }
        eprintln!("stopping after this step; Ctrl-C again ends at once, without a checkpoint");
    })
    .context("cannot listen for Ctrl-C")?;
    Ok(stop)
}

fn summarise(outcome: &Outcome) {
    let root = outcome.run.root().display();
    if let Some(eval) = &outcome.last_eval {
        println!("experts' share of the test tokens, by layer:");
        print!("{}", load_table(&eval.layers));
        println!(
            "test accuracy {:.2} % (top-5 {:.2} %), best {:.2} %",
            eval.top1,
            eval.top5,
            outcome.best_top1.unwrap_or(eval.top1)
        );
    }
    println!("report: {}", outcome.run.report().display());
    if outcome.end != End::Finished {
        println!(
            "stopped at step {}; continue with: swin-moe train --resume {root}",
            outcome.step
        );
    }
}

/// One line per layer, each expert's share in percent.
fn load_table(layers: &[LayerLoad]) -> String {
    let mut text = String::new();
    for (number, layer) in layers.iter().enumerate() {
        let total = layer.tokens_per_expert.iter().sum::<u64>().max(1) as f64;
        text += &format!("  layer {}:", number + 1);
        for &count in &layer.tokens_per_expert {
            text += &format!(" {:5.1} %", 100.0 * count as f64 / total);
        }
        text.push('\n');
    }
    text
}

fn load(
    model: arguments::Model,
    precision: Option<Precision>,
    faults: DeviceFaults,
) -> Result<Trained> {
    match load_if_given(model.run, model.checkpoint)? {
        Some(trained) => Ok(match precision {
            Some(precision) => trained.with_precision(precision),
            None => trained,
        }
        .with_faults(faults)),
        None => anyhow::bail!("no model given; name one with --run or --checkpoint"),
    }
}

fn load_if_given(run: Option<PathBuf>, checkpoint: Option<PathBuf>) -> Result<Option<Trained>> {
    Ok(match (run, checkpoint) {
        (Some(run), _) => Some(Trained::load_best(&RunDir::open(&run)?)?),
        (None, Some(path)) => Some(Trained::load(&path)?),
        (None, None) => None,
    })
}

pub(super) fn eval(arguments: arguments::Eval, faults: DeviceFaults) -> Result<Done> {
    let trained = load(arguments.model, arguments.precision, faults)?;
    let class_names = trained.state().class_names.clone();
    let trained = trained.with_parallel(&arguments.parallel.overrides(), arguments.batch_size)?;
    let Some(result) = trained.evaluate(arguments.backend, arguments.data)? else {
        return Ok(Done::Success);
    };
    let tally = &result.tally;
    println!("experts' share of the test tokens, by layer:");
    print!("{}", load_table(&result.loads.loads()));
    println!(
        "{} images: top-1 {:.2} %, top-5 {:.2} %, loss {:.4}",
        tally.images,
        tally.top1_percent(),
        tally.top5_percent(),
        tally.mean_loss()
    );
    let scores = result.confusion.scores(&class_names);
    let shown = if arguments.per_class {
        scores.len()
    } else {
        WORST_CLASSES.min(scores.len())
    };
    println!("least accurate classes, {shown} of {}:", scores.len());
    for score in &scores[..shown] {
        println!(
            "  {:6.2} % of {:5}  {}; mistaken for: {}",
            score.top1,
            score.images,
            score.class,
            score.mistakes()
        );
    }
    Ok(Done::Success)
}

pub(super) fn predict(arguments: arguments::Predict, faults: DeviceFaults) -> Result<Done> {
    let trained = load(arguments.model, arguments.precision, faults)?;
    let scores = trained.score(arguments.backend, &arguments.images)?;
    if let Some(output) = &arguments.tensors {
        scores.write(output)?;
    }
    for prediction in scores.predictions() {
        println!("{}", prediction.file.display());
        for (class, probability) in &prediction.classes {
            println!("  {:6.2} %  {class}", 100.0 * probability);
        }
    }
    Ok(Done::Success)
}

pub(super) fn inspect(arguments: arguments::Inspect, faults: DeviceFaults) -> Result<Done> {
    let output = match (arguments.output, &arguments.model.run) {
        (Some(output), _) => output,
        (None, Some(run)) => run.join("inspect"),
        (None, None) => anyhow::bail!("no directory given; name one with --output"),
    };
    let trained = load(arguments.model, arguments.precision, faults)?;
    let inspection = trained.inspect(arguments.backend, &arguments.images, &output)?;
    println!(
        "{} pictures: {}",
        inspection.pictures.len(),
        inspection.page.display()
    );
    Ok(Done::Success)
}

pub(super) fn import(arguments: arguments::Import, faults: DeviceFaults) -> Result<Done> {
    let report = crate::train::import(ImportRequest {
        weights: arguments.weights,
        config: Config::load(Some(&arguments.config), &arguments.set)?,
        name: run_name(Some(&arguments.config)),
        output: arguments.output.clone(),
        backend: arguments.backend,
        options: ImportOptions {
            allow_partial: arguments.allow_partial,
        },
        faults,
    })?;
    println!("{report}");
    println!(
        "run: {}; evaluate it with: swin-moe eval --run {0} --data DIR",
        arguments.output.display()
    );
    Ok(Done::Success)
}

pub(super) fn upcycle(arguments: arguments::Upcycle, faults: DeviceFaults) -> Result<Done> {
    let dense = arguments.dense;
    let trained = load_if_given(dense.run, dense.checkpoint)?;
    let sets = &arguments.set;
    let config = match (&arguments.config, &trained) {
        (Some(path), _) => Config::load(Some(path), sets)?,
        (None, Some(trained)) => {
            let text = &trained.state().config;
            Config::from_toml(text, "the dense run's configuration", sets)?
        }
        (None, None) => anyhow::bail!("no settings given; name a file with --config"),
    };
    let name = match (&arguments.config, &trained) {
        (None, Some(trained)) => trained.state().name.clone(),
        (path, _) => run_name(path.as_deref()),
    };
    let source = match (dense.weights, trained) {
        (_, Some(trained)) => DenseSource::Trained(Box::new(trained.with_faults(faults.clone()))),
        (Some(weights), None) => DenseSource::File(weights),
        (None, None) => {
            anyhow::bail!("no dense model given; name one with --weights, --run or --checkpoint")
        }
    };
    let upcycled = crate::train::upcycle(UpcycleRequest {
        source,
        config,
        name,
        output: arguments.output.clone(),
        backend: arguments.backend,
        noise: arguments.noise,
        faults,
    })?;
    println!("{}", upcycled.report);
    println!(
        "{}",
        if upcycled.equals_dense {
            "outputs equal the dense model's"
        } else {
            "outputs differ from the dense model's: they are equal without --noise and with \
             moe.normalize_gate=true (or moe.top_k = moe.num_experts)"
        }
    );
    println!(
        "run: {0}; evaluate it with: swin-moe eval --run {0}; train it with: swin-moe train \
         --resume {0}",
        arguments.output.display()
    );
    Ok(Done::Success)
}

pub(super) fn export(arguments: arguments::Export, faults: DeviceFaults) -> Result<Done> {
    load(arguments.model, None, faults)?.export(arguments.backend, &arguments.output)?;
    println!("wrote {}", arguments.output.display());
    Ok(Done::Success)
}

pub(super) fn info(arguments: arguments::Info) -> Result<Done> {
    let (config, num_classes) = match load_if_given(arguments.run, arguments.checkpoint)? {
        Some(trained) => {
            let num_classes = trained.state().class_names.len();
            (trained.config().clone(), num_classes)
        }
        None => {
            let config = Config::load(arguments.config.as_deref(), &arguments.set)?;
            let num_classes = match config.model.num_classes {
                Some(num_classes) => num_classes,
                None => count_classes(&config)?,
            };
            (config, num_classes)
        }
    };
    let model = model_config(&config, num_classes)?;
    println!("{}", ModelInfo::new(&model, config.train.batch_size)?);
    let train = &config.train;
    for (on, backend) in [
        ("", BackendKind::Wgpu),
        (" on CUDA, padded", BackendKind::Cuda),
    ] {
        let memory = TrainingMemory::new(&model, step_shape(&config, backend))?;
        let (precision, batch) = (train.precision.name(), train.batch_size);
        println!("training memory, {precision}, batch of {batch}{on}:");
        print!("{}", memory.peak());
    }
    Ok(Done::Success)
}

pub(super) fn memory(arguments: arguments::Memory, faults: DeviceFaults) -> Result<Done> {
    let mut set = arguments.set;
    set.extend(
        arguments
            .batch_size
            .map(|images| format!("train.batch_size={images}")),
    );
    let config = Config::load(arguments.config.as_deref(), &set)?;
    let num_classes = match config.model.num_classes {
        Some(num_classes) => num_classes,
        None => count_classes(&config)?,
    };
    let probe = probe_memory(ProbeRequest {
        config,
        num_classes,
        backend: arguments.backend,
        steps: arguments.steps.into(),
        faults,
    })?;
    println!("{}", serde_json::to_string_pretty(&probe)?);
    Ok(Done::Success)
}

pub(super) fn count_classes(config: &Config) -> Result<usize> {
    let images = TestImages::open(config)
        .context("cannot count the classes; give them with --set model.num_classes=N")?;
    Ok(images.class_names().len())
}

struct ParityJob {
    case: PathBuf,
    tolerance: f64,
}

impl Job for ParityJob {
    type Output = Result<ParityReport, ParityError>;

    fn run<B: TrainingBackend>(self, device: &B::Device) -> Self::Output {
        run_parity::<B>(&self.case, device, self.tolerance)
    }
}

pub(super) fn parity(arguments: arguments::Parity, faults: DeviceFaults) -> Result<Done> {
    let tolerance = arguments.tolerance.unwrap_or(match arguments.backend {
        BackendKind::Cpu => 1e-4,
        BackendKind::Wgpu | BackendKind::Cuda => 1e-3,
    });
    ensure!(
        tolerance.is_finite() && tolerance > 0.0,
        "--tolerance is {tolerance}, allowed is a number above 0; give 1e-4, say"
    );
    let mut passed = true;
    for case in arguments.cases {
        let report = dispatch(arguments.backend, ParityJob { case, tolerance })??;
        faults.check("while a case was computed")?;
        println!("{report}");
        passed &= report.passed();
    }
    Ok(if passed { Done::Success } else { Done::Failed })
}
