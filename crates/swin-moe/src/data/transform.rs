//! What happens to an image between its file and a batch.

use rand::{Rng, RngExt};

use crate::config::{AugmentConfig, Config, CropFill};

use super::augment::{ColorJitter, RandAugment, RandomErasing};
use super::dataset::Split;
use super::pixels::{Area, Fit, Pixels};

/// Attempts at a random part before the whole image is taken.
const CROP_ATTEMPTS: usize = 10;

/// Everything that one split does to its images: a fixed part, whose result can be kept, and a
/// random part.
#[derive(Debug, Clone)]
pub(super) struct Pipeline {
    /// The fixed part.
    pub(super) fit: Fit,
    crop: Crop,
    flip: bool,
    colour: Colour,
    erasing: Option<RandomErasing>,
    size: usize,
    /// Normalised value of each byte, for each channel.
    normalised: Vec<[f32; 256]>,
    /// Colour beyond the image's edge, by channel.
    fill: Vec<u8>,
}

#[derive(Debug, Clone, Copy)]
enum Crop {
    /// None: the image has its size already.
    None,
    /// A window of the image's size in the image with a border of this many pixels.
    Padded(usize),
    /// A random part, resized.
    Resized {
        /// Range of the part's share of the area.
        scale: [f64; 2],
        /// Range of the part's width over its height.
        ratio: [f64; 2],
    },
}

/// What happens to the image once it has its size, as bytes.
#[derive(Debug, Clone)]
enum Colour {
    None,
    Jitter(ColorJitter),
    RandAugment(RandAugment),
}

impl Colour {
    /// Colour jitter is left out where RandAugment is on, as timm and the published recipe have
    /// it: that has colours among its operations.
    fn new(augment: &AugmentConfig) -> Self {
        match (augment.rand_augment, augment.color_jitter) {
            (Some(config), _) => Colour::RandAugment(RandAugment::new(config, &augment.mean)),
            (None, strength) if strength > 0.0 => Colour::Jitter(ColorJitter::new(strength)),
            (None, _) => Colour::None,
        }
    }
}

impl Pipeline {
    /// What the settings ask for.
    ///
    /// Training images keep their original size if a random part of them is to be resized, and
    /// are brought to `image_size` around their centre otherwise. Evaluation images are brought to
    /// `image_size` around their centre; after training on random parts, which show objects
    /// larger, 224/256 of the short side is kept, as published.
    pub(super) fn new(config: &Config, split: Split) -> Self {
        let size = config.model.image_size;
        let augment = &config.augment;
        let centre = |resize| Fit::Centre { resize, crop: size };
        let (fit, crop, flip) = match (split, augment.random_resized_crop) {
            (Split::Train, true) => (Fit::Original, resized_crop(augment), augment.flip),
            (Split::Train, false) => (centre(size), padded_crop(augment), augment.flip),
            (Split::Eval, true) => (centre(size * 256 / 224), Crop::None, false),
            (Split::Eval, false) => (centre(size), Crop::None, false),
        };
        let (colour, erasing) = match split {
            Split::Train => (Colour::new(augment), erasing(augment)),
            Split::Eval => (Colour::None, None),
        };
        Self {
            fit,
            crop,
            flip,
            colour,
            erasing,
            size,
            normalised: normalisation(augment),
            fill: fill(augment),
        }
    }

    /// Channels of the result.
    pub(super) fn channels(&self) -> usize {
        self.normalised.len()
    }

    /// Pixels a side of the result.
    pub(super) fn size(&self) -> usize {
        self.size
    }

    /// Values of one image in a batch.
    pub(super) fn values_per_image(&self) -> usize {
        self.channels() * self.size * self.size
    }

    /// Applies the random part to a fitted image and appends the normalised values, channel by
    /// channel, row by row.
    pub(super) fn apply(&self, image: &Pixels, rng: &mut impl Rng, out: &mut Vec<f32>) {
        let start = out.len();
        match self.crop {
            Crop::None => self.finish(image, [0, 0], rng, out),
            Crop::Padded(padding) => {
                let offsets = [(); 2].map(|()| rng.random_range(0..=2 * padding as u32) as isize);
                self.finish(image, offsets.map(|o| o - padding as isize), rng, out);
            }
            Crop::Resized { scale, ratio } => {
                let area = random_area(image, scale, ratio, rng);
                let part = image.resized(area, self.size, self.size);
                self.finish(&part, [0, 0], rng, out);
            }
        }
        if let Some(erasing) = &self.erasing {
            erasing.apply(&mut out[start..], self.size, rng);
        }
    }

