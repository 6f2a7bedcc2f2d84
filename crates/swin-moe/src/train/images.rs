//! The images that a run learns from and is judged by.

use std::path::Path;
use std::sync::Arc;

use super::error::Result;
use crate::config::Config;
use crate::data::{
    BatchPart, DataError, Dataset, Loader, LoaderConfig, PreparedImage, Split, num_batches,
    prepare_image_file,
};

/// Both splits.
#[derive(Debug, Clone)]
pub struct Images {
    /// Images to learn from.
    pub train: TrainImages,
    /// Images to be judged by.
    pub test: TestImages,
}

impl Images {
    /// Finds the images of the run's settings.
    ///
    /// # Errors
    /// [`super::TrainError::Data`] if they are not there or do not fit the settings.
    pub fn open(config: &Config) -> Result<Self> {
        Ok(Self {
            train: TrainImages::open(config)?,
            test: TestImages::open(config)?,
        })
    }

    /// Names of the classes.
    pub fn class_names(&self) -> &[String] {
        self.test.class_names()
    }
}

/// Images to learn from: shuffled and augmented, the last partial batch left out.
#[derive(Debug, Clone)]
pub struct TrainImages {
    dataset: Arc<Dataset>,
    workers: usize,
}

impl TrainImages {
    /// Finds the images of the run's settings.
    ///
    /// # Errors
    /// [`super::TrainError::Data`] if they are not there, do not fit the settings or do not fill
    /// one batch.
    pub fn open(config: &Config) -> Result<Self> {
        let dataset = Dataset::open(config, Split::Train)?;
        if dataset.len() < config.train.batch_size {
            return Err(DataError::NoFullBatch {
                key: "train.batch_size",
                batch_size: config.train.batch_size,
                images: dataset.len(),
            }
            .into());
        }
        Ok(Self {
            dataset: Arc::new(dataset),
            workers: config.data.num_workers(),
        })
    }

    /// Number of images.
    pub fn len(&self) -> usize {
        self.dataset.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.dataset.is_empty()
    }

    /// Steps in an epoch.
    pub fn num_batches(&self, batch_size: usize) -> u64 {
        num_batches(self.len(), batch_size, true) as u64
    }

    /// The batches of an epoch from `start` on, or `part` of each.
    ///
    /// # Errors
    /// [`super::TrainError::Data`] if `start` lies behind the epoch's end or threads are refused.
    pub fn batches(
        &self,
        batch_size: usize,
        seed: u64,
        epoch: u64,
        start: u64,
        part: Option<BatchPart>,
    ) -> Result<Loader> {
        let config = LoaderConfig {
            batch_size,
            seed,
            epoch,
            start_batch: usize::try_from(start).unwrap_or(usize::MAX),
            shuffle: true,
            drop_last: true,
            workers: self.workers,
            part,
        };
        Ok(Loader::new(Arc::clone(&self.dataset), config)?)
    }
}

/// Images to be judged by: in their order, as they are, all of them.
#[derive(Debug, Clone)]
pub struct TestImages {
    dataset: Arc<Dataset>,
    workers: usize,
}

impl TestImages {
    /// Finds the images of the run's settings.
    ///
    /// # Errors
    /// [`super::TrainError::Data`] if they are not there or do not fit the settings.
    pub fn open(config: &Config) -> Result<Self> {
        Ok(Self {
            dataset: Arc::new(Dataset::open(config, Split::Eval)?),
            workers: config.data.num_workers(),
        })
    }

    /// Number of images.
    pub fn len(&self) -> usize {
        self.dataset.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.dataset.is_empty()
    }

    /// Names of the classes.
    pub fn class_names(&self) -> &[String] {
        self.dataset.class_names()
    }

    /// All batches, or `part` of each.
    ///
    /// # Errors
    /// [`super::TrainError::Data`] if threads are refused.
    pub fn batches(&self, batch_size: usize, part: Option<BatchPart>) -> Result<Loader> {
        let config = LoaderConfig {
            batch_size,
            seed: 0,
            epoch: 0,
            start_batch: 0,
            shuffle: false,
            drop_last: false,
            workers: self.workers,
            part,
        };
        Ok(Loader::new(Arc::clone(&self.dataset), config)?)
    }
}

/// One image file as evaluation sees it.
pub(super) fn prepare_file(config: &Config, path: &Path) -> Result<PreparedImage> {
    Ok(prepare_image_file(config, path)?)
}
