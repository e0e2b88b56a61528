//! Time against length.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Result;
use plotters::prelude::*;

use super::curves::{Axes, CHART, Line, SIZE, curves, extremes, names};
use super::draw;
use crate::report::{Record, Run, digits, tokens};

/// Time against length, both logarithmic, one line for each way of computing attention. Where
/// several densities were timed at a length, the lowest is drawn.
pub fn latency(path: &Path, run: &Run) -> Result<()> {
    let mut by: BTreeMap<String, BTreeMap<usize, &Record>> = BTreeMap::new();
    for record in run.records.iter().filter(|record| record.is_attention()) {
        let what = if record.what == "dense" { "dense" } else { "sparse" };
        let name = format!("{what}, {}, {}, d={}", record.rung, record.dtype, record.head_dim);
        let name = if record.what == "prism" { format!("{name}, whole call") } else { name };
        let place = by.entry(name).or_default().entry(record.kv_len).or_insert(record);
        if record.density < place.density {
            *place = record;
        }
    }
    let lines: Vec<Line> = (by.into_iter())
        .map(|(name, line)| Line {
            name: format!("{name}{}", densities(&line)),
            peer: line.values().any(|record| record.peer),
            points: line.iter().map(|(n, record)| (*n as f64, record.ms)).collect(),
        })
        .collect();
    let Some([(shortest, longest), (fastest, slowest)]) = extremes(&lines) else {
        return Ok(());
    };
    draw(path, SIZE, |canvas| {
        let (left, right) = canvas.split_horizontally(CHART);
        let mut chart = ChartBuilder::on(&left)
            .caption(
                format!("attention on {}: milliseconds, sustained", run.gpu),
                ("sans-serif", 18),
            )
            .margin(12)
            .x_label_area_size(40)
            .y_label_area_size(60)
            .build_cartesian_2d(
                (shortest / 1.2..longest * 1.2).log_scale().base(2.0),
                (fastest / 1.5..slowest * 1.5).log_scale(),
            )?;
        let axes = Axes {
            x: "tokens",
            y: "ms",
            x_label: &|n| tokens(n.round() as usize),
            y_label: &|ms| digits(*ms),
        };
        curves(&mut chart, &lines, &axes)?;
        names(&right, &lines)
    })
}

/// What a line's label says of the share it reads.
fn densities(line: &BTreeMap<usize, &Record>) -> String {
    let least = line.values().map(|record| record.density).fold(f64::INFINITY, f64::min);
    let most = line.values().map(|record| record.density).fold(0.0, f64::max);
    match (digits(least), digits(most)) {
        _ if least == 1.0 => String::new(),
        (least, most) if least == most => format!(", density {least}"),
        (least, most) => format!(", density {least}–{most}"),
    }
}