    /// Everything behind the crop, whose corner is given as in [`Pipeline::write`].
    fn finish(&self, image: &Pixels, corner: [isize; 2], rng: &mut impl Rng, out: &mut Vec<f32>) {
        let flip = self.flip && rng.random_bool(0.5);
        match &self.colour {
            Colour::None => self.write(image, corner, flip, out),
            Colour::Jitter(jitter) => {
                let mut window = self.window(image, corner, flip);
                jitter.apply(&mut window, rng);
                self.write(&window, [0, 0], false, out);
            }
            Colour::RandAugment(rand_augment) => {
                let mut window = self.window(image, corner, flip);
                rand_augment.apply(&mut window, rng);
                self.write(&window, [0, 0], false, out);
            }
        }
    }

    /// The bytes of what [`Pipeline::write`] normalises.
    fn window(&self, image: &Pixels, corner: [isize; 2], flip: bool) -> Pixels {
        let (size, channels) = (self.size, self.channels());
        let mut bytes = self.fill.repeat(size * size);
        for (y, row) in bytes.chunks_exact_mut(size * channels).enumerate() {
            let Ok(from_y) = usize::try_from(y as isize + corner[0]) else {
                continue;
            };
            for (x, pixel) in row.chunks_exact_mut(channels).enumerate() {
                let x = if flip { size - 1 - x } else { x };
                let Ok(from_x) = usize::try_from(x as isize + corner[1]) else {
                    continue;
                };
                if from_x < image.width() && from_y < image.height() {
                    let at = (from_y * image.width() + from_x) * channels;
                    pixel.copy_from_slice(&image.data()[at..at + channels]);
                }
            }
        }
        Pixels::from_parts(size, size, channels, bytes)
    }

    /// Writes the window of the result's size whose corner is at `[row, column]` of the image;
    /// what lies outside of the image has the fill's colour.
    fn write(&self, image: &Pixels, corner: [isize; 2], flip: bool, out: &mut Vec<f32>) {
        let channels = self.channels();
        let row_bytes = image.width() * channels;
        for (channel, (table, &fill)) in self.normalised.iter().zip(&self.fill).enumerate() {
            for y in 0..self.size {
                let row = usize::try_from(y as isize + corner[0])
                    .ok()
                    .and_then(|row| image.data().get(row * row_bytes..(row + 1) * row_bytes));
                for x in 0..self.size {
                    let x = if flip { self.size - 1 - x } else { x };
                    let byte = row.and_then(|row| {
                        let column = usize::try_from(x as isize + corner[1]).ok()?;
                        row.get(column * channels + channel)
                    });
                    out.push(table[usize::from(byte.copied().unwrap_or(fill))]);
                }
            }
        }
    }
}

fn erasing(augment: &AugmentConfig) -> Option<RandomErasing> {
    (augment.random_erasing > 0.0).then(|| RandomErasing::new(augment.random_erasing))
}

fn padded_crop(augment: &AugmentConfig) -> Crop {
    match augment.random_crop_padding {
        0 => Crop::None,
        padding => Crop::Padded(padding),
    }
}

fn fill(augment: &AugmentConfig) -> Vec<u8> {
    let colour = |&mean: &f64| match augment.random_crop_fill {
        CropFill::Black => 0,
        CropFill::Mean => (mean * 255.0).round().clamp(0.0, 255.0) as u8,
    };
    augment.mean.iter().map(colour).collect()
}

fn resized_crop(augment: &AugmentConfig) -> Crop {
    Crop::Resized {
        scale: augment.crop_scale,
        ratio: augment.crop_ratio,
    }
}

/// `(byte / 255 − mean) / std`, in f32 as the reference implementations compute it.
fn normalisation(augment: &AugmentConfig) -> Vec<[f32; 256]> {
    augment
        .mean
        .iter()
        .zip(&augment.std)
        .map(|(&mean, &std)| {
            std::array::from_fn(|byte| (byte as f32 / 255.0 - mean as f32) / std as f32)
        })
        .collect()
}

