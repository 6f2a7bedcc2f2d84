//! The run's figures as a TensorBoard event file, beside `metrics.jsonl`.
//!
//! Each start of a run writes a file of its own, as TensorBoard expects. A resumed run begins with
//! the mark of a restart at its step: TensorBoard then drops what an interrupted run had written
//! beyond it.

use std::fs::File;
use std::io::{self, BufWriter};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use tfrecord::protobuf::event::What;
use tfrecord::protobuf::session_log::SessionStatus;
use tfrecord::protobuf::summary::{self, value};
use tfrecord::protobuf::{Event, SessionLog, Summary};
use tfrecord::{EventWriter, EventWriterConfig};

use super::error::{Result, TrainError};
use super::metrics::{EvalRecord, LayerLoad, MemoryRecord, Record, StepRecord};

/// Appends events to one file.
pub(super) struct EventFile {
    path: PathBuf,
    writer: EventWriter<BufWriter<File>>,
}

impl EventFile {
    /// Starts a file in `directory`; a run that goes on does so after `step`.
    ///
    /// # Errors
    /// [`TrainError::Io`] if it cannot be written.
    pub fn create(directory: &Path, step: u64) -> Result<Self> {
        let path = directory.join(file_name());
        let file = File::create_new(&path).map_err(TrainError::io("create", &path))?;
        let config = EventWriterConfig { auto_flush: false };
        let writer = EventWriter::from_writer(BufWriter::new(file), config)
            .map_err(|error| failed(&path, error))?;
        let mut file = EventFile { path, writer };
        file.write(0, What::FileVersion("brain.Event:2".to_owned()))?;
        if step > 0 {
            let start = SessionLog {
                status: SessionStatus::Start.into(),
                checkpoint_path: String::new(),
                msg: String::new(),
            };
            // What comes at this step or later is to replace what was there.
            file.write(step + 1, What::SessionLog(start))?;
        }
        file.flush()?;
        Ok(file)
    }

    /// Appends a record's figures.
    ///
    /// # Errors
    /// [`TrainError::Io`] if they cannot be written.
    pub fn append(&mut self, record: &Record) -> Result<()> {
        let (step, figures) = match record {
            Record::Step(step) => (step.step, step_figures(step)),
            Record::Eval(eval) => (eval.step, eval_figures(eval)),
        };
        let value = figures
            .into_iter()
            .map(|(tag, figure)| summary::Value {
                tag,
                value: Some(value::Value::SimpleValue(figure)),
                ..summary::Value::default()
            })
            .collect();
        self.write(step, What::Summary(Summary { value }))?;
        self.flush()
    }

    fn write(&mut self, step: u64, what: What) -> Result<()> {
        let event = Event {
            wall_time: since_epoch().as_secs_f64(),
            step: i64::try_from(step).unwrap_or(i64::MAX),
            what: Some(what),
            source_metadata: None,
        };
        self.writer
            .write_event(event)
            .map_err(|error| failed(&self.path, error))
    }

    fn flush(&mut self) -> Result<()> {
        self.writer
            .flush()
            .map_err(|error| failed(&self.path, error))
    }
}

impl std::fmt::Debug for EventFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("EventFile").field(&self.path).finish()
    }
}

fn failed(path: &Path, error: tfrecord::Error) -> TrainError {
    let source = match error {
        tfrecord::Error::IoError(source) => source,
        other => io::Error::other(other),
    };
    TrainError::io("write", path)(source)
}

fn since_epoch() -> std::time::Duration {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
}

/// TensorBoard looks for `tfevents`, and reads files in the order of their names.
fn file_name() -> String {
    let now = since_epoch();
    let process = std::process::id();
    format!(
        "events.out.tfevents.{:010}.{:06}.{process}",
        now.as_secs(),
        now.subsec_micros()
    )
}

