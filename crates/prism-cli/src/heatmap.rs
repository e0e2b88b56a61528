//! An SVG heat map of a selection: how many heads read each key block, for each query block.

use std::path::Path;

use anyhow::{Result, anyhow};
use burn_prism::{BlockGrid, BlockSelection};
use plotters::prelude::*;

/// Draws the first sequence of a selection.
pub fn write(
    path: &Path,
    selection: &BlockSelection,
    grids: &[BlockGrid],
    layer: usize,
) -> Result<()> {
    let [_, heads, rows, key_blocks] = selection.shape();
    let grid = grids.first().ok_or_else(|| anyhow!("the selection is empty"))?;
    let readers = |row: usize, v: usize| {
        (0..heads).filter(|&head| selection.contains(0, head, row, v)).count()
    };
    let failed = |error: &dyn std::fmt::Display| anyhow!("{error}");
    let root = SVGBackend::new(path, (720, 760)).into_drawing_area();
    root.fill(&WHITE).map_err(|e| failed(&e))?;
    let caption = format!(
        "layer {layer}: heads of {heads} that read a key block, density {:.3}",
        selection.density(grids)
    );
    let mut chart = ChartBuilder::on(&root)
        .caption(caption, ("sans-serif", 18))
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(50)
        .build_cartesian_2d(0..key_blocks as i32, (rows as i32)..0)
        .map_err(|e| failed(&e))?;
    chart
        .configure_mesh()
        .disable_mesh()
        .x_desc(format!("key block of {}", grid.block()))
        .y_desc("query block")
        .draw()
        .map_err(|e| failed(&e))?;
    let cells =
        (0..grid.rows()).flat_map(|row| (0..grid.causal_blocks(row)).map(move |v| (row, v)));
    chart
        .draw_series(cells.map(|(row, v)| {
            let share = readers(row, v) as f64 / heads as f64;
            let shade = |full: f64| (245.0 - share * (245.0 - full)) as u8;
            let (x, y) = (v as i32, row as i32);
            Rectangle::new(
                [(x, y), (x + 1, y + 1)],
                RGBColor(shade(8.0), shade(48.0), shade(107.0)).filled(),
            )
        }))
        .map_err(|e| failed(&e))?;
    root.present().map_err(|e| failed(&e))?;
    Ok(())
}
