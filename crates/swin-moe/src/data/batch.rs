//! A batch of prepared images.

use std::ops::Range;

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

    /// The images of `range` alone.
    pub(super) fn part(mut self, range: Range<usize>) -> Batch {
        let values = self.images.len() / self.len().max(1);
        let cut = |labels: &mut Vec<u32>| {
            labels.truncate(range.end);
            labels.drain(..range.start.min(labels.len()));
        };
        self.images.truncate(range.end * values);
        self.images.drain(..range.start * values);
        cut(&mut self.labels);
        cut(&mut self.indices);
        if let Some(partners) = &mut self.partners {
            cut(partners);
        }
        self.shape[0] = self.len();
        self
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

    /// Whether there is no image. The loader delivers such a batch only as a rank's part.
    pub fn is_empty(&self) -> bool {
        self.labels.is_empty()
    }
}