fn step_figures(record: &StepRecord) -> Vec<(String, f32)> {
    let mut figures = vec![
        ("train/loss".to_owned(), record.loss),
        ("train/ce_loss".to_owned(), record.ce_loss),
        ("train/aux_loss".to_owned(), record.aux_loss),
        ("train/lr".to_owned(), record.lr as f32),
        ("train/images_per_s".to_owned(), record.images_per_s as f32),
        ("train/loader_wait".to_owned(), record.loader_wait as f32),
    ];
    for (tag, figure) in [
        ("train/grad_norm", record.grad_norm),
        ("train/loss_scale", record.loss_scale),
    ] {
        figures.extend(figure.map(|value| (tag.to_owned(), value)));
    }
    let MemoryRecord {
        tensor_bytes,
        reserved_bytes,
        host_bytes,
    } = record.memory;
    for (tag, bytes) in [
        ("memory/tensors_mib", tensor_bytes),
        ("memory/reserved_mib", reserved_bytes),
        ("memory/host_mib", host_bytes),
    ] {
        let mebibytes = bytes.map(|bytes| bytes as f32 / (1 << 20) as f32);
        figures.extend(mebibytes.map(|value| (tag.to_owned(), value)));
    }
    figures.extend(layer_figures("train", &record.layers));
    figures
}

fn eval_figures(record: &EvalRecord) -> Vec<(String, f32)> {
    let mut figures = vec![
        ("eval/top1".to_owned(), record.top1),
        ("eval/top5".to_owned(), record.top5),
        ("eval/loss".to_owned(), record.loss),
    ];
    figures.extend(layer_figures("eval", &record.layers));
    figures
}

fn layer_figures(prefix: &str, layers: &[LayerLoad]) -> Vec<(String, f32)> {
    let mut figures = Vec::new();
    for (layer, load) in layers.iter().enumerate() {
        let mut figure = |name: &str, value: f64| {
            figures.push((format!("{prefix}_moe_{layer}/{name}"), value as f32));
        };
        figure("load_entropy", load.entropy);
        figure("tile_waste", load.tile_waste);
        if let Some(router) = &load.router {
            figure("router_entropy", router.entropy_nats);
            figure("gate_weight", router.gate_weight);
            figure("router_z", router.z);
        }
        for (expert, share) in load.shares().into_iter().enumerate() {
            figure(&format!("share_of_expert_{expert}"), share);
        }
    }
    figures
}

#[cfg(test)]
mod tests {
    use std::fs;

    use tfrecord::{RecordIter, RecordReaderConfig};

    use super::*;
    use crate::train::metrics::tests::step as record;

    fn events(directory: &Path) -> Vec<Event> {
        let mut files: Vec<_> = fs::read_dir(directory)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .collect();
        files.sort();
        let config = RecordReaderConfig {
            check_integrity: true,
        };
        files
            .iter()
            .flat_map(|path| RecordIter::<Event, _>::open(path, config.clone()).unwrap())
            .map(|event| event.unwrap())
            .collect()
    }

    #[test]
    fn a_restart_marks_where_it_goes_on() {
        let directory = tempfile::tempdir().unwrap();
        let mut file = EventFile::create(directory.path(), 0).unwrap();
        file.append(&record(10)).unwrap();
        file.append(&record(20)).unwrap();
        let mut file = EventFile::create(directory.path(), 10).unwrap();
        file.append(&record(20)).unwrap();

        let events = events(directory.path());
        let steps: Vec<i64> = events.iter().map(|event| event.step).collect();
        assert_eq!(steps, [0, 10, 20, 0, 11, 20]);
        for version in [0, 3] {
            let Some(What::FileVersion(version)) = &events[version].what else {
                panic!("{:?}", events[version]);
            };
            assert_eq!(version, "brain.Event:2");
        }
        let Some(What::SessionLog(log)) = &events[4].what else {
            panic!("{:?}", events[4]);
        };
        assert_eq!(log.status(), SessionStatus::Start);
        let Some(What::Summary(summary)) = &events[5].what else {
            panic!("{:?}", events[5]);
        };
        let figure = |tag: &str| {
            let value = summary.value.iter().find(|value| value.tag == tag);
            match value.and_then(|value| value.value.clone()) {
                Some(value::Value::SimpleValue(value)) => value,
                other => panic!("{tag}: {other:?}"),
            }
        };
        assert_eq!(figure("train/loss"), 2.25);
        assert_eq!(figure("train/lr"), 1e-3);
        assert_eq!(figure("memory/tensors_mib"), 3.0);
        assert_eq!(figure("train_moe_0/tile_waste"), 0.25);
        assert_eq!(figure("train_moe_0/router_z"), 3.5);
        assert_eq!(figure("train_moe_0/share_of_expert_0"), 0.75);
        assert_eq!(figure("train_moe_0/share_of_expert_1"), 0.0);
    }
}
