//! The image under the colours of the experts that took its patches.

use std::io;

use image::codecs::png::PngEncoder;
use image::{ExtendedColorType, ImageEncoder, Rgb, RgbImage};

use super::glyphs::{draw_outlined, draw_text, text_size};
use super::palette::expert_color;
use crate::data::Pixels;

/// Pictures are enlarged to at least this many pixels a side.
const MIN_SIDE: u32 = 384;
/// How much of an expert's colour covers the image.
const COVER: f64 = 0.6;
/// Smallest patch that has room for its expert's number.
const MIN_NUMBERED: u32 = 16;

/// Pixels of the legend: its rows, the boxes with experts' numbers, and its columns.
const ROW: u32 = 24;
const HEADER: u32 = 16;
const BOX: (u32, u32) = (34, 18);
const COLUMN: u32 = 132;
const GAP: u32 = 14;
const INK: [u8; 3] = [0x1d, 0x24, 0x30];

/// The image as it is, enlarged as [`expert_picture`] enlarges it.
pub fn input_picture(pixels: &Pixels) -> RgbImage {
    let scale = enlargement(pixels);
    let (width, height) = (pixels.width() as u32, pixels.height() as u32);
    RgbImage::from_fn(width * scale, height * scale, |x, y| {
        let index = (y / scale) as usize * pixels.width() + (x / scale) as usize;
        let channels = pixels.channels();
        let pixel = &pixels.data()[index * channels..(index + 1) * channels];
        Rgb(match *pixel {
            [r, g, b] => [r, g, b],
            [grey, ..] => [grey; 3],
            [] => [0; 3],
        })
    })
}

fn enlargement(pixels: &Pixels) -> u32 {
    let side = pixels.width().max(pixels.height()).max(1) as u32;
    MIN_SIDE.div_ceil(side)
}

/// The image, each patch tinted by its expert and framed where its neighbour has another one, and
/// a legend with each expert's share of the patches.
///
/// `experts`: `[grid, grid]`, by row and column, each below `num_experts`; the grid's patches are
/// of equal size and cover the image.
pub fn expert_picture(pixels: &Pixels, experts: &[usize], num_experts: usize) -> RgbImage {
    let mut picture = input_picture(pixels);
    let grid = experts.len().isqrt() as u32;
    if grid > 0 {
        tint(&mut picture, experts, grid);
    }
    let (width, height) = picture.dimensions();
    let columns = legend_columns(num_experts as u32, height);
    let ground = Rgb([255; 3]);
    let mut whole = RgbImage::from_pixel(width + GAP + columns * COLUMN, height, ground);
    image::imageops::replace(&mut whole, &picture, 0, 0);
    draw_legend(&mut whole, experts, num_experts, width + GAP);
    whole
}

fn tint(picture: &mut RgbImage, experts: &[usize], grid: u32) {
    let (width, height) = picture.dimensions();
    let (patch_width, patch_height) = (width / grid, height / grid);
    let expert_at = |row: i64, column: i64| -> Option<usize> {
        let inside = |at: i64| (0..i64::from(grid)).contains(&at);
        let index = row * i64::from(grid) + column;
        (inside(row) && inside(column)).then(|| experts[index as usize])
    };
    let frame = if patch_width >= 24 { 2 } else { 1 };
    for row in 0..grid {
        for column in 0..grid {
            let (r, c) = (i64::from(row), i64::from(column));
            let Some(expert) = expert_at(r, c) else {
                continue;
            };
            let color = expert_color(expert);
            let differs = |dr: i64, dc: i64| expert_at(r + dr, c + dc) != Some(expert);
            let (left, top) = (column * patch_width, row * patch_height);
            for y in 0..patch_height {
                for x in 0..patch_width {
                    let framed = (y < frame && differs(-1, 0))
                        || (y + frame >= patch_height && differs(1, 0))
                        || (x < frame && differs(0, -1))
                        || (x + frame >= patch_width && differs(0, 1));
                    let pixel = picture.get_pixel_mut(left + x, top + y);
                    let cover = if framed { 1.0 } else { COVER };
                    *pixel = Rgb(blend(pixel.0, color, cover));
                }
            }
            if patch_width.min(patch_height) >= MIN_NUMBERED {
                let text = expert.to_string();
                let roomy = text_size(&text, 2).0 + 8 <= patch_width && patch_width >= 28;
                let middle = (left + patch_width / 2, top + patch_height / 2);
                draw_outlined(picture, &text, middle, if roomy { 2 } else { 1 });
            }
        }
    }
}

fn blend(below: [u8; 3], above: [u8; 3], cover: f64) -> [u8; 3] {
    std::array::from_fn(|channel| {
        let (below, above) = (f64::from(below[channel]), f64::from(above[channel]));
        (below + (above - below) * cover).round() as u8
    })
}

