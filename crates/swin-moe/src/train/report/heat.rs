//! Heat maps as inline SVG: rows over time, values as colours of the viridis scale.

use std::collections::BTreeMap;
use std::fmt::Write;

use super::svg::{LEFT, RIGHT, WIDTH, empty_chart, escape, number, ticks};

/// More columns than this are put together: a screen shows no more.
pub const MAX_COLUMNS: usize = 200;

/// Colours that are told apart: as many as a screen shows, and few enough to be grouped.
const LEVELS: usize = 64;
const TOP: f64 = 8.0;
/// Below the plot: ticks and label of the x axis, the scale, its ticks and its label.
const X_AXIS: f64 = 34.0;
const SCALE: f64 = 64.0;
const SCALE_HEIGHT: f64 = 10.0;

/// Viridis by Smith and van der Walt, at equal distances; it is interpolated in between.
const VIRIDIS: [[u8; 3]; 10] = [
    [0x44, 0x01, 0x54],
    [0x48, 0x28, 0x78],
    [0x3e, 0x4a, 0x89],
    [0x31, 0x68, 0x8e],
    [0x26, 0x82, 0x8e],
    [0x1f, 0x9e, 0x89],
    [0x35, 0xb7, 0x79],
    [0x6d, 0xcd, 0x59],
    [0xb4, 0xde, 0x2c],
    [0xfd, 0xe7, 0x25],
];

/// Values of rows in columns of time.
#[derive(Debug, Clone, PartialEq)]
pub struct Grid {
    /// Of each column, each row's value; `None` where nothing was recorded.
    pub columns: Vec<Option<Vec<f64>>>,
    /// Where the first column begins and the last one ends.
    pub range: [f64; 2],
}

impl Grid {
    /// Sums of what was recorded at (time, value of each row), ascending in time, in at most
    /// [`MAX_COLUMNS`] columns of equal width.
    pub fn of_sums(records: &[(u64, Vec<f64>)]) -> Self {
        let (Some((first, _)), Some((last, _))) = (records.first(), records.last()) else {
            return Grid {
                columns: Vec::new(),
                range: [0.0, 0.0],
            };
        };
        let span = u128::from(last.saturating_sub(*first));
        let records_apart = records.len().saturating_sub(1).max(1) as u128;
        let num_columns = records.len().min(MAX_COLUMNS);
        let mut columns: Vec<Option<Vec<f64>>> = vec![None; num_columns];
        for (time, values) in records {
            // Columns reach half a record's distance beyond the first and the last. In whole
            // numbers, so that records at equal distances fall into a column each.
            let ahead = u128::from(time.saturating_sub(*first));
            let column = match span {
                0 => 0,
                _ => ahead * records_apart * num_columns as u128 / (span * (records_apart + 1)),
            };
            let column = (column as usize).min(num_columns - 1);
            let sums = columns[column].get_or_insert_with(|| vec![0.0; values.len()]);
            for (sum, value) in sums.iter_mut().zip(values) {
                *sum += value;
            }
        }
        let half = match span {
            0 => 0.5,
            _ => span as f64 / records_apart as f64 / 2.0,
        };
        Grid {
            columns,
            range: [*first as f64 - half, *last as f64 + half],
        }
    }

    /// Each row's part of its column, in percent; columns of zeros stay so.
    pub fn into_percent(mut self) -> Self {
        for column in self.columns.iter_mut().flatten() {
            let sum: f64 = column.iter().sum();
            if sum > 0.0 {
                column.iter_mut().for_each(|value| *value *= 100.0 / sum);
            }
        }
        self
    }

    fn num_rows(&self) -> usize {
        let rows = self.columns.iter().flatten().map(Vec::len);
        rows.max().unwrap_or(0)
    }

    fn max(&self) -> f64 {
        let values = self.columns.iter().flatten().flatten();
        values.copied().fold(0.0, f64::max)
    }
}

/// What a heat map says beside its colours.
#[derive(Debug, Clone)]
pub struct Labels<'a> {
    /// Of the x axis, with its unit.
    pub x: &'a str,
    /// Of the y axis.
    pub y: &'a str,
    /// Of the values, with their unit.
    pub value: &'a str,
    /// A value of note, and its name.
    pub mark: Option<(f64, &'a str)>,
}

