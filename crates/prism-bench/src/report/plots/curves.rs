//! Lines of points on a chart, with their names.

use anyhow::Result;
use plotters::coord::ranged1d::{Ranged, ValueFormatter};
use plotters::prelude::*;

use super::{Canvas, colour};

/// A named line.
pub struct Line {
    pub name: String,
    /// Another's: drawn thin.
    pub peer: bool,
    /// In the order they are joined.
    pub points: Vec<(f64, f64)>,
}

/// What stands along the axes.
pub struct Axes<'a> {
    pub x: &'a str,
    pub y: &'a str,
    pub x_label: &'a dyn Fn(&f64) -> String,
    pub y_label: &'a dyn Fn(&f64) -> String,
}

/// Pixels of a picture: the chart's share of the width comes first, the names stand beside it.
pub const SIZE: (u32, u32) = (CHART + 300, 640);
/// Pixels of the chart's width.
pub const CHART: u32 = 900;

/// Smallest and largest of each coordinate; `None` without points.
pub fn extremes(lines: &[Line]) -> Option<[(f64, f64); 2]> {
    let points = || lines.iter().flat_map(|line| &line.points);
    points().next()?;
    let of = |pick: fn(&(f64, f64)) -> f64| {
        let least = points().map(pick).fold(f64::INFINITY, f64::min);
        (least, points().map(pick).fold(f64::NEG_INFINITY, f64::max))
    };
    Some([of(|point| point.0), of(|point| point.1)])
}

/// Draws the axes and the lines.
pub fn curves<'a, X, Y>(
    chart: &mut ChartContext<'a, SVGBackend<'a>, Cartesian2d<X, Y>>,
    lines: &[Line],
    axes: &Axes,
) -> Result<(), Box<dyn std::error::Error>>
where
    X: Ranged<ValueType = f64> + ValueFormatter<f64>,
    Y: Ranged<ValueType = f64> + ValueFormatter<f64>,
{
    chart
        .configure_mesh()
        .light_line_style(WHITE)
        .x_desc(axes.x)
        .y_desc(axes.y)
        .x_label_formatter(axes.x_label)
        .y_label_formatter(axes.y_label)
        .draw()?;
    for (index, line) in lines.iter().enumerate() {
        let colour = colour(index);
        chart.draw_series([PathElement::new(line.points.clone(), line.stroke(index))])?;
        let dots = line.points.iter().map(|&point| Circle::new(point, 3, colour.filled()));
        chart.draw_series(dots)?;
    }
    Ok(())
}

/// Writes the names of lines under each other.
pub fn names(canvas: &Canvas, lines: &[Line]) -> Result<(), Box<dyn std::error::Error>> {
    for (index, line) in lines.iter().enumerate() {
        let y = 48 + 18 * index as i32;
        canvas.draw(&PathElement::new([(4, y), (24, y)], line.stroke(index)))?;
        canvas.draw(&Text::new(line.name.as_str(), (32, y - 6), ("sans-serif", 12)))?;
    }
    Ok(())
}

impl Line {
    fn stroke(&self, index: usize) -> ShapeStyle {
        colour(index).stroke_width(if self.peer { 1 } else { 2 })
    }
}
