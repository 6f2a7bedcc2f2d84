//! Curves as SVG.

use anyhow::{Result, anyhow};
use hexa_moe::parallel::Mode;
use plotters::prelude::*;

use crate::net::NetShape;
use crate::{crossover, heterogeneity};

const PANEL: (u32, u32) = (560, 400);
const COLORS: [RGBColor; 2] = [RGBColor(31, 119, 180), RGBColor(214, 39, 40)];

/// A line of points.
struct Curve {
    label: String,
    color: RGBColor,
    points: Vec<(f64, f64)>,
    /// Measurements are dots on a line, predictions a thin line.
    measured: bool,
}

/// One panel per shape: step time of both modes over the number of tokens.
pub fn crossover(rows: &[crossover::Row]) -> Result<String> {
    let panels = shapes(rows.iter().map(|row| row.shape))
        .into_iter()
        .map(|shape| {
            let rows: Vec<_> = rows.iter().filter(|row| row.shape == shape).collect();
            let mut curves = Vec::new();
            for (i, mode) in ["data-centric", "model-centric"].into_iter().enumerate() {
                for (measured, what) in [(true, "measured"), (false, "predicted")] {
                    let seconds = |row: &crossover::Row| match measured {
                        true => row.measured_s[i],
                        false => row.predicted_s[i],
                    };
                    curves.push(Curve {
                        label: format!("{mode}, {what}"),
                        color: COLORS[i],
                        points: rows
                            .iter()
                            .map(|r| (r.tokens as f64, 1e3 * seconds(r)))
                            .collect(),
                        measured,
                    });
                }
            }
            (title(shape), curves)
        });
    draw(&panels.collect::<Vec<_>>(), "tokens of all ranks")
}

/// One panel per shape: step time over the first rank's share, and the calibrated shares.
pub fn heterogeneity(rows: &[heterogeneity::Row]) -> Result<String> {
    let panels = shapes(rows.iter().map(|row| row.shape))
        .into_iter()
        .map(|shape| {
            let mut curves = Vec::new();
            for row in rows.iter().filter(|row| row.shape == shape) {
                let (color, shares) = match row.mode {
                    Mode::DataCentric => (COLORS[0], &row.plan.batch),
                    Mode::ModelCentric => (COLORS[1], &row.plan.layers[0].widths),
                };
                let mut points: Vec<_> = row.sweep.iter().map(|&(x, s)| (x, 1e3 * s)).collect();
                points.push((0.5, 1e3 * row.uniform.step_s));
                points.sort_by(|a, b| a.0.total_cmp(&b.0));
                let share = shares[0] as f64 / shares.iter().sum::<usize>() as f64;
                let calibrated = 1e3 * row.calibrated.step_s;
                curves.push(Curve {
                    label: row.mode.name().to_owned(),
                    color,
                    points,
                    measured: true,
                });
                curves.push(Curve {
                    label: format!("{}, calibrated share", row.mode.name()),
                    color,
                    points: vec![(share, 0.0), (share, calibrated)],
                    measured: false,
                });
            }
            (title(shape), curves)
        });
    draw(&panels.collect::<Vec<_>>(), "share of the first rank")
}

fn shapes(all: impl Iterator<Item = NetShape>) -> Vec<NetShape> {
    let mut shapes = Vec::new();
    for shape in all {
        if !shapes.contains(&shape) {
            shapes.push(shape);
        }
    }
    shapes
}

fn title(shape: NetShape) -> String {
    let NetShape {
        d_model,
        d_ff,
        num_experts,
        top_k,
        layers,
    } = shape;
    format!("{layers} layers of {num_experts} experts, {d_model} × {d_ff}, top-{top_k}")
}

/// Panels side by side; the vertical axis is the step time.
fn draw(panels: &[(String, Vec<Curve>)], x_label: &str) -> Result<String> {
    let mut svg = String::new();
    let failed = |error: &dyn std::fmt::Display| anyhow!("the plot failed: {error}");
    {
        let size = (PANEL.0 * panels.len() as u32, PANEL.1);
        let root = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        root.fill(&WHITE).map_err(|e| failed(&e))?;
        for (area, (title, curves)) in root.split_evenly((1, panels.len())).iter().zip(panels) {
            panel(area, title, curves, x_label).map_err(|e| failed(&e))?;
        }
        root.present().map_err(|e| failed(&e))?;
    }
    Ok(svg)
}

type Area<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;

fn panel(
    area: &Area,
    title: &str,
    curves: &[Curve],
    x_label: &str,
) -> Result<(), Box<dyn std::error::Error>> {
    let points = || curves.iter().flat_map(|curve| &curve.points);
    let left = points().map(|p| p.0).fold(f64::INFINITY, f64::min);
    let right = points().map(|p| p.0).fold(0.0, f64::max);
    let top = 1.1 * points().map(|p| p.1).fold(0.0, f64::max);
    let mut chart = ChartBuilder::on(area)
        .caption(title, ("sans-serif", 16))
        .margin(10)
        .x_label_area_size(40)
        .y_label_area_size(56)
        .build_cartesian_2d(left..right, 0.0..top)?;
    chart
        .configure_mesh()
        .x_desc(x_label)
        .y_desc("step time, ms")
        .x_label_formatter(&|x| {
            if *x < 10.0 {
                format!("{x:.1}")
            } else {
                format!("{x:.0}")
            }
        })
        .y_label_formatter(&|y| format!("{y:.0}"))
        .light_line_style(WHITE)
        .draw()?;
    for curve in curves {
        let style = curve.color.stroke_width(if curve.measured { 2 } else { 1 });
        let color = curve.color;
        chart
            .draw_series(LineSeries::new(curve.points.iter().copied(), style))?
            .label(&curve.label)
            .legend(move |(x, y)| PathElement::new(vec![(x, y), (x + 16, y)], style));
        if curve.measured {
            let dots = curve
                .points
                .iter()
                .map(|&p| Circle::new(p, 3, color.filled()));
            chart.draw_series(dots)?;
        }
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK.mix(0.3))
        .draw()?;
    Ok(())
}