/// The grid as a picture, the first row at the top, and the scale of its colours, from zero to the
/// largest value.
pub fn heat_map(grid: &Grid, labels: &Labels) -> String {
    let (num_rows, num_columns) = (grid.num_rows(), grid.columns.len());
    if num_rows == 0 {
        return empty_chart();
    }
    let height = (num_rows as f64 * 16.0).clamp(96.0, 384.0);
    let max = match grid.max() {
        max if max > 0.0 => max,
        _ => 1.0,
    };
    let total = TOP + height + X_AXIS + SCALE;
    let mut svg = format!("<svg viewBox=\"0 0 {WIDTH} {total}\" role=\"img\">");
    let (x_scale, y_scale) = (
        (WIDTH - LEFT - RIGHT) / num_columns as f64,
        height / num_rows as f64,
    );
    let _ = write!(
        svg,
        "<rect class=\"void\" x=\"{LEFT}\" y=\"{TOP}\" width=\"{}\" height=\"{height}\"/>\
         <g transform=\"translate({LEFT} {TOP}) scale({x_scale:.5} {y_scale:.5})\" \
         shape-rendering=\"crispEdges\">{}</g>",
        WIDTH - LEFT - RIGHT,
        cells(grid, max)
    );
    svg.push_str(&row_labels(grid, y_scale, labels));
    let [low, high] = grid.range;
    for tick in ticks(low, high, 6) {
        let x = LEFT + (tick - low) / (high - low) * (WIDTH - LEFT - RIGHT);
        let y = TOP + height;
        let _ = write!(
            svg,
            "<line class=\"tick\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{y}\" y2=\"{}\"/>\
             <text x=\"{x:.1}\" y=\"{}\" text-anchor=\"middle\">{}</text>",
            y + 3.0,
            y + 14.0,
            number(tick)
        );
    }
    let middle = (LEFT + WIDTH - RIGHT) / 2.0;
    let _ = write!(
        svg,
        "<text class=\"label\" x=\"{middle}\" y=\"{}\" text-anchor=\"middle\">{}</text>",
        TOP + height + 27.0,
        escape(labels.x)
    );
    svg.push_str(&scale(TOP + height + X_AXIS, max, labels));
    svg + "</svg>"
}

/// One path for each colour, in units of cells; neighbours of one colour in a row are one piece.
fn cells(grid: &Grid, max: f64) -> String {
    let mut paths: BTreeMap<usize, String> = BTreeMap::new();
    for row in 0..grid.num_rows() {
        let level_at = |column: usize| -> Option<usize> {
            let value = grid.columns.get(column)?.as_ref()?.get(row)?;
            Some(level(value / max))
        };
        let mut start = 0;
        while start < grid.columns.len() {
            let here = level_at(start);
            let mut end = start + 1;
            while end < grid.columns.len() && level_at(end) == here {
                end += 1;
            }
            if let Some(here) = here {
                let width = end - start;
                let path = paths.entry(here).or_default();
                let _ = write!(path, "M{start} {row}h{width}v1h-{width}z");
            }
            start = end;
        }
    }
    paths
        .iter()
        .map(|(&level, path)| format!("<path fill=\"{}\" d=\"{path}\"/>", colour(level)))
        .collect()
}

