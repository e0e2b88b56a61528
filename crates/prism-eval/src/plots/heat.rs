//! Values of a grid as colours.

use std::path::Path;

use plotters::prelude::*;

use super::draw;
use crate::error::Result;

/// A grid of values from 0 to 1.
#[derive(Debug, Clone, PartialEq)]
pub struct Heat {
    /// What the columns are.
    pub columns: Vec<String>,
    /// What the rows are, from the top.
    pub rows: Vec<String>,
    /// `[rows][columns]`.
    pub values: Vec<Vec<f64>>,
}

const CELL: (u32, u32) = (84, 34);
const MARGIN: (u32, u32) = (96, 96);

/// Draws a grid, red where a value is 0, green where it is 1, each with its number.
///
/// # Errors
/// A file that can't be written.
pub fn heat_map(path: &Path, caption: &str, [x, y]: [&str; 2], heat: &Heat) -> Result<()> {
    let (columns, rows) = (heat.columns.len() as u32, heat.rows.len() as u32);
    let size = ((2 * MARGIN.0 + CELL.0 * columns).max(480), 2 * MARGIN.1 + CELL.1 * rows);
    draw(path, size, |canvas| {
        let text = |words: &str, (x, y): (u32, u32), size: i32| {
            let style = ("sans-serif", size).into_font().color(&BLACK);
            canvas.draw(&Text::new(words.to_string(), (x as i32, y as i32), style))
        };
        text(caption, (12, 12), 17)?;
        text(x, (MARGIN.0, 44), 13)?;
        text(y, (12, 66), 13)?;
        for (column, name) in heat.columns.iter().enumerate() {
            text(name, (MARGIN.0 + CELL.0 * column as u32 + 8, 66), 13)?;
        }
        for (row, (name, values)) in heat.rows.iter().zip(&heat.values).enumerate() {
            let top = MARGIN.1 - 8 + CELL.1 * row as u32;
            text(name, (12, top + 9), 13)?;
            for (column, &value) in values.iter().enumerate() {
                let left = MARGIN.0 + CELL.0 * column as u32;
                let corner = |dx, dy| ((left + dx) as i32, (top + dy) as i32);
                let cell = [corner(0, 0), corner(CELL.0 - 2, CELL.1 - 2)];
                canvas.draw(&Rectangle::new(cell, shade(value).filled()))?;
                text(&format!("{value:.2}"), (left + 24, top + 9), 13)?;
            }
        }
        Ok(())
    })
}

/// From a light red over yellow to green.
fn shade(value: f64) -> RGBColor {
    let value = value.clamp(0.0, 1.0);
    let mix = |a: f64, b: f64, share: f64| (a + (b - a) * share) as u8;
    let of = |a: [f64; 3], b: [f64; 3], share: f64| {
        RGBColor(mix(a[0], b[0], share), mix(a[1], b[1], share), mix(a[2], b[2], share))
    };
    let (red, yellow, green) = ([226.0, 108.0, 90.0], [250.0, 224.0, 140.0], [116.0, 190.0, 122.0]);
    if value < 0.5 { of(red, yellow, 2.0 * value) } else { of(yellow, green, 2.0 * value - 1.0) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn has_every_cell_its_number_and_colour() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.svg");
        let heat = Heat {
            columns: vec!["4096".into(), "8192".into()],
            rows: vec!["0 %".into(), "50 %".into(), "100 %".into()],
            values: vec![vec![1.0, 0.25], vec![0.0, 1.0], vec![0.5, 0.75]],
        };
        heat_map(&path, "needle, dense", ["tokens", "depth"], &heat).unwrap();
        let svg = std::fs::read_to_string(&path).unwrap();
        for text in ["4096", "50 %", "0.25", "0.75", "needle, dense"] {
            assert!(svg.contains(text), "{text}");
        }
        // Six cells and the sheet.
        assert_eq!(svg.matches("<rect").count(), 7);
        assert_ne!(shade(0.0), shade(1.0));
    }
}
