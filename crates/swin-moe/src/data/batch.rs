//! A batch of prepared images.

/// Prepared images with their labels, on the host.
#[derive(Debug, Clone, PartialEq)]
pub struct Batch {
    /// Normalised pixels, `[images, channels, height, width]`, row by row.
    pub images: Vec<f32>,
    /// Class of each image.
    pub labels: Vec<u32>,
    /// Class of the image that each image was mixed with, if the batch was mixed.
    pub partners: Option<Vec<u32>>,
    /// Share of an image's own label in its target, of `partners`' the rest; 1 if not mixed.
    pub share: f32,
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

    /// The batch in `parts` parts of consecutive images, as equal as possible; fewer if there are
    /// fewer images.
    pub fn into_parts(mut self, parts: usize) -> Vec<Batch> {
        let len = self.len();
        let parts = parts.clamp(1, len.max(1));
        if parts == 1 {
            return vec![self];
        }
        let values = self.images.len() / len;
        let ends: Vec<usize> = (0..=parts).map(|part| part * len / parts).collect();
        let mut cut: Vec<Batch> = ends[..parts]
            .iter()
            .rev()
            .map(|&start| Batch {
                images: self.images.split_off(start * values),
                labels: self.labels.split_off(start),
                partners: self
                    .partners
                    .as_mut()
                    .map(|partners| partners.split_off(start)),
                share: self.share,
                indices: self.indices.split_off(start),
                shape: self.shape,
                position: self.position,
            })
            .collect();
        cut.reverse();
        for part in &mut cut {
            part.shape[0] = part.len();
        }
        cut
    }

    /// Whether there is no image. The loader never delivers such a batch.
    pub fn is_empty(&self) -> bool {
        self.labels.is_empty()
    }
}
