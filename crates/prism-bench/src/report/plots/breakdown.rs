//! What a sparse call spends its time on.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Result;
use plotters::prelude::*;

use super::{colour, draw};
use crate::report::{PARTS, Record, Run, SECOND_ORDER, digits, tokens};

/// The share of each of [`PARTS`], a bar for each shape, from the fastest record of each part;
/// shapes of which a part wasn't timed have none.
pub fn breakdown(path: &Path, run: &Run) -> Result<()> {
    let mut bars: BTreeMap<(usize, &str, usize), [f64; PARTS.len()]> = BTreeMap::new();
    let ours = |record: &&Record| !record.peer && record.rung != SECOND_ORDER;
    for record in run.records.iter().filter(ours) {
        let Some(part) = PARTS.iter().position(|&part| part == record.what) else { continue };
        let key = (record.head_dim, record.dtype.as_str(), record.kv_len);
        let bar = bars.entry(key).or_insert([f64::INFINITY; PARTS.len()]);
        bar[part] = bar[part].min(record.ms);
    }
    bars.retain(|_, bar| bar.iter().all(|ms| ms.is_finite()));
    if bars.is_empty() {
        return Ok(());
    }
    draw(path, (960, 480), |canvas| {
        // A bar's width is left free for the legend.
        let width = bars.len() as f64 + 1.0;
        let mut chart = ChartBuilder::on(canvas)
            .caption(format!("a sparse call on {}: share of its time", run.gpu), ("sans-serif", 18))
            .margin(12)
            .x_label_area_size(12)
            .y_label_area_size(60)
            .build_cartesian_2d(0.0..width, 0.0..118.0)?;
        chart
            .configure_mesh()
            .disable_mesh()
            .x_labels(0)
            .y_labels(6)
            .y_desc("%")
            .y_label_formatter(&|share| format!("{share:.0}"))
            .draw()?;
        for (part, name) in PARTS.into_iter().enumerate() {
            let colour = colour(part);
            let boxes = bars.values().enumerate().map(|(index, bar)| {
                let share =
                    |parts: &[f64]| 100.0 * parts.iter().sum::<f64>() / bar.iter().sum::<f64>();
                let (x, below) = (index as f64, share(&bar[..part]));
                let corners = [(x + 0.1, below), (x + 0.8, below + share(&bar[part..=part]))];
                Rectangle::new(corners, colour.filled())
            });
            chart.draw_series(boxes)?.label(name).legend(move |(x, y)| {
                Rectangle::new([(x, y - 5), (x + 12, y + 5)], colour.filled())
            });
        }
        for (index, ((head_dim, dtype, length), bar)) in bars.iter().enumerate() {
            let shape = format!("{}, d={head_dim}, {dtype}", tokens(*length));
            let total = format!("{} ms", digits(bar.iter().sum()));
            chart
                .draw_series([(shape, 112.0), (total, 106.0)].map(|(text, y)| {
                    Text::new(text, (index as f64 + 0.1, y), ("sans-serif", 11))
                }))?;
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::LowerRight)
            .border_style(BLACK.mix(0.3))
            .draw()?;
        Ok(())
    })
}
