//! What a person sees while a run goes: a bar on a terminal, plain lines otherwise.

use std::fs::{File, OpenOptions};
use std::io::{IsTerminal, Write};
use std::path::Path;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

use super::error::{Result, TrainError};
use super::metrics::{EvalRecord, StepRecord};

/// What to print while a run goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Verbosity {
    /// Nothing.
    #[default]
    Silent,
    /// A bar on a terminal, plain lines otherwise.
    Normal,
}

/// Reports to the person who started the run.
#[derive(Debug)]
pub struct Progress {
    verbosity: Verbosity,
    bar: Option<ProgressBar>,
    /// Where the lines of ranks that nobody watches go.
    file: Option<File>,
    total_steps: u64,
    epochs: u64,
}

impl Progress {
    /// A bar of `total_steps` if standard error is a terminal.
    pub fn new(verbosity: Verbosity, step: u64, total_steps: u64, epochs: u64) -> Self {
        let wants_bar = verbosity == Verbosity::Normal && std::io::stderr().is_terminal();
        let bar = wants_bar.then(|| {
            let bar = ProgressBar::new(total_steps).with_position(step);
            let template = "{bar:32.cyan/dim} {pos}/{len} steps  {eta_precise} left  {msg}";
            if let Ok(style) = ProgressStyle::with_template(template) {
                bar.set_style(style.progress_chars("━━╌"));
            }
            bar.enable_steady_tick(Duration::from_millis(250));
            bar
        });
        Progress {
            verbosity,
            bar,
            file: None,
            total_steps,
            epochs,
        }
    }

    /// Lines that are appended to a file instead.
    ///
    /// # Errors
    /// [`TrainError::Io`] if it cannot be opened.
    pub fn to_file(path: &Path, total_steps: u64, epochs: u64) -> Result<Self> {
        let file = OpenOptions::new().create(true).append(true).open(path);
        Ok(Progress {
            verbosity: Verbosity::Silent,
            bar: None,
            file: Some(file.map_err(TrainError::io("open", path))?),
            total_steps,
            epochs,
        })
    }

    /// A step is done.
    pub fn advance(&self, step: u64) {
        if let Some(bar) = &self.bar {
            bar.set_position(step);
        }
    }

    /// A step was logged.
    pub fn step(&self, record: &StepRecord) {
        let message = format!(
            "epoch {}/{}  loss {:.4}  lr {:.2e}  {:.0} images/s",
            record.epoch, self.epochs, record.loss, record.lr, record.images_per_s
        );
        match &self.bar {
            Some(bar) => bar.set_message(message),
            None => self.say(&format!(
                "step {}/{}  {message}",
                record.step, self.total_steps
            )),
        }
    }

    /// An evaluation is done.
    pub fn eval(&self, record: &EvalRecord) {
        self.say(&format!(
            "epoch {}/{}  train loss {:.4}  test loss {:.4}  top-1 {:.2} %  top-5 {:.2} %",
            record.epoch, self.epochs, record.train_ce_loss, record.loss, record.top1, record.top5
        ));
    }

    /// A line that stays.
    pub fn say(&self, line: &str) {
        if let Some(mut file) = self.file.as_ref()
            && let Err(error) = writeln!(file, "{line}")
        {
            log::warn!("a rank's log cannot be written: {error}");
        }
        match &self.bar {
            Some(bar) => bar.suspend(|| eprintln!("{line}")),
            None if self.verbosity == Verbosity::Normal => eprintln!("{line}"),
            None => {}
        }
    }

    /// Takes the bar away.
    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
