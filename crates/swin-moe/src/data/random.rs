//! Random numbers as pure functions of (seed, epoch, image).
//!
//! Every image of every epoch has its own stream, so what happens to it depends neither on the
//! order of images nor on the number of threads, and a resumed run draws what it would have drawn.

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

/// Keeps the streams of different purposes apart.
#[derive(Clone, Copy)]
enum Purpose {
    Order = 1,
    Image = 2,
    Batch = 3,
}

fn stream(purpose: Purpose, seed: u64, epoch: u64, index: u64) -> ChaCha8Rng {
    let mut key = [0; 32];
    for (part, value) in key
        .chunks_exact_mut(8)
        .zip([purpose as u64, seed, epoch, index])
    {
        part.copy_from_slice(&value.to_le_bytes());
    }
    ChaCha8Rng::from_seed(key)
}

/// The stream of one image in one epoch.
pub(super) fn image_stream(seed: u64, epoch: u64, index: u32) -> ChaCha8Rng {
    stream(Purpose::Image, seed, epoch, u64::from(index))
}

/// The stream of one batch in one epoch.
pub(super) fn batch_stream(seed: u64, epoch: u64, position: usize) -> ChaCha8Rng {
    stream(Purpose::Batch, seed, epoch, position as u64)
}

/// The order of `len` images in one epoch.
pub(super) fn shuffled(len: u32, seed: u64, epoch: u64) -> Vec<u32> {
    let mut order: Vec<u32> = (0..len).collect();
    order.shuffle(&mut stream(Purpose::Order, seed, epoch, 0));
    order
}
