//! Images: where they come from, how they are prepared, and how batches are made of them.
//!
//! [`Dataset::open`] finds the images of a [`Split`], the embedded digits or a folder, and fixes
//! how they are prepared. [`Loader`] decodes them on worker threads and yields [`Batch`]es in an
//! order that is a pure function of seed and epoch, from any position in the epoch, whatever the
//! number of threads. Nothing here touches a device: batches are plain vectors that the training
//! thread uploads.

mod augment;
mod batch;
mod cache;
mod dataset;
mod decode;
mod digits;
mod error;
mod folder;
mod jpeg;
mod loader;
mod pixels;
mod random;
mod transform;

pub use augment::{Mix, Mixer};
pub use batch::Batch;
pub use dataset::{CorruptFile, Dataset, PreparedImage, Split, prepare_image_file};
pub use error::DataError;
pub use loader::{BatchPart, Loader, LoaderConfig, num_batches};
pub use pixels::Pixels;