/// The rows' numbers and the name of the axis; pointing at a row tells its mean and extremes.
fn row_labels(grid: &Grid, row_height: f64, labels: &Labels) -> String {
    let mut svg = String::new();
    // Text needs some twelve units.
    let every = (12.0 / row_height).ceil() as usize;
    for row in 0..grid.num_rows() {
        let middle = TOP + (row as f64 + 0.5) * row_height;
        if row.is_multiple_of(every) {
            let _ = write!(
                svg,
                "<text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{row}</text>",
                LEFT - 6.0,
                middle + 3.5
            );
        }
        let columns = grid.columns.iter().flatten();
        let values: Vec<f64> = columns.filter_map(|c| c.get(row).copied()).collect();
        let mean = values.iter().sum::<f64>() / values.len().max(1) as f64;
        let low = values.iter().copied().fold(f64::INFINITY, f64::min);
        let high = values.iter().copied().fold(0.0, f64::max);
        let _ = write!(
            svg,
            "<rect x=\"{LEFT}\" y=\"{:.2}\" width=\"{}\" height=\"{row_height:.2}\" \
             fill=\"transparent\"><title>{} {row}: mean {mean:.1}, {low:.1} to {high:.1} ({})\
             </title></rect>",
            middle - row_height / 2.0,
            WIDTH - LEFT - RIGHT,
            escape(labels.y),
            escape(labels.value)
        );
    }
    let middle = TOP + grid.num_rows() as f64 * row_height / 2.0;
    let _ = write!(
        svg,
        "<text class=\"label\" x=\"14\" y=\"{middle:.1}\" text-anchor=\"middle\" \
         transform=\"rotate(-90 14 {middle:.1})\">{}</text>",
        escape(labels.y)
    );
    svg
}

/// The bar of colours from zero to `max`, with values.
fn scale(top: f64, max: f64, labels: &Labels) -> String {
    let width = WIDTH - LEFT - RIGHT;
    let piece = width / LEVELS as f64;
    let mut svg = String::from("<g shape-rendering=\"crispEdges\">");
    for level in 0..LEVELS {
        let _ = write!(
            svg,
            "<rect x=\"{:.2}\" y=\"{top}\" width=\"{:.2}\" height=\"{SCALE_HEIGHT}\" fill=\"{}\"/>",
            LEFT + level as f64 * piece,
            piece + 0.2,
            colour(level)
        );
    }
    svg.push_str("</g>");
    let below = top + SCALE_HEIGHT;
    let mut tick = |value: f64, text: &str, length: f64| {
        let x = LEFT + value / max * width;
        // Longer texts must not leave the picture.
        let anchor = match value / max {
            part if part > 0.85 => "end",
            part if part < 0.1 => "start",
            _ => "middle",
        };
        let _ = write!(
            svg,
            "<line class=\"tick\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{below}\" y2=\"{}\"/>\
             <text x=\"{x:.1}\" y=\"{}\" text-anchor=\"{anchor}\">{text}</text>",
            below + length,
            below + length + 11.0,
        );
    };
    for value in ticks(0.0, max, 5) {
        tick(value, &number(value), 3.0);
    }
    if let Some((value, name)) = labels.mark.filter(|(value, _)| (0.0..=max).contains(value)) {
        let rounded = number((value * 10.0).round() / 10.0);
        let text = format!("▲ {}: {rounded}", escape(name));
        tick(value, &text, 16.0);
    }
    let _ = write!(
        svg,
        "<text class=\"label\" x=\"{}\" y=\"{}\" text-anchor=\"middle\">{}</text>",
        (LEFT + WIDTH - RIGHT) / 2.0,
        below + 42.0,
        escape(labels.value)
    );
    svg
}

/// The colour's number for a value in 0..=1.
fn level(value: f64) -> usize {
    ((value.clamp(0.0, 1.0) * LEVELS as f64) as usize).min(LEVELS - 1)
}

fn colour(level: usize) -> String {
    let [r, g, b] = viridis((level as f64 + 0.5) / LEVELS as f64);
    format!("#{r:02x}{g:02x}{b:02x}")
}

