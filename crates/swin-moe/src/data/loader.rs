//! Batches, prepared ahead on worker threads, delivered in order.

use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use hexa_moe::parallel::split_proportional;

use super::batch::Batch;
use super::dataset::Dataset;
use super::error::DataError;
use super::random::{batch_stream, shuffled};

/// Batches that each worker prepares ahead.
const AHEAD: usize = 2;

/// Which batches of which epoch.
#[derive(Debug, Clone, PartialEq)]
pub struct LoaderConfig {
    /// Images per batch.
    pub batch_size: usize,
    /// Seed of order and augmentation.
    pub seed: u64,
    /// Epoch, counted from zero.
    pub epoch: u64,
    /// First batch to deliver; earlier ones are not decoded.
    pub start_batch: usize,
    /// Whether the order is drawn anew for each epoch, or that of the data set.
    pub shuffle: bool,
    /// Whether a last batch that is not full is left out.
    pub drop_last: bool,
    /// Worker threads.
    pub workers: usize,
    /// The part of each batch that is delivered, if not the whole of it.
    pub part: Option<BatchPart>,
}

/// One rank's contiguous part of every batch, in proportion to the ranks' weights.
///
/// All positions are delivered, with batches that may be empty: ranks stay in step.
#[derive(Debug, Clone, PartialEq)]
pub struct BatchPart {
    /// Weight of each rank's part; finite, not negative, not all zero.
    pub weights: Arc<[f64]>,
    /// This rank.
    pub rank: usize,
}

impl BatchPart {
    /// Which images of a batch of `len` images.
    fn of(&self, len: usize) -> Result<Range<usize>, DataError> {
        let counts =
            split_proportional(len, &self.weights, 1).map_err(|error| DataError::Workers {
                reason: error.to_string(),
            })?;
        let start = counts.iter().take(self.rank).sum();
        Ok(start..start + counts.get(self.rank).copied().unwrap_or(0))
    }
}

/// Number of batches in an epoch of `images` images.
pub fn num_batches(images: usize, batch_size: usize, drop_last: bool) -> usize {
    let batch_size = batch_size.max(1);
    if drop_last {
        images / batch_size
    } else {
        images.div_ceil(batch_size)
    }
}

/// An iterator over the batches of one epoch.
///
/// Dropping it ends and joins its threads.
#[derive(Debug)]
pub struct Loader {
    /// One channel per worker; worker `w` prepares batches `start + w`, `start + w + workers`, ….
    channels: Vec<Receiver<Result<Batch, DataError>>>,
    threads: Vec<JoinHandle<()>>,
    start: usize,
    next: usize,
    end: usize,
    delivers_empty: bool,
    waited: Duration,
}

impl Loader {
    /// Starts the workers.
    ///
    /// # Errors
    /// [`DataError::Loader`] for settings that no epoch has, [`DataError::Workers`] if threads
    /// cannot be started.
    pub fn new(dataset: Arc<Dataset>, config: LoaderConfig) -> Result<Self, DataError> {
        if config.batch_size == 0 {
            return Err(DataError::Loader {
                name: "batch_size",
                got: 0,
                allowed: "1 or more".into(),
                remedy: "raise it",
            });
        }
        let end = num_batches(dataset.len(), config.batch_size, config.drop_last);
        if config.start_batch > end {
            return Err(DataError::Loader {
                name: "start_batch",
                got: config.start_batch,
                allowed: format!("0..={end}"),
                remedy: "the data has shrunk since the run began; restore it or start a new run",
            });
        }
        let len = dataset.len() as u32;
        let order: Arc<[u32]> = if config.shuffle {
            shuffled(len, config.seed, config.epoch).into()
        } else {
            (0..len).collect()
        };
        let workers = config.workers.clamp(1, (end - config.start_batch).max(1));
        let mut loader = Self {
            channels: Vec::with_capacity(workers),
            threads: Vec::with_capacity(workers),
            start: config.start_batch,
            next: config.start_batch,
            end,
            delivers_empty: config.part.is_some(),
            waited: Duration::ZERO,
        };
        for worker in 0..workers {
            let (sender, receiver) = sync_channel(AHEAD);
            let job = Worker {
                dataset: Arc::clone(&dataset),
                order: Arc::clone(&order),
                batch_size: config.batch_size,
                seed_and_epoch: [config.seed, config.epoch],
                part: config.part.clone(),
                positions: (config.start_batch + worker..end).step_by(workers),
                sender,
            };
            let thread = std::thread::Builder::new()
                .name(format!("images-{worker}"))
                .spawn(move || job.run())
                .map_err(|error| DataError::Workers {
                    reason: error.to_string(),
                })?;
            loader.channels.push(receiver);
            loader.threads.push(thread);
        }
        Ok(loader)
    }

