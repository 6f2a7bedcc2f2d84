//! The directory of a run and what lies where in it.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use super::checkpoint::{Checkpoint, write_atomically};
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
        if run.by_age()?.is_empty() {
            return Err(fault(
                root,
                "there is no checkpoint in its checkpoints/",
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

    /// What the ranks were measured at, if shares were chosen by it.
    pub fn fleet(&self) -> PathBuf {
        self.root.join("fleet.toml")
    }

    /// What a rank other than the lead has to say.
    pub(super) fn rank_log(&self, rank: usize) -> PathBuf {
        self.root.join(format!("rank-{rank}.log"))
    }

    /// The report for a browser.
    pub fn report(&self) -> PathBuf {
        self.root.join("report.html")
    }

    /// Reads the newest checkpoint that is whole. Of those that are not, a line goes to the log.
    ///
    /// # Errors
    /// Why the newest one cannot be read, if none can.
    pub fn load_last(&self) -> Result<(Checkpoint, PathBuf)> {
        first_whole(self.by_age()?)
    }

    /// Reads the checkpoint with the best test accuracy; [`RunDir::load_last`] if there is none.
    ///
    /// # Errors
    /// As [`RunDir::load_last`].
    pub fn load_best(&self) -> Result<(Checkpoint, PathBuf)> {
        let mut paths = self.by_age()?;
        if let Some(best) = self.best() {
            // In front of the others, which are what is left if it is damaged.
            paths.retain(|path| *path != best);
            paths.insert(0, best);
        }
        first_whole(paths)
    }

    /// Makes a written directory the checkpoint of `step`, and gives its name.
    ///
    /// # Errors
    /// [`TrainError::Io`] if it cannot be renamed.
    pub(super) fn adopt(&self, staging: &Path, step: u64) -> Result<String> {
        let mut name = Name { step, revision: 0 };
        let mut path = self.checkpoints().join(name.to_string());
        while path.exists() {
            name.revision += 1;
            path = self.checkpoints().join(name.to_string());
        }
        fs::rename(staging, &path).map_err(TrainError::io("rename", staging))?;
        Ok(name.to_string())
    }

    /// Notes which checkpoint is the best.
    ///
    /// # Errors
    /// [`TrainError::Io`] if the note cannot be written.
    pub(super) fn set_best(&self, name: &str) -> Result<()> {
        write_atomically(&self.checkpoints().join(BEST), name.as_bytes())
    }

    /// Removes all checkpoints but the `keep` latest and the best.
    ///
    /// # Errors
    /// [`TrainError::Io`] if one cannot be removed.
    pub(super) fn drop_older(&self, keep: usize) -> Result<()> {
        let best = self.best();
        for path in self.by_age()?.into_iter().skip(keep.max(1)) {
            if Some(&path) != best.as_ref() {
                fs::remove_dir_all(&path).map_err(TrainError::io("remove", path))?;
            }
        }
        Ok(())
    }

    /// Gives other names to the checkpoints that are newer than `path`: they are damaged, and
    /// their places will be needed.
    ///
    /// # Errors
    /// [`TrainError::Io`] if one cannot be renamed.
    pub(super) fn set_newer_aside(&self, path: &Path) -> Result<()> {
        for newer in self.by_age()? {
            if newer == path {
                break;
            }
            let name = newer.file_name().unwrap_or_default().to_string_lossy();
            let aside = self.checkpoints().join(format!("damaged-{name}"));
            if aside.exists() {
                fs::remove_dir_all(&aside).map_err(TrainError::io("remove", &aside))?;
            }
            fs::rename(&newer, aside).map_err(TrainError::io("rename", &newer))?;
        }
        Ok(())
    }

    /// Where a checkpoint is written until it is whole.
    pub(super) fn staging(&self) -> PathBuf {
        self.checkpoints().join(".saving")
    }

    pub(super) fn checkpoints(&self) -> PathBuf {
        self.root.join("checkpoints")
    }

    fn best(&self) -> Option<PathBuf> {
        let name = fs::read_to_string(self.checkpoints().join(BEST)).ok()?;
        let name = Name::parse(&name)?;
        Some(self.checkpoints().join(name.to_string())).filter(|path| path.is_dir())
    }

    /// The checkpoints, newest first.
    fn by_age(&self) -> Result<Vec<PathBuf>> {
        let directory = self.checkpoints();
        if !directory.is_dir() {
            return Ok(Vec::new());
        }
        let entries =
            fs::read_dir(&directory).map_err(TrainError::io("read the directory", &directory))?;
        let mut names: Vec<Name> = entries
            .filter_map(|entry| Name::parse(entry.ok()?.file_name().to_str()?))
            .collect();
        names.sort();
        let paths = names
            .iter()
            .rev()
            .map(|name| directory.join(name.to_string()));
        Ok(paths.filter(|path| path.is_dir()).collect())
    }
}

/// The note with the best checkpoint's name.
const BEST: &str = "best";

/// A checkpoint's name, `step-0000000041`; with `.1` and so on for later ones of the same step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Name {
    step: u64,
    revision: u32,
}

impl Name {
    fn parse(text: &str) -> Option<Self> {
        let numbers = text.strip_prefix("step-")?;
        let (step, revision) = match numbers.split_once('.') {
            Some((step, revision)) => (step, revision.parse().ok()?),
            None => (numbers, 0),
        };
        let name = Name {
            step: step.parse().ok()?,
            revision,
        };
        (name.to_string() == text).then_some(name)
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "step-{:010}", self.step)?;
        match self.revision {
            0 => Ok(()),
            revision => write!(f, ".{revision}"),
        }
    }
}

