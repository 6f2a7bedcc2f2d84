//! Operations on the bytes of an image, each as Pillow computes it.

use crate::data::pixels::Pixels;

/// Weights of red, green and blue in a grey value, over 65,536 (ITU-R 601-2).
const LUMA: [u32; 3] = [19_595, 38_470, 7_471];

/// An operation with its argument.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Op {
    /// Stretches each channel's range to 0..=255.
    AutoContrast,
    /// Flattens each channel's histogram.
    Equalize,
    /// 255 less the value.
    Invert,
    /// Rotates counter-clockwise about the centre, by degrees.
    Rotate(f64),
    /// Keeps so many of the highest bits.
    Posterize(u32),
    /// Inverts values from this one on.
    Solarize(u32),
    /// Adds this to values below 128.
    SolarizeAdd(u32),
    /// Saturation: 0 is grey, 1 the image.
    Color(f32),
    /// Contrast: 0 is the mean grey value, 1 the image.
    Contrast(f32),
    /// Brightness: 0 is black, 1 the image.
    Brightness(f32),
    /// Sharpness: 0 is smoothed, 1 the image.
    Sharpness(f32),
    /// Each row moves by this share of its number.
    ShearX(f64),
    /// Each column moves by this share of its number.
    ShearY(f64),
    /// Moves left by this share of the width.
    TranslateX(f64),
    /// Moves up by this share of the height.
    TranslateY(f64),
}

impl Op {
    /// Applies the operation; what comes into view from outside of the image is `fill`, one byte
    /// for each channel.
    pub fn apply(self, image: &mut Pixels, fill: &[u8]) {
        match self {
            Op::AutoContrast => per_channel_table(image, auto_contrast),
            Op::Equalize => per_channel_table(image, equalize),
            Op::Invert => map(image, |v| 255 - v),
            Op::Posterize(bits) => {
                let mask = (0xff00u32 >> bits.min(8)) as u8;
                map(image, |v| v & mask);
            }
            Op::Solarize(from) => map(image, |v| if u32::from(v) < from { v } else { 255 - v }),
            Op::SolarizeAdd(add) => map(image, |v| {
                if v < 128 {
                    (u32::from(v) + add).min(255) as u8
                } else {
                    v
                }
            }),
            Op::Brightness(factor) => map(image, |v| blend(0, v, factor)),
            Op::Contrast(factor) => {
                let mean = mean_luma(image);
                map(image, |v| blend(mean, v, factor));
            }
            Op::Color(factor) => color(image, factor),
            Op::Sharpness(factor) => sharpness(image, factor),
            Op::Rotate(degrees) => image.transform(&image.rotation(degrees), fill),
            Op::ShearX(by) => image.transform(&[1.0, by, 0.0, 0.0, 1.0, 0.0], fill),
            Op::ShearY(by) => image.transform(&[1.0, 0.0, 0.0, by, 1.0, 0.0], fill),
            Op::TranslateX(share) => {
                let by = share * image.width() as f64;
                image.transform(&[1.0, 0.0, by, 0.0, 1.0, 0.0], fill);
            }
            Op::TranslateY(share) => {
                let by = share * image.height() as f64;
                image.transform(&[1.0, 0.0, 0.0, 0.0, 1.0, by], fill);
            }
        }
    }
}

fn map(image: &mut Pixels, value: impl Fn(u8) -> u8) {
    let table: [u8; 256] = std::array::from_fn(|v| value(v as u8));
    for v in image.data_mut() {
        *v = table[usize::from(*v)];
    }
}

/// Between two values, or beyond them: `from` at 0, `to` at 1; cut off, not rounded.
fn blend(from: u8, to: u8, factor: f32) -> u8 {
    let (from, to) = (f32::from(from), f32::from(to));
    // A cast from float to integer saturates, and drops the fraction.
    (from + factor * (to - from)) as u8
}

/// Each channel through a table of its own, made of its histogram.
fn per_channel_table(image: &mut Pixels, table: fn(&[u32; 256]) -> Option<[u8; 256]>) {
    let channels = image.channels();
    for channel in 0..channels {
        let mut histogram = [0u32; 256];
        for v in image.data().iter().skip(channel).step_by(channels) {
            histogram[usize::from(*v)] += 1;
        }
        if let Some(table) = table(&histogram) {
            for v in image.data_mut().iter_mut().skip(channel).step_by(channels) {
                *v = table[usize::from(*v)];
            }
        }
    }
}

fn auto_contrast(histogram: &[u32; 256]) -> Option<[u8; 256]> {
    let low = histogram.iter().position(|&count| count > 0)?;
    let high = histogram.iter().rposition(|&count| count > 0)?;
    if high == low {
        return None;
    }
    let scale = 255.0 / (high - low) as f64;
    let offset = -(low as f64) * scale;
    Some(std::array::from_fn(|v| (v as f64 * scale + offset) as u8))
}

fn equalize(histogram: &[u32; 256]) -> Option<[u8; 256]> {
    let last = *histogram.iter().rfind(|&&count| count > 0)?;
    let step = (histogram.iter().sum::<u32>() - last) / 255;
    if step == 0 {
        return None;
    }
    let mut sum = step / 2;
    Some(std::array::from_fn(|v| {
        let value = sum / step;
        sum += histogram[v];
        value.min(255) as u8
    }))
}

fn luma(pixel: &[u8]) -> u8 {
    match pixel {
        [r, g, b] => {
            let sum: u32 = LUMA
                .iter()
                .zip([r, g, b])
                .map(|(weight, &v)| weight * u32::from(v))
                .sum();
            ((sum + 0x8000) >> 16) as u8
        }
        other => other[0],
    }
}

fn mean_luma(image: &Pixels) -> u8 {
    let channels = image.channels();
    let pixels = image.data().chunks_exact(channels);
    let sum: u64 = pixels.map(|pixel| u64::from(luma(pixel))).sum();
    let count = (image.width() * image.height()).max(1);
    (sum as f64 / count as f64 + 0.5) as u8
}

fn color(image: &mut Pixels, factor: f32) {
    let channels = image.channels();
    for pixel in image.data_mut().chunks_exact_mut(channels) {
        let grey = luma(pixel);
        for v in pixel {
            *v = blend(grey, *v, factor);
        }
    }
}

/// Blends with the image smoothed by `[1 1 1; 1 5 1; 1 1 1] / 13`, which leaves the border as it
/// is.
fn sharpness(image: &mut Pixels, factor: f32) {
    let (width, height, channels) = (image.width(), image.height(), image.channels());
    let original = image.data().to_vec();
    let row = width * channels;
    for y in 1..height.saturating_sub(1) {
        for x in channels..row.saturating_sub(channels) {
            let at = y * row + x;
            let mut sum = 0.0f32;
            for near in [at - row, at, at + row] {
                for place in [near - channels, near, near + channels] {
                    let weight = if place == at { 5.0 } else { 1.0 };
                    sum += f32::from(original[place]) * (weight / 13.0);
                }
            }
            let smooth = (sum + 0.5) as u8;
            image.data_mut()[at] = blend(smooth, original[at], factor);
        }
    }
}