    /// How long its user has waited for batches that were not ready, in all.
    pub fn waited(&self) -> Duration {
        self.waited
    }
}

impl Iterator for Loader {
    type Item = Result<Batch, DataError>;

    fn next(&mut self) -> Option<Self::Item> {
        while self.next < self.end {
            let channel = &self.channels[(self.next - self.start) % self.channels.len()];
            self.next += 1;
            let since = Instant::now();
            let received = channel.recv();
            self.waited += since.elapsed();
            match received {
                Ok(Ok(batch)) if batch.is_empty() && !self.delivers_empty => {}
                Ok(Ok(batch)) => return Some(Ok(batch)),
                Ok(Err(error)) => {
                    self.next = self.end;
                    return Some(Err(error));
                }
                Err(_) => {
                    self.next = self.end;
                    return Some(Err(DataError::Workers {
                        reason: "a worker thread was lost".into(),
                    }));
                }
            }
        }
        None
    }
}

impl Drop for Loader {
    fn drop(&mut self) {
        // Without receivers the workers' next send fails, and they end.
        self.channels.clear();
        for thread in self.threads.drain(..) {
            // A panic there has been reported as a lost worker.
            let _ = thread.join();
        }
    }
}

struct Worker {
    dataset: Arc<Dataset>,
    order: Arc<[u32]>,
    batch_size: usize,
    seed_and_epoch: [u64; 2],
    part: Option<BatchPart>,
    positions: std::iter::StepBy<std::ops::Range<usize>>,
    sender: SyncSender<Result<Batch, DataError>>,
}

impl Worker {
    fn run(self) {
        for position in self.positions.clone() {
            let batch = self.prepare(position);
            let failed = batch.is_err();
            if self.sender.send(batch).is_err() || failed {
                return;
            }
        }
    }

    fn prepare(&self, position: usize) -> Result<Batch, DataError> {
        let first = position * self.batch_size;
        let last = (first + self.batch_size).min(self.order.len());
        // Images are mixed with others of the whole batch, which is then needed on every rank.
        let mixer = self.dataset.mixer();
        let (first, last) = match &self.part {
            Some(part) if mixer.is_none() => {
                let part = part.of(last - first)?;
                (first + part.start, first + part.end)
            }
            _ => (first, last),
        };
        let [channels, height, width] = self.dataset.image_shape();
        let mut batch = Batch {
            images: Vec::with_capacity((last - first) * channels * height * width),
            labels: Vec::with_capacity(last - first),
            partners: None,
            share: 1.0,
            indices: Vec::with_capacity(last - first),
            shape: [0, channels, height, width],
            position,
        };
        for &index in &self.order[first..last] {
            let label = self
                .dataset
                .prepare(index, self.seed_and_epoch, &mut batch.images)?;
            if let Some(label) = label {
                batch.labels.push(label);
                batch.indices.push(index);
            }
        }
        batch.shape[0] = batch.labels.len();
        if let Some(mixer) = mixer {
            let [seed, epoch] = self.seed_and_epoch;
            mixer.apply(&mut batch, &mut batch_stream(seed, epoch, position));
            if let Some(part) = &self.part {
                let part = part.of(batch.len())?;
                batch = batch.part(part);
            }
        }
        Ok(batch)
    }
}
