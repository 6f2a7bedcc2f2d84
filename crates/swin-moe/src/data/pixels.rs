//! Decoded images, and how they are cut and resized.

use fast_image_resize::images::{Image, ImageRef};
use fast_image_resize::{FilterType, PixelType, ResizeAlg, ResizeOptions, Resizer};
use image::DynamicImage;

/// A picture longer than this many times its short side is cut to that first, around its centre,
/// so that resizing the short side cannot ask for unbounded memory.
const MAX_ASPECT: u32 = 8;

/// A decoded image: 8 bits a channel, rows of pixels, channels interleaved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pixels {
    width: usize,
    height: usize,
    channels: usize,
    data: Vec<u8>,
}

/// A rectangle of an image, in pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Area {
    pub(super) x: u32,
    pub(super) y: u32,
    pub(super) width: u32,
    pub(super) height: u32,
}

/// How an image gets its size when it is loaded, before any random transformation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fit {
    /// As it is.
    Original,
    /// The short side resized to `resize`, then the centre cut out, `crop` a side. An image that
    /// already has `crop` pixels a side is left as it is.
    Centre {
        /// Pixels of the short side.
        resize: usize,
        /// Pixels a side of the result.
        crop: usize,
    },
}

impl Pixels {
    /// Wraps grey (1 channel) or RGB (3) bytes; `None` if their number does not fit.
    pub fn new(width: usize, height: usize, channels: usize, data: Vec<u8>) -> Option<Self> {
        let fits = matches!(channels, 1 | 3)
            && width > 0
            && height > 0
            && width.checked_mul(height)?.checked_mul(channels)? == data.len();
        fits.then_some(Self {
            width,
            height,
            channels,
            data,
        })
    }

    /// Wraps bytes whose number is known to fit.
    pub(super) fn from_parts(width: usize, height: usize, channels: usize, data: Vec<u8>) -> Self {
        debug_assert_eq!(data.len(), width * height * channels);
        Self {
            width,
            height,
            channels,
            data,
        }
    }

    /// Converts a decoded image to grey (1 channel) or RGB (any other number). Transparency is
    /// dropped, 16 bits become 8.
    pub(super) fn from_image(image: DynamicImage, channels: usize) -> Self {
        let (width, height) = (image.width() as usize, image.height() as usize);
        let (channels, data) = match channels {
            1 => (1, image.into_luma8().into_raw()),
            _ => (3, image.into_rgb8().into_raw()),
        };
        Self {
            width,
            height,
            channels,
            data,
        }
    }

    /// Columns.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Rows.
    pub fn height(&self) -> usize {
        self.height
    }

    /// 1 (grey) or 3 (RGB).
    pub fn channels(&self) -> usize {
        self.channels
    }

    /// The bytes, `[height, width, channels]`.
    pub fn data(&self) -> &[u8] {
        &self.data
    }

    /// The bytes, to be changed.
    pub(super) fn data_mut(&mut self) -> &mut [u8] {
        &mut self.data
    }

    /// Gives the image its size.
    pub(super) fn fit(self, fit: Fit) -> Self {
        let Fit::Centre { resize, crop } = fit else {
            return self;
        };
        if self.width == crop && self.height == crop {
            return self;
        }
        let middle = self.limited_aspect();
        let short = middle.width.min(middle.height) as f64;
        let scaled = |side: u32| {
            let exact = f64::from(side) * resize as f64 / short;
            // The reference implementations truncate.
            (exact as usize).max(crop)
        };
        let (width, height) = (scaled(middle.width), scaled(middle.height));
        let resized = self.resized(middle, width, height);
        let centre = Area {
            x: ((width - crop) / 2) as u32,
            y: ((height - crop) / 2) as u32,
            width: crop as u32,
            height: crop as u32,
        };
        resized.resized(centre, crop, crop)
    }

    /// The whole image, or its middle if it is too long.
    fn limited_aspect(&self) -> Area {
        let (full_width, full_height) = (self.width as u32, self.height as u32);
        let longest = full_width.min(full_height).saturating_mul(MAX_ASPECT);
        let (width, height) = (full_width.min(longest), full_height.min(longest));
        Area {
            x: (full_width - width) / 2,
            y: (full_height - height) / 2,
            width,
            height,
        }
    }

    /// Cuts out an area, which must lie inside of the image, and resizes it: bicubic, with the
    /// filter widened when shrinking, as the reference implementations do.
    pub(super) fn resized(&self, area: Area, width: usize, height: usize) -> Self {
        let part = self.cut(area);
        let size = (width as u32, height as u32);
        let data = if (area.width, area.height) == size {
            part
        } else {
            resize(&part, area, size, self.channels)
        };
        Self {
            width,
            height,
            channels: self.channels,
            data,
        }
    }

    /// The bytes of an area.
    fn cut(&self, area: Area) -> Vec<u8> {
        let row_bytes = self.width * self.channels;
        let first = area.x as usize * self.channels;
        let len = area.width as usize * self.channels;
        let mut bytes = Vec::with_capacity(area.height as usize * len);
        let rows = self.data.chunks_exact(row_bytes);
        for row in rows.skip(area.y as usize).take(area.height as usize) {
            bytes.extend_from_slice(&row[first..first + len]);
        }
        bytes
    }
}

/// Integer arithmetic with Pillow's roundings, the same on every processor.
fn resize(bytes: &[u8], area: Area, (width, height): (u32, u32), channels: usize) -> Vec<u8> {
    let pixel = match channels {
        1 => PixelType::U8,
        _ => PixelType::U8x3,
    };
    let mut resized = Image::new(width, height, pixel);
    let filter = ResizeAlg::Convolution(FilterType::CatmullRom);
    let options = ResizeOptions::new().resize_alg(filter);
    // Neither fails: the bytes are those of the area, and both images have the same pixels.
    let done = ImageRef::new(area.width, area.height, bytes, pixel)
        .map(|part| Resizer::new().resize(&part, &mut resized, &options));
    debug_assert!(matches!(done, Ok(Ok(()))));
    resized.into_vec()
}
