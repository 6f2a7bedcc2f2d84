//! Charts as inline SVG: no script, no external resource.

use std::fmt::Write;

/// Size of a chart's plot area and margins, in SVG units.
pub(super) const WIDTH: f64 = 560.0;
const HEIGHT: f64 = 240.0;
pub(super) const LEFT: f64 = 54.0;
pub(super) const RIGHT: f64 = 14.0;
const TOP: f64 = 10.0;
const BOTTOM: f64 = 34.0;
/// More points than this are thinned out: a screen shows no more.
const MAX_POINTS: usize = 600;

/// A named line.
#[derive(Debug, Clone)]
pub struct Series {
    /// Its name in the legend.
    pub name: String,
    /// CSS colour.
    pub color: String,
    /// (x, y), ascending in x.
    pub points: Vec<(f64, f64)>,
    /// Faint lines carry raw data behind a smoothed one; they have no legend entry.
    pub faint: bool,
    /// Whether to mark each point.
    pub dots: bool,
}

impl Series {
    /// A plain line.
    pub fn line(name: &str, color: &str, points: Vec<(f64, f64)>) -> Self {
        Series {
            name: name.to_owned(),
            color: color.to_owned(),
            points,
            faint: false,
            dots: false,
        }
    }
}

/// Colour `index` of a palette for `count` things: neighbours differ in hue and lightness.
pub fn palette(index: usize, count: usize) -> String {
    let hue = 215.0 + 360.0 * index as f64 / count.max(1) as f64;
    let lightness = if index.is_multiple_of(2) { 52 } else { 66 };
    format!("hsl({:.0} 62% {lightness}%)", hue % 360.0)
}

/// Lines over a common x axis.
pub fn line_chart(x_label: &str, series: &[Series], from_zero: bool) -> String {
    let points = || series.iter().flat_map(|s| &s.points);
    if points().next().is_none() {
        return empty_chart();
    }
    let (x_min, x_max) = bounds(points().map(|p| p.0));
    let (mut y_min, mut y_max) = bounds(points().map(|p| p.1));
    if from_zero {
        y_min = y_min.min(0.0);
    }
    if y_max - y_min < 1e-12 {
        y_max += if y_max == 0.0 { 1.0 } else { 0.1 * y_max.abs() };
    }
    let frame = Frame {
        x_min,
        x_max,
        y_min,
        y_max: y_max + (y_max - y_min) * 0.04,
    };
    let mut svg = frame.open(x_label);
    for line in series {
        let path = polyline(&frame, &thin(&line.points));
        let (width, opacity) = if line.faint { (1.0, 0.3) } else { (1.8, 1.0) };
        let _ = write!(
            svg,
            "<polyline points=\"{path}\" fill=\"none\" stroke=\"{}\" stroke-width=\"{width}\" \
             opacity=\"{opacity}\" stroke-linejoin=\"round\"/>",
            line.color
        );
        if line.dots {
            for &(x, y) in &thin(&line.points) {
                let _ = write!(
                    svg,
                    "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"2.6\" fill=\"{}\">\
                     <title>{}: {} at {}</title></circle>",
                    frame.x(x),
                    frame.y(y),
                    line.color,
                    escape(&line.name),
                    number(y),
                    number(x)
                );
            }
        }
    }
    svg.push_str("</svg>");
    let entries: Vec<_> = series
        .iter()
        .filter(|s| !s.faint)
        .map(|s| (s.name.clone(), s.color.clone()))
        .collect();
    svg + &legend(&entries)
}

/// The text with HTML's special characters spelled out.
pub fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

/// A number in as few characters as tell it.
pub fn number(value: f64) -> String {
    let magnitude = value.abs();
    if value == 0.0 {
        "0".to_owned()
    } else if !(1e-3..1e6).contains(&magnitude) {
        format!("{value:.1e}")
    } else if magnitude >= 100.0 {
        format!("{value:.0}")
    } else {
        let text = format!("{value:.4}");
        text.trim_end_matches('0').trim_end_matches('.').to_owned()
    }
}

struct Frame {
    x_min: f64,
    x_max: f64,
    y_min: f64,
    y_max: f64,
}

impl Frame {
    fn x(&self, x: f64) -> f64 {
        let span = (self.x_max - self.x_min).max(1e-12);
        LEFT + (x - self.x_min) / span * (WIDTH - LEFT - RIGHT)
    }

    fn y(&self, y: f64) -> f64 {
        let span = (self.y_max - self.y_min).max(1e-12);
        HEIGHT - BOTTOM - (y - self.y_min) / span * (HEIGHT - TOP - BOTTOM)
    }