fn rows_per_column(height: u32) -> u32 {
    (height.saturating_sub(HEADER) / ROW).max(1)
}

fn legend_columns(num_experts: u32, height: u32) -> u32 {
    num_experts.div_ceil(rows_per_column(height)).max(1)
}

fn draw_legend(whole: &mut RgbImage, experts: &[usize], num_experts: usize, left: u32) {
    let mut patches = vec![0usize; num_experts];
    for &expert in experts {
        if let Some(count) = patches.get_mut(expert) {
            *count += 1;
        }
    }
    let rows = rows_per_column(whole.height());
    for (expert, &count) in patches.iter().enumerate() {
        let (column, row) = (expert as u32 / rows, expert as u32 % rows);
        let left = left + column * COLUMN;
        if row == 0 {
            draw_text(whole, "expert", (left, 4), 1, INK);
            draw_text(whole, "share", (left + BOX.0 + 8, 4), 1, INK);
        }
        let top = HEADER + row * ROW;
        for (x, y) in (0..BOX.0).flat_map(|x| (0..BOX.1).map(move |y| (x, y))) {
            if let Some(pixel) = whole.get_pixel_mut_checked(left + x, top + y) {
                *pixel = Rgb(expert_color(expert));
            }
        }
        let text = expert.to_string();
        let scale = if text.len() < 3 { 2 } else { 1 };
        let middle = (left + BOX.0 / 2, top + BOX.1 / 2);
        draw_outlined(whole, &text, middle, scale);
        let share = 100.0 * count as f64 / experts.len().max(1) as f64;
        let at = (left + BOX.0 + 8, top + 2);
        draw_text(whole, &format!("{share:.1}%"), at, 2, INK);
    }
}

/// A picture as the bytes of a PNG file.
///
/// # Errors
/// If the encoder refuses it.
pub fn png(picture: &RgbImage) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let (width, height) = picture.dimensions();
    PngEncoder::new(&mut bytes)
        .write_image(picture, width, height, ExtendedColorType::Rgb8)
        .map_err(io::Error::other)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 6 × 6 pixels in two greys, three patches a side.
    fn picture(num_experts: usize) -> (RgbImage, [usize; 9]) {
        let bytes = (0..36).map(|i| if i % 6 < 3 { 40 } else { 200 }).collect();
        let pixels = Pixels::new(6, 6, 1, bytes).unwrap();
        let experts = [0, 1, 2, 2, 2, 0, 1, 1, 6];
        (expert_picture(&pixels, &experts, num_experts), experts)
    }

    #[test]
    fn patches_have_their_experts_colours_at_their_places() {
        let (picture, experts) = picture(7);
        // 6 pixels are enlarged 64 times, so that a patch has 128 pixels a side.
        for (index, &expert) in experts.iter().enumerate() {
            let (row, column) = (index as u32 / 3, index as u32 % 3);
            for (dx, dy) in [(20, 20), (100, 20), (20, 100)] {
                let (x, y) = (column * 128 + dx, row * 128 + dy);
                let grey = if x / 64 < 3 { 40.0 } else { 200.0 };
                let want =
                    expert_color(expert).map(|c| (0.4 * grey + 0.6 * f64::from(c)).round() as u8);
                assert_eq!(picture.get_pixel(x, y).0, want, "{row} {column}");
            }
        }
        // Framed towards other experts and the edge, not between patches of one.
        let solid = |x, y, expert| picture.get_pixel(x, y).0 == expert_color(expert);
        assert!(solid(0, 30, 0) && solid(127, 30, 0) && solid(128, 30, 1) && solid(30, 127, 0));
        assert!(!solid(127, 150, 2) && !solid(128, 150, 2));
    }

    #[test]
    fn the_legend_has_every_expert_and_fits() {
        let (image, _) = picture(7);
        assert_eq!(image.dimensions(), (384 + GAP + COLUMN, 384));
        for expert in 0..7 {
            let at = (384 + GAP + 1, HEADER + expert * ROW + 1);
            assert_eq!(image.get_pixel(at.0, at.1).0, expert_color(expert as usize));
        }
        // 15 rows a column.
        let (image, _) = picture(64);
        assert_eq!(image.dimensions(), (384 + GAP + 5 * COLUMN, 384));
        let at = (384 + GAP + 4 * COLUMN + 1, HEADER + 3 * ROW + 1);
        assert_eq!(image.get_pixel(at.0, at.1).0, expert_color(63));
    }

    #[test]
    fn an_encoded_picture_decodes_to_itself() {
        let (image, _) = picture(7);
        let bytes = png(&image).unwrap();
        assert_eq!(image::load_from_memory(&bytes).unwrap().into_rgb8(), image);
    }
}
