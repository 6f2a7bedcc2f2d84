//! A batch of prepared images.

/// Prepared images with their labels, on the host.
#[derive(Debug, Clone, PartialEq)]
pub struct Batch {
    /// Normalised pixels, `[images, channels, height, width]`, row by row.
    pub images: Vec<f32>,
    /// Class of each image.
    pub labels: Vec<u32>,
    /// Index of each image in its dataset.
    pub indices: Vec<u32>,
    /// Shape of `images`.
    pub shape: [usize; 4],
    /// Which batch of the epoch this is, counted from zero.
    ///
    /// Unreadable images are left out, which makes a batch smaller, and a batch without any
    /// readable image is not delivered at all: positions may then have gaps, but every other batch
    /// keeps its images and its position.
    pub position: usize,
}

impl Batch {
    /// Number of images.
    pub fn len(&self) -> usize {
        self.labels.len()
    }

    /// Whether there is no image. The loader delivers such a batch only as a rank's part.
    pub fn is_empty(&self) -> bool {
        self.labels.is_empty()
    }
}
