//! The directory of a run and what lies where in it.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use super::checkpoint::Checkpoint;
use super::error::{Result, TrainError};

/// The directory of a run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunDir {
    root: PathBuf,
}

impl RunDir {
    /// Makes a new run's directory; an existing one must be empty.
    ///
    /// # Errors
    /// [`TrainError::RunDir`] if there is something in it, [`TrainError::Io`] if it cannot be made.
    pub fn create(root: &Path) -> Result<Self> {
        if root.exists() {
            if !root.is_dir() {
                return Err(fault(
                    root,
                    "it is a file, allowed is a directory",
                    "choose another --output",
                ));
            }
            let mut entries =
                fs::read_dir(root).map_err(TrainError::io("read the directory", root))?;
            if entries.next().is_some() {
                return Err(fault(
                    root,
                    "the output directory is not empty",
                    "choose another --output, or continue the run in it with --resume",
                ));
            }
        }
        let run = RunDir {
            root: root.to_path_buf(),
        };
        let checkpoints = run.checkpoints();
        fs::create_dir_all(&checkpoints)
            .map_err(TrainError::io("create the directory", &checkpoints))?;
        Ok(run)
    }

    /// Opens the directory of an earlier run.
    ///
    /// # Errors
    /// [`TrainError::RunDir`] if it has no checkpoints.
    pub fn open(root: &Path) -> Result<Self> {
        let run = RunDir {
            root: root.to_path_buf(),
        };
        if !root.is_dir() {
            return Err(fault(
                root,
                "there is no such run directory",
                "give the --output of an earlier `swin-moe train`",
            ));
        }
        if !run.last().is_file() && !run.best().is_file() {
            return Err(fault(
                root,
                "it holds neither checkpoints/last.safetensors nor checkpoints/best.safetensors",
                "give the --output of a `swin-moe train` that has saved a checkpoint",
            ));
        }
        Ok(run)
    }

    /// The directory that another rank has made or opened.
    pub(super) fn at(root: &Path) -> Self {
        RunDir {
            root: root.to_path_buf(),
        }
    }

    /// The directory itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The resolved configuration.
    pub fn config(&self) -> PathBuf {
        self.root.join("config.toml")
    }

    /// The metrics, one JSON object per line.
    pub fn metrics(&self) -> PathBuf {
        self.root.join("metrics.jsonl")
    }

    /// The report for a browser.
    pub fn report(&self) -> PathBuf {
        self.root.join("report.html")
    }

    /// The checkpoint to resume from.
    pub fn last(&self) -> PathBuf {
        self.checkpoints().join("last.safetensors")
    }

    /// The checkpoint with the best test accuracy.
    pub fn best(&self) -> PathBuf {
        self.checkpoints().join("best.safetensors")
    }

    /// The checkpoint to evaluate: the best, or the last if there was no evaluation.
    pub fn best_or_last(&self) -> PathBuf {
        let best = self.best();
        if best.is_file() { best } else { self.last() }
    }

    /// Replaces the last checkpoint; `keep` of the latest stay, older ones as `step-N`.
    ///
    /// # Errors
    /// [`TrainError::Io`] if it cannot be written; the earlier one then stands.
    pub fn save_last(&self, checkpoint: &Checkpoint, keep: usize) -> Result<()> {
        let last = self.last();
        if keep < 2 {
            return checkpoint.save(&last);
        }
        // The copy first: at no moment is there no checkpoint to resume from.
        let numbered = self.numbered(checkpoint.state.step);
        checkpoint.save(&numbered)?;
        checkpoint.save(&last)?;
        self.drop_older(keep)
    }

    fn numbered(&self, step: u64) -> PathBuf {
        self.checkpoints()
            .join(format!("step-{step:010}.safetensors"))
    }

    /// Removes all numbered checkpoints but the `keep` latest.
    fn drop_older(&self, keep: usize) -> Result<()> {
        let directory = self.checkpoints();
        let entries =
            fs::read_dir(&directory).map_err(TrainError::io("read the directory", &directory))?;
        let mut numbered: Vec<PathBuf> = entries
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| {
                path.file_name()
                    .and_then(|name| name.to_str())
                    .is_some_and(|name| name.starts_with("step-"))
            })
            .collect();
        // Steps are padded with zeros: names sort as steps do.
        numbered.sort();
        let surplus = numbered.len().saturating_sub(keep);
        for path in &numbered[..surplus] {
            fs::remove_file(path).map_err(TrainError::io("remove", path))?;
        }
        Ok(())
    }

    fn checkpoints(&self) -> PathBuf {
        self.root.join("checkpoints")
    }
}

fn fault(path: &Path, reason: &str, remedy: &str) -> TrainError {
    TrainError::RunDir {
        path: path.to_path_buf(),
        reason: reason.to_owned(),
        remedy: remedy.to_owned(),
    }
}

/// `runs/<name>-<UTC time>`, with a number behind it if that is taken.
pub fn default_output(name: &str) -> PathBuf {
    let seconds = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |elapsed| elapsed.as_secs());
    let base = format!("{name}-{}", utc_stamp(seconds));
    let root = Path::new("runs");
    let mut candidate = root.join(&base);
    let mut number = 2;
    while candidate.exists() {
        candidate = root.join(format!("{base}-{number}"));
        number += 1;
    }
    candidate
}

/// `YYYYMMDD-HHMMSS` of a Unix time, by the proleptic Gregorian calendar.
fn utc_stamp(unix_seconds: u64) -> String {
    let (mut days, seconds) = (unix_seconds / 86_400, unix_seconds % 86_400);
    let is_leap = |year: u64| {
        year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
    };
    let mut year = 1970;
    while days >= 365 + u64::from(is_leap(year)) {
        days -= 365 + u64::from(is_leap(year));
        year += 1;
    }
    let february = 28 + u64::from(is_leap(year));
    let mut month = 1;
    for length in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31] {
        if days < length {
            break;
        }
        days -= length;
        month += 1;
    }
    format!(
        "{year:04}{month:02}{:02}-{:02}{:02}{:02}",
        days + 1,
        seconds / 3600,
        seconds / 60 % 60,
        seconds % 60
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stamps_known_times() {
        // From `date -u -d @N +%Y%m%d-%H%M%S`.
        for (seconds, stamp) in [
            (0, "19700101-000000"),
            (951_782_400, "20000229-000000"),
            (1_709_251_199, "20240229-235959"),
            (1_735_689_599, "20241231-235959"),
            (4_107_542_400, "21000301-000000"),
        ] {
            assert_eq!(utc_stamp(seconds), stamp);
        }
    }

    #[test]
    fn refuses_a_directory_in_use_and_one_without_checkpoints() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path().join("a/b");
        let run = RunDir::create(&root).unwrap();
        assert!(RunDir::create(&root).is_err());
        assert!(RunDir::open(&root).is_err());
        fs::write(run.last(), b"").unwrap();
        assert_eq!(RunDir::open(&root).unwrap(), run);
        assert_eq!(run.best_or_last(), run.last());
        assert!(RunDir::create(&run.last()).is_err());
    }
}
