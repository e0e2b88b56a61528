//! Lines of points, with their names.

use std::path::Path;

use plotters::prelude::*;

use super::{colour, draw};
use crate::error::Result;

/// A named line.
#[derive(Debug, Clone, PartialEq)]
pub struct Line {
    /// Its name.
    pub name: String,
    /// In the order they are joined; those that aren't finite are left out.
    pub points: Vec<(f64, f64)>,
}

/// Appends a point to the line of a name, which may be new.
pub fn extend(lines: &mut Vec<Line>, name: &str, point: (f64, f64)) {
    match lines.iter_mut().find(|line| line.name == name) {
        Some(line) => line.points.push(point),
        None => lines.push(Line { name: name.into(), points: vec![point] }),
    }
}

const CHART: u32 = 760;
const NAMES: u32 = 340;

/// Draws lines with names beside them; nothing without a point.
///
/// # Errors
/// A file that can't be written.
pub fn curves(path: &Path, caption: &str, [x, y]: [&str; 2], lines: &[Line]) -> Result<()> {
    let finite = |line: &Line| -> Vec<(f64, f64)> {
        line.points.iter().copied().filter(|(x, y)| x.is_finite() && y.is_finite()).collect()
    };
    let drawn: Vec<_> = lines.iter().map(finite).collect();
    let all: Vec<_> = drawn.iter().flatten().collect();
    if all.is_empty() {
        return Ok(());
    }
    let xs = extent(all.iter().map(|point| point.0));
    let ys = extent(all.iter().map(|point| point.1));
    let height = 560.max(80 + 18 * lines.len() as u32);
    draw(path, (CHART + NAMES, height), |canvas| {
        let (left, right) = canvas.split_horizontally(CHART);
        let mut chart = ChartBuilder::on(&left)
            .caption(caption, ("sans-serif", 17))
            .margin(12)
            .x_label_area_size(40)
            .y_label_area_size(64)
            .build_cartesian_2d(xs.0..xs.1, ys.0..ys.1)?;
        chart.configure_mesh().light_line_style(WHITE).x_desc(x).y_desc(y).draw()?;
        for (index, points) in drawn.iter().enumerate() {
            let stroke = colour(index).stroke_width(2);
            chart.draw_series([PathElement::new(points.clone(), stroke)])?;
            let dots = points.iter().map(|&point| Circle::new(point, 3, colour(index).filled()));
            chart.draw_series(dots)?;
        }
        for (index, line) in lines.iter().enumerate() {
            let y = 48 + 18 * index as i32;
            right.draw(&PathElement::new([(4, y), (24, y)], colour(index).stroke_width(2)))?;
            right.draw(&Text::new(line.name.as_str(), (32, y - 6), ("sans-serif", 12)))?;
        }
        Ok(())
    })
}

/// Smallest and largest, with some room.
fn extent(values: impl Iterator<Item = f64> + Clone) -> (f64, f64) {
    let least = values.clone().fold(f64::INFINITY, f64::min);
    let most = values.fold(f64::NEG_INFINITY, f64::max);
    let room = ((most - least) * 0.04).max(1e-6);
    (least - room, most + room)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_every_line_named_and_nothing_drawn_of_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.svg");
        let line =
            |name: &str, points: &[(f64, f64)]| Line { name: name.into(), points: points.to_vec() };
        curves(&path, "empty", ["x", "y"], &[line("none", &[(f64::NAN, 1.0)])]).unwrap();
        assert!(!path.exists());
        let lines = [line("first", &[(0.1, 0.5), (0.2, 0.3)]), line("second", &[(0.1, 0.4)])];
        curves(&path, "loss", ["density", "nats"], &lines).unwrap();
        let svg = std::fs::read_to_string(&path).unwrap();
        for text in ["first", "second", "density", "nats", "loss"] {
            assert!(svg.contains(text), "{text}");
        }
        assert!(curves(Path::new("/no/such/folder/a.svg"), "", ["", ""], &lines).is_err());
    }
}