/// The scale's colour at `at` in 0..=1, sRGB.
fn viridis(at: f64) -> [u8; 3] {
    let position = at.clamp(0.0, 1.0) * (VIRIDIS.len() - 1) as f64;
    let index = (position as usize).min(VIRIDIS.len() - 2);
    let part = position - index as f64;
    let (low, high) = (VIRIDIS[index], VIRIDIS[index + 1]);
    std::array::from_fn(|channel| {
        let (low, high) = (f64::from(low[channel]), f64::from(high[channel]));
        (low + (high - low) * part).round() as u8
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// CIE lightness L*, from sRGB.
    fn lightness(rgb: [u8; 3]) -> f64 {
        let linear = rgb.map(|byte| {
            let value = f64::from(byte) / 255.0;
            if value <= 0.04045 {
                value / 12.92
            } else {
                ((value + 0.055) / 1.055).powf(2.4)
            }
        });
        let y = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
        116.0 * y.cbrt() - 16.0
    }

    #[test]
    fn equal_steps_look_equal() {
        let steps: Vec<f64> = (0..=20)
            .map(|i| lightness(viridis(f64::from(i) / 20.0)))
            .collect();
        let mean = (steps[20] - steps[0]) / 20.0;
        assert!(mean > 3.0, "{steps:?}");
        for pair in steps.windows(2) {
            let step = pair[1] - pair[0];
            assert!((0.6..1.4).contains(&(step / mean)), "{step} of {mean}");
        }
    }

    #[test]
    fn records_at_equal_distances_have_a_column_each() {
        for distance in [1, 3, 7, 50] {
            let records: Vec<_> = (0..MAX_COLUMNS as u64)
                .map(|i| (11 + i * distance, vec![i as f64, 1.0]))
                .collect();
            let grid = Grid::of_sums(&records);
            assert_eq!(grid.columns.len(), MAX_COLUMNS);
            for (i, column) in grid.columns.iter().enumerate() {
                assert_eq!(column.as_deref(), Some(&[i as f64, 1.0][..]), "{distance}");
            }
            let half = distance as f64 / 2.0;
            let last = 11.0 + 199.0 * distance as f64;
            assert_eq!(grid.range, [11.0 - half, last + half]);
        }
    }

    #[test]
    fn long_runs_are_put_together_and_lose_nothing() {
        let records: Vec<_> = (0..12_345)
            .map(|i| (i * 10, vec![1.0, (i % 7) as f64]))
            .collect();
        let grid = Grid::of_sums(&records);
        assert_eq!(grid.columns.len(), MAX_COLUMNS);
        let sums = |row: usize| -> f64 { grid.columns.iter().flatten().map(|c| c[row]).sum() };
        assert_eq!(sums(0), 12_345.0);
        assert_eq!(sums(1), (0..12_345).map(|i| f64::from(i % 7)).sum::<f64>());
        // 61 or 62 records in every column.
        let fits = |c: &Vec<f64>| (61.0..=62.0).contains(&c[0]);
        assert!(grid.columns.iter().flatten().all(fits));
        assert!(grid.columns.iter().all(Option::is_some));
    }

    #[test]
    fn a_gap_stays_empty_and_a_lone_record_is_a_column() {
        let grid = Grid::of_sums(&[
            (0, vec![3.0, 1.0]),
            (1, vec![0.0, 0.0]),
            (9, vec![1.0, 1.0]),
        ]);
        assert_eq!(
            grid.into_percent().columns,
            [Some(vec![75.0, 25.0]), None, Some(vec![50.0, 50.0])]
        );
        let lone = Grid::of_sums(&[(5, vec![2.0])]);
        assert_eq!((lone.columns.len(), lone.range), (1, [4.5, 5.5]));
        assert!(Grid::of_sums(&[]).columns.is_empty());
    }

    #[test]
    fn cells_have_the_colours_of_their_values() {
        let columns = [vec![0.0, 100.0], vec![0.0, 50.0], vec![100.0, 0.0]];
        let grid = Grid {
            columns: columns.into_iter().map(Some).collect(),
            range: [0.0, 3.0],
        };
        let paths = cells(&grid, 100.0);
        let dark = format!(
            "<path fill=\"{}\" d=\"M0 0h2v1h-2zM2 1h1v1h-1z\"/>",
            colour(0)
        );
        let bright = format!(
            "<path fill=\"{}\" d=\"M2 0h1v1h-1zM0 1h1v1h-1z\"/>",
            colour(63)
        );
        assert!(paths.contains(&dark) && paths.contains(&bright), "{paths}");
        assert!(paths.contains(&format!("{}\" d=\"M1 1h1v1h-1z\"", colour(32))));
        assert_eq!(paths.matches("<path").count(), 3);
    }
}
