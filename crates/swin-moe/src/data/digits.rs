//! The embedded digits: 1,797 scans of 8×8 pixels, see `data/digits/README.md`.

use super::dataset::Split;
use super::error::DataError;
use super::pixels::Pixels;

const TEXT: &[u8] = include_bytes!("../../data/digits/digits.txt");
/// Pixels a side.
const SIDE: usize = 8;
const NUM_CLASSES: u8 = 10;
/// Grey levels go from 0 to this.
const MAX_LEVEL: u8 = 16;
/// One of this many images belongs to the evaluation split: those at positions 4, 9, 14, …
const FOLD: usize = 5;

/// One scan.
#[derive(Debug, Clone, Copy)]
pub(super) struct Digit {
    pub(super) label: u32,
    levels: [u8; SIDE * SIDE],
}

impl Digit {
    /// The scan as an image of 8 bits a pixel, the same in each channel.
    pub(super) fn pixels(&self, channels: usize) -> Pixels {
        let data = self
            .levels
            .iter()
            .flat_map(|&level| std::iter::repeat_n(to_byte(level), channels))
            .collect();
        Pixels::from_parts(SIDE, SIDE, channels, data)
    }
}

/// Level 16 becomes white (255); rounds to nearest.
fn to_byte(level: u8) -> u8 {
    let max = u16::from(MAX_LEVEL);
    ((u16::from(level) * 255 + max / 2) / max) as u8
}

pub(super) fn class_names() -> Vec<String> {
    (0..NUM_CLASSES).map(|digit| digit.to_string()).collect()
}

/// The scans of one split, in the order of the file.
pub(super) fn load(split: Split) -> Result<Vec<Digit>, DataError> {
    TEXT.split(|&byte| byte == b'\n')
        .filter(|line| !line.is_empty())
        .enumerate()
        .filter(|(index, _)| (index % FOLD == FOLD - 1) == (split == Split::Eval))
        .map(|(index, line)| parse(line).ok_or(DataError::Embedded { line: index + 1 }))
        .collect()
}

/// A line is the label, a space, and one character for each pixel: its level, counted
/// `0123456789abcdefg`.
fn parse(line: &[u8]) -> Option<Digit> {
    let [label, b' ', levels @ ..] = line else {
        return None;
    };
    let label = label.checked_sub(b'0').filter(|&l| l < NUM_CLASSES)?;
    let mut digit = Digit {
        label: u32::from(label),
        levels: [0; SIDE * SIDE],
    };
    if levels.len() != digit.levels.len() {
        return None;
    }
    for (level, &character) in digit.levels.iter_mut().zip(levels) {
        *level = match character {
            b'0'..=b'9' => character - b'0',
            b'a'..=b'g' => character - b'a' + 10,
            _ => return None,
        };
    }
    Some(digit)
}

#[cfg(test)]
mod tests {
    use super::{TEXT, load, parse, to_byte};
    use crate::data::Split;

    /// Figures of the original CSV (label last in a row), computed independently of this parser.
    #[test]
    fn every_value_is_that_of_the_original() {
        let digits: Vec<_> = TEXT
            .split(|&b| b == b'\n')
            .filter(|line| !line.is_empty())
            .map(|line| parse(line).expect("the embedded file parses"))
            .collect();
        assert_eq!(digits.len(), 1797);
        let weighted = |row: usize, digit: &super::Digit| -> u64 {
            let values = digit.levels.iter().map(|&v| u64::from(v));
            let values = values.chain([u64::from(digit.label)]);
            let sum: u64 = values.zip(1..).map(|(value, column)| value * column).sum();
            sum * (row as u64 + 1)
        };
        let ink: u64 = digits.iter().flat_map(|d| d.levels).map(u64::from).sum();
        let checksum: u64 = digits.iter().enumerate().map(|(i, d)| weighted(i, d)).sum();
        assert_eq!(ink, 561_718);
        assert_eq!(checksum, 16_809_934_574);
    }

    #[test]
    fn every_fifth_image_is_for_evaluation() {
        let count = |split| {
            let mut counts = [0; 10];
            for digit in load(split).expect("the embedded file parses") {
                counts[digit.label as usize] += 1;
            }
            counts
        };
        let eval = count(Split::Eval);
        assert_eq!(eval, [27, 21, 34, 52, 34, 28, 31, 43, 47, 42]);
        let all = [178, 182, 177, 183, 181, 182, 181, 179, 174, 180];
        let train = count(Split::Train);
        assert!((0..10).all(|class| train[class] + eval[class] == all[class]));
    }

    #[test]
    fn levels_span_all_bytes() {
        assert_eq!([to_byte(0), to_byte(8), to_byte(16)], [0, 128, 255]);
    }

    #[test]
    fn damaged_lines_are_refused() {
        let good = format!("3 {}", "0".repeat(64));
        assert!(parse(good.as_bytes()).is_some());
        for bad in [
            "",
            "3",
            "x 0",
            &good[1..],
            &good[..65],
            &format!("{good}0"),
            &good.replace("00", "0h"),
        ] {
            assert!(parse(bad.as_bytes()).is_none(), "{bad:?}");
        }
    }
}
