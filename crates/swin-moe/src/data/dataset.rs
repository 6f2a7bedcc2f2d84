//! The images of a split: what they are, and how one is prepared.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use super::augment::Mixer;
use super::cache::Cache;
use super::decode::decode_file;
use super::digits::{self, Digit};
use super::error::DataError;
use super::folder::{self, Sample};
use super::pixels::Pixels;
use super::random::image_stream;
use super::transform::Pipeline;
use crate::config::{Config, DataSource};

/// Number of unreadable files that an error message names.
const MAX_EXAMPLES: usize = 3;

/// Which images.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Split {
    /// Those to learn from, augmented.
    Train,
    /// Those to be judged by, never augmented.
    Eval,
}

impl Split {
    fn name(self) -> &'static str {
        match self {
            Split::Train => "training",
            Split::Eval => "evaluation",
        }
    }
}

/// A file that could not be read, and was left out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CorruptFile {
    /// The file.
    pub path: PathBuf,
    /// The decoder's words.
    pub reason: String,
}

/// The images of one split, and how they are prepared.
#[derive(Debug)]
pub struct Dataset {
    split: Split,
    source: Source,
    class_names: Vec<String>,
    pipeline: Pipeline,
    mixer: Option<Mixer>,
    cache: Cache,
    max_corrupt: usize,
    corrupt: Mutex<BTreeMap<u32, CorruptFile>>,
}

#[derive(Debug)]
enum Source {
    Digits(Vec<Digit>),
    Folder(Vec<Sample>),
}

impl Dataset {
    /// Finds the images; none is decoded yet.
    ///
    /// # Errors
    /// [`DataError`] if a folder is not laid out as an image folder, or has another number of
    /// classes than the model.
    pub fn open(config: &Config, split: Split) -> Result<Self, DataError> {
        let (source, class_names) = match &config.data.source {
            DataSource::Digits => (Source::Digits(digits::load(split)?), digits::class_names()),
            DataSource::Folder(root) => {
                let listing = folder::list(root, split)?;
                (Source::Folder(listing.samples), listing.class_names)
            }
        };
        if let Some(model) = config.model.num_classes.filter(|&n| n != class_names.len()) {
            let data = class_names.len();
            return Err(DataError::NumClasses { model, data });
        }
        let len = match &source {
            Source::Digits(digits) => digits.len(),
            Source::Folder(samples) => samples.len(),
        };
        Ok(Self {
            split,
            source,
            class_names,
            pipeline: Pipeline::new(config, split),
            mixer: match split {
                Split::Train => Mixer::new(config.augment.mix),
                Split::Eval => None,
            },
            cache: Cache::new(len, config.data.cache_bytes),
            max_corrupt: config.data.max_corrupt,
            corrupt: Mutex::default(),
        })
    }

    /// Number of images, unreadable ones included.
    pub fn len(&self) -> usize {
        match &self.source {
            Source::Digits(digits) => digits.len(),
            Source::Folder(samples) => samples.len(),
        }
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Names of the classes; a label is an index into them.
    pub fn class_names(&self) -> &[String] {
        &self.class_names
    }

    /// Shape of one prepared image: channels, height, width.
    pub fn image_shape(&self) -> [usize; 3] {
        let size = self.pipeline.size();
        [self.pipeline.channels(), size, size]
    }

    /// What mixes the images of a batch, if anything does.
    pub(super) fn mixer(&self) -> Option<&Mixer> {
        self.mixer.as_ref()
    }

    /// The files that have been left out so far, in the order of the data set.
    pub fn corrupt_files(&self) -> Vec<CorruptFile> {
        let corrupt = self.corrupt.lock().unwrap_or_else(PoisonError::into_inner);
        corrupt.values().cloned().collect()
    }

    /// Appends image `index` as (seed, epoch) prepares it, and gives its label; `None` if it is
    /// unreadable, which has then been counted.
    pub(super) fn prepare(
        &self,
        index: u32,
        [seed, epoch]: [u64; 2],
        out: &mut Vec<f32>,
    ) -> Result<Option<u32>, DataError> {
        let Some(image) = self.pixels(index)? else {
            return Ok(None);
        };
        let mut rng = image_stream(seed, epoch, index);
        self.pipeline.apply(&image, &mut rng, out);
        Ok(Some(match &self.source {
            Source::Digits(digits) => digits[index as usize].label,
            Source::Folder(samples) => samples[index as usize].label,
        }))
    }

    fn pixels(&self, index: u32) -> Result<Option<Arc<Pixels>>, DataError> {
        let place = index as usize;
        if let Some(image) = self.cache.get(place) {
            return Ok(Some(image));
        }
        let channels = self.pipeline.channels();
        let decoded = match &self.source {
            Source::Digits(digits) => digits[place].pixels(channels),
            Source::Folder(samples) => match decode_file(&samples[place].path) {
                Ok(image) => Pixels::from_image(image, channels),
                Err(reason) => {
                    self.count_corrupt(index, &samples[place].path, reason)?;
                    return Ok(None);
                }
            },
        };
        let image = Arc::new(decoded.fit(self.pipeline.fit));
        self.cache.offer(place, &image);
        Ok(Some(image))
    }

    fn count_corrupt(&self, index: u32, path: &Path, reason: String) -> Result<(), DataError> {
        let mut corrupt = self.corrupt.lock().unwrap_or_else(PoisonError::into_inner);
        if !corrupt.contains_key(&index) {
            log::warn!("left out {}: {reason}", path.display());
        }
        let path = path.to_path_buf();
        corrupt.insert(index, CorruptFile { path, reason });
        if corrupt.len() <= self.max_corrupt {
            return Ok(());
        }
        let examples: Vec<String> = corrupt
            .values()
            .take(MAX_EXAMPLES)
            .map(|file| format!("{} ({})", file.path.display(), file.reason))
            .collect();
        Err(DataError::Corrupt {
            split: self.split.name(),
            count: corrupt.len(),
            max: self.max_corrupt,
            examples: examples.join(", "),
        })
    }
}

/// One image as evaluation sees it.
#[derive(Debug, Clone, PartialEq)]
pub struct PreparedImage {
    /// Cut and resized, `image_size` a side.
    pub pixels: Pixels,
    /// The same as the model takes it: `[channels, height, width]`, normalised.
    pub values: Vec<f32>,
}

/// Prepares one image file as evaluation does.
///
/// # Errors
/// [`DataError::Image`] if it cannot be read.
pub fn prepare_image_file(config: &Config, path: &Path) -> Result<PreparedImage, DataError> {
    let pipeline = Pipeline::new(config, Split::Eval);
    let image = decode_file(path).map_err(|reason| DataError::Image {
        path: path.to_path_buf(),
        reason,
    })?;
    let pixels = Pixels::from_image(image, pipeline.channels()).fit(pipeline.fit);
    let mut values = Vec::with_capacity(pipeline.values_per_image());
    pipeline.apply(&pixels, &mut image_stream(0, 0, 0), &mut values);
    Ok(PreparedImage { pixels, values })
}
