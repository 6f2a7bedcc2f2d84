//! Image folders: `train/<class>/*.jpg` and `val/<class>/*.jpg` or `test/<class>/*.jpg`.

use std::path::{Path, PathBuf};

use super::dataset::Split;
use super::error::DataError;

/// Files with these extensions are images, in upper or lower case; all others are ignored.
const EXTENSIONS: [&str; 6] = ["jpg", "jpeg", "png", "bmp", "gif", "webp"];
/// Class names that only one split has, as far as a message lists them.
const MAX_NAMES: usize = 5;

/// One file and its class.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Sample {
    pub(super) path: PathBuf,
    pub(super) label: u32,
}

/// The images of a split. Classes are numbered in the order of their names, and images are sorted
/// by class, then by file name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Listing {
    pub(super) class_names: Vec<String>,
    pub(super) samples: Vec<Sample>,
}

fn folder_error(path: &Path, reason: impl Into<String>, remedy: &'static str) -> DataError {
    DataError::Folder {
        path: path.to_path_buf(),
        reason: reason.into(),
        remedy,
    }
}

/// Lists a split, and checks that the other split, if it is there, has the same classes.
pub(super) fn list(root: &Path, split: Split) -> Result<Listing, DataError> {
    let train = root.join("train");
    let eval = eval_dir(root);
    let (own, other) = match (split, eval) {
        (Split::Train, eval) => (train.clone(), eval),
        (Split::Eval, Some(eval)) => (eval, Some(train.clone())),
        (Split::Eval, None) => {
            let remedy = "put the evaluation images in val/<class>/ or test/<class>/";
            return Err(folder_error(root, "it has neither val nor test", remedy));
        }
    };
    if !own.is_dir() {
        let reason = if root.is_dir() {
            "it has no folder `train`"
        } else {
            "there is no such folder"
        };
        let remedy = "give a folder with train/<class>/ and val/<class>/ or test/<class>/";
        return Err(folder_error(root, reason, remedy));
    }
    let class_names = list_classes(&own)?;
    if let Some(other) = other.filter(|dir| dir.is_dir()) {
        let other_names = list_classes(&other)?;
        check_same_classes(split, &own, &class_names, &other, &other_names)?;
    }
    let samples = list_samples(&own, &class_names)?;
    Ok(Listing {
        class_names,
        samples,
    })
}

/// `val` if it is there, otherwise `test`.
fn eval_dir(root: &Path) -> Option<PathBuf> {
    ["val", "test"]
        .map(|name| root.join(name))
        .into_iter()
        .find(|dir| dir.is_dir())
}

/// Names in a folder, sorted, hidden ones left out.
fn sorted_names(dir: &Path) -> Result<Vec<String>, DataError> {
    let unreadable =
        |error: std::io::Error| folder_error(dir, error.to_string(), "check that it can be read");
    let mut names = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(unreadable)? {
        let name = entry.map_err(unreadable)?.file_name();
        let name = name.into_string().map_err(|name| {
            let reason = format!("the name {name:?} in it is not UTF-8");
            folder_error(dir, reason, "rename it")
        })?;
        if !name.starts_with('.') {
            names.push(name);
        }
    }
    names.sort_unstable();
    Ok(names)
}

fn list_classes(dir: &Path) -> Result<Vec<String>, DataError> {
    let mut names = sorted_names(dir)?;
    names.retain(|name| dir.join(name).is_dir());
    if names.is_empty() {
        let remedy = "it needs one folder for each class";
        return Err(folder_error(dir, "it has no class folders", remedy));
    }
    Ok(names)
}

fn list_samples(dir: &Path, class_names: &[String]) -> Result<Vec<Sample>, DataError> {
    let mut samples = Vec::new();
    for (label, class) in (0u32..).zip(class_names) {
        let class_dir = dir.join(class);
        let before = samples.len();
        for name in sorted_names(&class_dir)? {
            let path = class_dir.join(&name);
            if has_image_extension(&path) && !path.is_dir() {
                samples.push(Sample { path, label });
            }
        }
        if samples.len() == before {
            let reason = format!("it has no images ({})", EXTENSIONS.join(", "));
            return Err(folder_error(
                &class_dir,
                reason,
                "add images or remove the class",
            ));
        }
    }
    if u32::try_from(samples.len()).is_err() {
        let reason = format!("it has {} images, allowed are {}", samples.len(), u32::MAX);
        return Err(folder_error(dir, reason, "train on a part of them"));
    }
    Ok(samples)
}

fn has_image_extension(path: &Path) -> bool {
    path.extension()
        .and_then(|extension| extension.to_str())
        .is_some_and(|e| EXTENSIONS.iter().any(|known| e.eq_ignore_ascii_case(known)))
}

fn check_same_classes(
    split: Split,
    own: &Path,
    own_names: &[String],
    other: &Path,
    other_names: &[String],
) -> Result<(), DataError> {
    if own_names == other_names {
        return Ok(());
    }
    let differences = [
        only_in(own, own_names, other_names),
        only_in(other, other_names, own_names),
    ];
    let (train, eval) = match split {
        Split::Train => (own, other),
        Split::Eval => (other, own),
    };
    Err(DataError::Classes {
        train: train.to_path_buf(),
        eval: eval.to_path_buf(),
        difference: differences
            .into_iter()
            .flatten()
            .collect::<Vec<_>>()
            .join(", "),
    })
}

/// "only in train: a, b and 3 more", if there is any.
fn only_in(dir: &Path, names: &[String], other_names: &[String]) -> Option<String> {
    let missing: Vec<&str> = names
        .iter()
        .filter(|name| other_names.binary_search(name).is_err())
        .map(String::as_str)
        .collect();
    if missing.is_empty() {
        return None;
    }
    let shown = &missing[..missing.len().min(MAX_NAMES)];
    let more = match missing.len() - shown.len() {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    let split = dir.file_name().unwrap_or_default().to_string_lossy();
    Some(format!("only in {split}: {}{more}", shown.join(", ")))
}
