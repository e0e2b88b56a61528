//! Results as SVG.

mod curves;
mod heat;

use std::path::Path;

use plotters::coord::Shift;
use plotters::prelude::*;

pub(crate) use curves::extend;
pub use curves::{Line, curves};
pub use heat::{Heat, heat_map};

use crate::error::{EvalError, Result};

type Canvas<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// Apart for every kind of eye, and on white.
const COLOURS: [RGBColor; 10] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
    RGBColor(0, 0, 0),
    RGBColor(136, 34, 85),
    RGBColor(153, 153, 51),
    RGBColor(127, 127, 127),
];

fn colour(index: usize) -> RGBColor {
    COLOURS[index % COLOURS.len()]
}

/// Draws on a white sheet of `size` pixels.
fn draw(
    path: &Path,
    size: (u32, u32),
    picture: impl FnOnce(&Canvas) -> Result<(), Box<dyn std::error::Error>>,
) -> Result<()> {
    let draw = || {
        let canvas = SVGBackend::new(path, size).into_drawing_area();
        canvas.fill(&WHITE)?;
        picture(&canvas)?;
        canvas.present()?;
        Ok(())
    };
    draw().map_err(|error: Box<dyn std::error::Error>| EvalError::Plot {
        path: path.to_path_buf(),
        reason: error.to_string(),
    })
}
