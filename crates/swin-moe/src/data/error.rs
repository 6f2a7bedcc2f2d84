//! Why images cannot be had.

use std::path::PathBuf;

/// Why images cannot be had. Every message names the folder or file and what to do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DataError {
    /// A folder is missing, unreadable, or not laid out as an image folder.
    #[error("image folder {}: {reason}; {remedy}", path.display())]
    Folder {
        /// The folder.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
        /// What to do.
        remedy: &'static str,
    },
    /// The splits do not have the same classes.
    #[error(
        "{} and {} must have the same classes; {difference}; \
         add, remove or rename class folders",
        train.display(),
        eval.display()
    )]
    Classes {
        /// The training split.
        train: PathBuf,
        /// The evaluation split.
        eval: PathBuf,
        /// The classes that only one of them has.
        difference: String,
    },
    /// The model's number of classes is not that of the data.
    #[error(
        "model.num_classes is {model}, but the data has {data} classes; \
         set model.num_classes = 0 to take it from the data"
    )]
    NumClasses {
        /// Classes of the model.
        model: usize,
        /// Classes of the data.
        data: usize,
    },
    /// More files could not be read than the settings put up with.
    #[error(
        "{count} unreadable images in the {split} split, allowed are {max} (data.max_corrupt): \
         {examples}; repair or remove them, or raise data.max_corrupt"
    )]
    Corrupt {
        /// `training` or `evaluation`.
        split: &'static str,
        /// How many, so far.
        count: usize,
        /// How many are allowed.
        max: usize,
        /// Some of them, with the decoder's words.
        examples: String,
    },
    /// One image file that was asked for cannot be read.
    #[error("cannot read the image {}: {reason}; give a jpeg, png, bmp, gif or webp file", path.display())]
    Image {
        /// The file.
        path: PathBuf,
        /// The decoder's words.
        reason: String,
    },
    /// The epoch has no full batch.
    #[error(
        "{key} is {batch_size}, but there are {images} images, and the last partial batch is \
         dropped; lower {key} to at most {images}"
    )]
    NoFullBatch {
        /// The setting.
        key: &'static str,
        /// Images per batch.
        batch_size: usize,
        /// Images in the split.
        images: usize,
    },
    /// A loader was asked for something that no epoch has.
    #[error("{name} is {got}, allowed is {allowed}; {remedy}")]
    Loader {
        /// The setting.
        name: &'static str,
        /// Its value.
        got: usize,
        /// What is allowed.
        allowed: String,
        /// What to do.
        remedy: &'static str,
    },
    /// Worker threads cannot be started, or one was lost.
    #[error("image workers: {reason}; lower data.workers")]
    Workers {
        /// The system's words.
        reason: String,
    },
    /// The embedded digits do not parse: the program was built from a damaged copy.
    #[error("the embedded digits are damaged in line {line}; restore data/digits and build again")]
    Embedded {
        /// Line of the data file.
        line: usize,
    },
}