/// Draws a part of the image: its share of the area uniformly, the logarithm of its width over
/// its height uniformly, its place uniformly. If none of the draws fits into the image, the
/// largest centred part with an allowed shape is taken.
fn random_area(image: &Pixels, scale: [f64; 2], ratio: [f64; 2], rng: &mut impl Rng) -> Area {
    let (width, height) = (image.width() as f64, image.height() as f64);
    let log_ratio = ratio.map(f64::ln);
    for _ in 0..CROP_ATTEMPTS {
        let area = width * height * rng.random_range(scale[0]..=scale[1]);
        let shape = rng.random_range(log_ratio[0]..=log_ratio[1]).exp();
        let (w, h) = ((area * shape).sqrt().round(), (area / shape).sqrt().round());
        if (1.0..=width).contains(&w) && (1.0..=height).contains(&h) {
            let (w, h) = (w as u32, h as u32);
            return Area {
                x: rng.random_range(0..=image.width() as u32 - w),
                y: rng.random_range(0..=image.height() as u32 - h),
                width: w,
                height: h,
            };
        }
    }
    let shape = (width / height).clamp(ratio[0], ratio[1]);
    let w = (height * shape).round().clamp(1.0, width) as u32;
    let h = (width / shape).round().clamp(1.0, height) as u32;
    Area {
        x: (image.width() as u32 - w) / 2,
        y: (image.height() as u32 - h) / 2,
        width: w,
        height: h,
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    use super::super::dataset::Split;
    use super::super::pixels::Pixels;
    use super::Pipeline;
    use crate::config::Config;

    /// Draws a white 5 × 5 image of three channels, cropped with 2 pixels of padding.
    fn draws(settings: &str) -> Vec<Vec<f32>> {
        let text = format!(
            "[model]\nimage_size = 5\npatch_size = 1\nin_chans = 3\nnum_classes = 3\n\
             depths = [1]\nnum_heads = [1]\nwindow_size = 5\nembed_dim = 8\n\
             pretrained_window_sizes = [0]\n[moe]\nblocks = [[0]]\n\
             [augment]\nrandom_crop_padding = 2\nmean = [0.25, 0.5, 0.8]\nstd = [0.5, 0.2, 1.0]\n\
             {settings}"
        );
        let config = Config::from_toml::<&str>(&text, "test", &[]).expect("a valid configuration");
        let pipeline = Pipeline::new(&config, Split::Train);
        let image = Pixels::from_parts(5, 5, 3, vec![255; 75]);
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        (0..64)
            .map(|_| {
                let mut out = Vec::new();
                pipeline.apply(&image, &mut rng, &mut out);
                out
            })
            .collect()
    }

    #[test]
    fn a_padded_crop_shows_the_fill_beyond_the_edge() {
        for (settings, outside) in [
            ("random_crop_fill = \"black\"", [-0.5, -2.5, -0.8]),
            ("random_crop_fill = \"mean\"", [0.0, 0.0, 0.0]),
            // Through bytes, and with nothing drawn.
            (
                "random_crop_fill = \"mean\"\nrand_augment = \"rand-m9-n0-inc1\"",
                [0.0, 0.0, 0.0],
            ),
        ] {
            let white = [1.5, 2.5, 0.2];
            let mut seen = 0;
            for draw in draws(settings) {
                for (channel, values) in draw.chunks_exact(25).enumerate() {
                    let is = |value: f32, want: f64| (f64::from(value) - want).abs() < 0.011;
                    let count = values.iter().filter(|v| is(**v, outside[channel])).count();
                    assert!(
                        values
                            .iter()
                            .all(|v| is(*v, white[channel]) || is(*v, outside[channel])),
                        "{settings}: {values:?}"
                    );
                    // Beyond the edge lie whole rows and columns, at most two of each.
                    assert!((0..=2).any(|rows| {
                        (0..=2).any(|columns| (5 - rows) * (5 - columns) == 25 - count)
                    }));
                    seen += count;
                }
            }
            // 25 − (5 − 6/5)², times 3 channels and 64 draws: 2,028 on average.
            assert!((1500..2600).contains(&seen), "{settings}: {seen}");
        }
    }
}
