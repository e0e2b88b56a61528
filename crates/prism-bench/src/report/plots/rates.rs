//! What is left of the arithmetic rate where little is read.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Result;
use plotters::prelude::*;

use super::curves::{Axes, CHART, Line, SIZE, curves, extremes, names};
use super::draw;
use crate::report::{FLASH_ATTENTION_3, Record, Run, digits, tokens};

/// TFLOP/s against density, one line for each of our rungs and shapes of which sparse attention was timed, and
/// FlashAttention-3; blocks that aren't read don't count. Dense attention is density 1.
pub fn rates(path: &Path, run: &Run) -> Result<()> {
    let mut by: BTreeMap<(bool, String), Vec<(f64, f64)>> = BTreeMap::new();
    let shown = |record: &&Record| {
        record.is_attention() && (!record.peer || record.rung == FLASH_ATTENTION_3)
    };
    for record in run.records.iter().filter(shown) {
        if let Some(rate) = record.tflops {
            let (length, dim) = (tokens(record.kv_len), record.head_dim);
            let name = format!("{}, {length}, d={dim}, {}", record.rung, record.dtype);
            by.entry((record.peer, name)).or_default().push((record.density, rate));
        }
    }
    by.retain(|(peer, _), points| *peer || points.iter().any(|&(density, _)| density < 1.0));
    // Without a sparse call there is nothing to see.
    if by.keys().all(|(peer, _)| *peer) {
        return Ok(());
    }
    let lines: Vec<Line> = (by.into_iter())
        .map(|((peer, name), mut points)| {
            points.sort_by(|a, b| a.0.total_cmp(&b.0));
            Line { name, peer, points }
        })
        .collect();
    let Some([(sparsest, _), (_, fastest)]) = extremes(&lines) else { return Ok(()) };
    draw(path, SIZE, |canvas| {
        let (left, right) = canvas.split_horizontally(CHART);
        let caption = format!("attention on {}: TFLOP/s of the blocks read, sustained", run.gpu);
        let mut chart = ChartBuilder::on(&left)
            .caption(caption, ("sans-serif", 18))
            .margin(12)
            .x_label_area_size(40)
            .y_label_area_size(60)
            .build_cartesian_2d((sparsest / 1.2..1.2).log_scale().base(2.0), 0.0..fastest * 1.1)?;
        let axes = Axes {
            x: "density",
            y: "TFLOP/s",
            x_label: &|density| digits(*density),
            y_label: &|rate| digits(*rate),
        };
        curves(&mut chart, &lines, &axes)?;
        names(&right, &lines)
    })
}
