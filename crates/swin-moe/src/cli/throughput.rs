//! `swin-moe throughput`.

use anyhow::Result;

use super::commands::count_classes;
use super::{Done, arguments};
use crate::config::Config;
use crate::train::{DeviceFaults, ThroughputMode, ThroughputRequest};

pub(super) fn throughput(arguments: arguments::Throughput, faults: DeviceFaults) -> Result<Done> {
    let (name, key) = match arguments.mode {
        ThroughputMode::Train => ("train", "train.batch_size"),
        ThroughputMode::Eval => ("eval", "train.eval_batch_size"),
    };
    let mut set = arguments.set;
    set.extend(arguments.batch_size.map(|images| format!("{key}={images}")));
    let config = Config::load(arguments.config.as_deref(), &set)?;
    let num_classes = match config.model.num_classes {
        Some(num_classes) => num_classes,
        None => count_classes(&config)?,
    };
    let (windows, steps) = (arguments.windows, arguments.steps);
    let timed = crate::train::throughput(ThroughputRequest {
        config,
        num_classes,
        backend: arguments.backend,
        mode: arguments.mode,
        warmup: arguments.warmup.into(),
        windows: windows.into(),
        steps: steps.into(),
        faults,
    })?;
    println!(
        "{name}, {}, batch of {}, {} ({})",
        timed.precision, timed.batch_size, arguments.backend, timed.device
    );
    let [least, median, most] = timed.spread();
    println!(
        "{median:.1} images/s, median of {windows} windows of {steps} steps ({least:.1} to {most:.1})"
    );
    match timed.peak_bytes {
        Some(bytes) => println!(
            "peak memory of tensors: {:.2} GiB",
            bytes as f64 / f64::from(1 << 30)
        ),
        None => println!("peak memory of tensors: the device does not tell"),
    }
    Ok(Done::Success)
}