fn first_whole(paths: Vec<PathBuf>) -> Result<(Checkpoint, PathBuf)> {
    let mut failure = None;
    for path in paths {
        match Checkpoint::load(&path) {
            Ok(checkpoint) => {
                if failure.is_some() {
                    log::warn!("using {} instead", path.display());
                }
                return Ok((checkpoint, path));
            }
            Err(error) => {
                log::warn!("{error}");
                failure.get_or_insert(error);
            }
        }
    }
    Err(failure.unwrap_or_else(|| {
        TrainError::Request("there is no checkpoint; start a new run".to_owned())
    }))
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
        fs::create_dir(run.checkpoints().join("step-0000000003")).unwrap();
        assert_eq!(RunDir::open(&root).unwrap(), run);
        fs::write(root.join("file"), b"").unwrap();
        assert!(RunDir::create(&root.join("file")).is_err());
    }

    #[test]
    fn the_newest_and_the_best_are_kept() {
        let directory = tempfile::tempdir().unwrap();
        let run = RunDir::create(&directory.path().join("run")).unwrap();
        let save = |step| {
            fs::create_dir(run.staging()).unwrap();
            run.adopt(&run.staging(), step).unwrap()
        };
        assert_eq!(save(9), "step-0000000009");
        run.set_best(&save(10)).unwrap();
        for revision in 1..=11 {
            assert_eq!(save(10), format!("step-0000000010.{revision}"));
        }
        fs::create_dir(run.checkpoints().join("step-7")).unwrap();
        run.drop_older(2).unwrap();
        let names = |paths: Vec<PathBuf>| -> Vec<String> {
            let name = |path: &PathBuf| path.file_name().unwrap().to_str().unwrap().to_owned();
            paths.iter().map(name).collect()
        };
        let left = names(run.by_age().unwrap());
        assert_eq!(
            left,
            [
                "step-0000000010.11",
                "step-0000000010.10",
                "step-0000000010"
            ]
        );
        let oldest = run.checkpoints().join("step-0000000010");
        run.set_newer_aside(&oldest).unwrap();
        assert_eq!(names(run.by_age().unwrap()), ["step-0000000010"]);
        assert!(
            run.checkpoints()
                .join("damaged-step-0000000010.11")
                .is_dir()
        );
        assert!(run.load_last().is_err());
    }
}