    /// The opening tag, the axes and their labels.
    fn open(&self, x_label: &str) -> String {
        let mut svg = format!("<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\">");
        for tick in ticks(self.y_min, self.y_max, 5) {
            let y = self.y(tick);
            let _ = write!(
                svg,
                "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{}\" y1=\"{y:.1}\" y2=\"{y:.1}\"/>\
                 <text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
                WIDTH - RIGHT,
                LEFT - 6.0,
                y + 3.5,
                number(tick)
            );
        }
        for tick in ticks(self.x_min, self.x_max, 6) {
            let _ = write!(
                svg,
                "<text x=\"{:.1}\" y=\"{}\" text-anchor=\"middle\">{}</text>",
                self.x(tick),
                HEIGHT - BOTTOM + 14.0,
                number(tick)
            );
        }
        let _ = write!(
            svg,
            "<text class=\"label\" x=\"{}\" y=\"{}\" text-anchor=\"middle\">{}</text>",
            (LEFT + WIDTH - RIGHT) / 2.0,
            HEIGHT - 4.0,
            escape(x_label)
        );
        svg
    }
}

fn polyline(frame: &Frame, points: &[(f64, f64)]) -> String {
    let mut path = String::new();
    for &(x, y) in points {
        let _ = write!(path, "{:.1},{:.1} ", frame.x(x), frame.y(y));
    }
    path.truncate(path.trim_end().len());
    path
}

fn legend(entries: &[(String, String)]) -> String {
    let mut html = String::from("<p class=\"legend\">");
    for (name, color) in entries {
        let _ = write!(
            html,
            "<span><i style=\"background:{color}\"></i>{}</span>",
            escape(name)
        );
    }
    html + "</p>"
}

pub(super) fn empty_chart() -> String {
    "<p class=\"empty\">nothing recorded yet</p>".to_owned()
}

fn bounds(values: impl Iterator<Item = f64>) -> (f64, f64) {
    values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| {
        (low.min(value), high.max(value))
    })
}

/// About `count` round numbers within `low..=high`.
pub(super) fn ticks(low: f64, high: f64, count: usize) -> Vec<f64> {
    let span = high - low;
    if span.is_nan() || span <= 0.0 || span.is_infinite() {
        return vec![low];
    }
    let raw = span / count as f64;
    let power = 10f64.powf(raw.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0]
        .into_iter()
        .map(|factor| factor * power)
        .find(|step| *step >= raw)
        .unwrap_or(10.0 * power);
    let first = (low / step).ceil() as i64;
    let last = (high / step).floor() as i64;
    (first..=last).map(|i| i as f64 * step).collect()
}

/// At most [`MAX_POINTS`] of the points, evenly spread, first and last kept.
fn thin<T: Clone>(points: &[T]) -> Vec<T> {
    if points.len() <= MAX_POINTS {
        return points.to_vec();
    }
    (0..MAX_POINTS)
        .map(|i| points[i * (points.len() - 1) / (MAX_POINTS - 1)].clone())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_inside() {
        assert_eq!(
            ticks(0.0, 1.0, 5),
            [0.0, 0.2, 0.4, 0.6000000000000001, 0.8, 1.0]
        );
        assert_eq!(ticks(0.0, 3900.0, 6), [0.0, 1000.0, 2000.0, 3000.0]);
        assert_eq!(ticks(2.0, 2.0, 5), [2.0]);
        assert_eq!(ticks(f64::NAN, 2.0, 5).len(), 1);
    }

    #[test]
    fn numbers_are_short() {
        for (value, text) in [
            (0.0, "0"),
            (1.25, "1.25"),
            (1e-5, "1.0e-5"),
            (1500.0, "1500"),
            (-0.5, "-0.5"),
        ] {
            assert_eq!(number(value), text);
        }
    }

    #[test]
    fn thinning_keeps_the_ends() {
        let points: Vec<usize> = (0..12_345).collect();
        let thinned = thin(&points);
        assert_eq!(thinned.len(), MAX_POINTS);
        assert_eq!((thinned[0], thinned[MAX_POINTS - 1]), (0, 12_344));
    }

    #[test]
    fn coordinates_stay_on_the_canvas() {
        let chart = line_chart(
            "step",
            &[Series::line(
                "a",
                "red",
                vec![(1.0, 5.0), (2.0, 5.0), (9.0, 5.0)],
            )],
            false,
        );
        let points = chart.split("points=\"").nth(1).unwrap();
        let points = points.split('"').next().unwrap();
        for pair in points.split(' ') {
            let (x, y) = pair.split_once(',').unwrap();
            assert!((0.0..=WIDTH).contains(&x.parse().unwrap()), "{pair}");
            assert!((0.0..=HEIGHT).contains(&y.parse().unwrap()), "{pair}");
        }
    }
}
