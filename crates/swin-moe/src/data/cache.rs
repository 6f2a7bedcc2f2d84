//! Decoded images that are kept, up to a number of bytes.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use super::pixels::Pixels;

/// One place per image; places are filled until the budget is used up.
#[derive(Debug)]
pub(super) struct Cache {
    images: Vec<OnceLock<Arc<Pixels>>>,
    bytes_left: AtomicU64,
}

impl Cache {
    pub(super) fn new(images: usize, bytes: u64) -> Self {
        Self {
            images: (0..images).map(|_| OnceLock::new()).collect(),
            bytes_left: AtomicU64::new(bytes),
        }
    }

    pub(super) fn get(&self, index: usize) -> Option<Arc<Pixels>> {
        self.images.get(index)?.get().cloned()
    }

    /// Keeps the image if there is room for it.
    pub(super) fn offer(&self, index: usize, image: &Arc<Pixels>) {
        let bytes = image.data().len() as u64;
        let taken = self
            .bytes_left
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
                left.checked_sub(bytes)
            });
        let stored = taken.is_ok()
            && self
                .images
                .get(index)
                .is_some_and(|place| place.set(Arc::clone(image)).is_ok());
        if taken.is_ok() && !stored {
            self.bytes_left.fetch_add(bytes, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_images_up_to_its_budget() {
        let image = Arc::new(Pixels::new(2, 2, 3, vec![7; 12]).expect("12 bytes"));
        let cache = Cache::new(3, 30);
        (0..3).for_each(|index| cache.offer(index, &image));
        cache.offer(0, &image);
        let kept: Vec<bool> = (0..3).map(|index| cache.get(index).is_some()).collect();
        assert_eq!(kept, [true, true, false]);
        assert_eq!(cache.bytes_left.load(Ordering::Relaxed), 6);
    }
}
