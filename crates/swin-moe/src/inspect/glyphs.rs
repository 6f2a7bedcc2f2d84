//! Text in pictures: the few characters that their legends need, 5 × 7 points each.

use image::{Rgb, RgbImage};

/// Columns and rows of a character.
const COLUMNS: u32 = 5;
const ROWS: u32 = 7;

/// The rows of a character, the leftmost point in bit 4; `None` for one that there is not.
fn glyph(character: char) -> Option<[u8; ROWS as usize]> {
    Some(match character {
        '0' => [0x0e, 0x11, 0x13, 0x15, 0x19, 0x11, 0x0e],
        '1' => [0x04, 0x0c, 0x04, 0x04, 0x04, 0x04, 0x0e],
        '2' => [0x0e, 0x11, 0x01, 0x02, 0x04, 0x08, 0x1f],
        '3' => [0x1f, 0x02, 0x04, 0x02, 0x01, 0x11, 0x0e],
        '4' => [0x02, 0x06, 0x0a, 0x12, 0x1f, 0x02, 0x02],
        '5' => [0x1f, 0x10, 0x1e, 0x01, 0x01, 0x11, 0x0e],
        '6' => [0x06, 0x08, 0x10, 0x1e, 0x11, 0x11, 0x0e],
        '7' => [0x1f, 0x01, 0x02, 0x04, 0x08, 0x08, 0x08],
        '8' => [0x0e, 0x11, 0x11, 0x0e, 0x11, 0x11, 0x0e],
        '9' => [0x0e, 0x11, 0x11, 0x0f, 0x01, 0x02, 0x0c],
        '.' => [0x00, 0x00, 0x00, 0x00, 0x00, 0x0c, 0x0c],
        '%' => [0x18, 0x19, 0x02, 0x04, 0x08, 0x13, 0x03],
        'a' => [0x00, 0x00, 0x0e, 0x01, 0x0f, 0x11, 0x0f],
        'e' => [0x00, 0x00, 0x0e, 0x11, 0x1f, 0x10, 0x0e],
        'h' => [0x10, 0x10, 0x16, 0x19, 0x11, 0x11, 0x11],
        'p' => [0x00, 0x00, 0x1e, 0x11, 0x1e, 0x10, 0x10],
        'r' => [0x00, 0x00, 0x16, 0x19, 0x10, 0x10, 0x10],
        's' => [0x00, 0x00, 0x0e, 0x10, 0x0e, 0x01, 0x1e],
        't' => [0x08, 0x08, 0x1c, 0x08, 0x08, 0x09, 0x06],
        'x' => [0x00, 0x00, 0x11, 0x0a, 0x04, 0x0a, 0x11],
        _ => return None,
    })
}

/// Pixels of a text with `scale` pixels a point: width and height.
pub(super) fn text_size(text: &str, scale: u32) -> (u32, u32) {
    let characters = text.chars().count() as u32;
    let width = (characters * (COLUMNS + 1)).saturating_sub(1);
    (width * scale, ROWS * scale)
}

/// Draws a text whose upper left corner is at `(x, y)`; what lies outside of the picture, and
/// characters that there are not, are left out.
pub(super) fn draw_text(
    picture: &mut RgbImage,
    text: &str,
    (x, y): (u32, u32),
    scale: u32,
    color: [u8; 3],
) {
    for (index, character) in text.chars().enumerate() {
        let Some(rows) = glyph(character) else {
            continue;
        };
        let left = x + index as u32 * (COLUMNS + 1) * scale;
        for (row, bits) in rows.iter().enumerate() {
            for column in 0..COLUMNS {
                if bits >> (COLUMNS - 1 - column) & 1 == 0 {
                    continue;
                }
                for (dx, dy) in (0..scale).flat_map(|dx| (0..scale).map(move |dy| (dx, dy))) {
                    let at = (left + column * scale + dx, y + row as u32 * scale + dy);
                    if let Some(pixel) = picture.get_pixel_mut_checked(at.0, at.1) {
                        *pixel = Rgb(color);
                    }
                }
            }
        }
    }
}

/// Draws a text around `(x, y)` in white on a black edge, which is legible on any ground.
pub(super) fn draw_outlined(picture: &mut RgbImage, text: &str, (x, y): (u32, u32), scale: u32) {
    let (width, height) = text_size(text, scale);
    let corner = (x.saturating_sub(width / 2), y.saturating_sub(height / 2));
    for (dx, dy) in [
        (0, 0),
        (1, 0),
        (2, 0),
        (0, 1),
        (2, 1),
        (0, 2),
        (1, 2),
        (2, 2),
    ] {
        let around = (
            (corner.0 + dx).saturating_sub(1),
            (corner.1 + dy).saturating_sub(1),
        );
        draw_text(picture, text, around, scale, [0, 0, 0]);
    }
    draw_text(picture, text, corner, scale, [255, 255, 255]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digits_are_different_and_fit_their_points() {
        let characters = "0123456789.%aehprstx";
        let glyphs: std::collections::BTreeSet<_> =
            characters.chars().map(|c| glyph(c).unwrap()).collect();
        assert_eq!(glyphs.len(), characters.len());
        assert!(glyphs.iter().flatten().all(|&row| row < 32));
        assert_eq!(glyph('é'), None);
    }

    #[test]
    fn a_text_is_where_it_should_be() {
        let mut picture = RgbImage::new(14, 9);
        draw_text(&mut picture, "1.", (1, 1), 1, [255, 0, 0]);
        let rows: Vec<String> = picture
            .rows()
            .map(|row| row.map(|p| if p.0[0] > 0 { '#' } else { ' ' }).collect())
            .collect();
        assert_eq!(
            rows,
            [
                "              ",
                "   #          ",
                "  ##          ",
                "   #          ",
                "   #          ",
                "   #          ",
                "   #    ##    ",
                "  ###   ##    ",
                "              ",
            ]
        );
        // Beyond the edge nothing happens.
        draw_text(&mut picture, "888", (12, 7), 3, [255, 0, 0]);
        assert_eq!(text_size("100.0%", 2), (70, 14));
    }
}
