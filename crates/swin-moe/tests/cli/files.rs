//! Images, folders and damaged files, made for the tests.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use image::codecs::jpeg::JpegEncoder;
use image::{ImageFormat, Rgb, RgbImage};

/// Side of the images.
pub const SIDE: u32 = 8;

/// An image whose pixels tell which one it is.
pub fn picture(class: u32, number: u32) -> RgbImage {
    RgbImage::from_fn(SIDE, SIDE, |x, y| {
        let stripes = if class.is_multiple_of(2) { x } else { y };
        Rgb([
            (stripes * 30) as u8,
            (number * 16) as u8,
            (x * y + class) as u8,
        ])
    })
}

/// Writes a picture in the format of the path's extension.
pub fn write_picture(path: &Path, class: u32, number: u32) {
    let format = ImageFormat::from_path(path).unwrap();
    picture(class, number)
        .save_with_format(path, format)
        .unwrap();
}

/// A whole JPEG file.
pub fn jpeg() -> Vec<u8> {
    let mut bytes = Vec::new();
    JpegEncoder::new(&mut bytes)
        .encode_image(&picture(1, 3))
        .unwrap();
    bytes
}

/// An image folder: classes `down` and `up`, 8 images each for training and 3 for testing.
pub fn image_folder(root: &Path) -> PathBuf {
    for (split, count) in [("train", 8), ("test", 3)] {
        for (class, name) in (0..).zip(["down", "up"]) {
            let dir = root.join(split).join(name);
            fs::create_dir_all(&dir).unwrap();
            for number in 0..count {
                let extension = ["png", "bmp", "PNG", "webp"][number as usize % 4];
                write_picture(&dir.join(format!("{number}.{extension}")), class, number);
            }
        }
    }
    root.to_path_buf()
}

/// A PNG whose header promises an image of `width` by `height` pixels.
pub fn png_of_size(width: u32, height: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut file = std::io::Cursor::new(&mut bytes);
    picture(0, 0).write_to(&mut file, ImageFormat::Png).unwrap();
    // The signature (8 bytes), then length, type, width, height, … and checksum of the header.
    bytes[16..20].copy_from_slice(&width.to_be_bytes());
    bytes[20..24].copy_from_slice(&height.to_be_bytes());
    let checksum = crc32(&bytes[12..29]);
    bytes[29..33].copy_from_slice(&checksum.to_be_bytes());
    bytes
}

fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(u32::MAX, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| {
            (crc >> 1) ^ (0xedb8_8320 * (crc & 1))
        })
    })
}

/// Numbers that look random and are the same every time (SplitMix64).
pub struct Numbers(pub u64);

impl Numbers {
    /// One in `0..end`.
    pub fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % end as u64) as usize
    }
}

/// A zip archive, uncompressed, as PyTorch writes its checkpoints.
pub fn archive(path: &Path, entries: &[(&str, &[u8])]) {
    let mut zip = zip::ZipWriter::new(fs::File::create(path).unwrap());
    let options =
        zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
    for (name, bytes) in entries {
        zip.start_file(*name, options).unwrap();
        zip.write_all(bytes).unwrap();
    }
    zip.finish().unwrap();
}
