//! A run as two pictures: time against length, and what a sparse call spends its time on.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Result, anyhow};
use plotters::coord::Shift;
use plotters::prelude::*;

use super::table::{digits, tokens};
use super::{PARTS, Record, Run};

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

/// Time against length, both logarithmic, one line for each way of computing attention. Where
/// several densities were timed at a length, the lowest is drawn.
pub fn latency(path: &Path, run: &Run) -> Result<()> {
    let mut lines: BTreeMap<String, BTreeMap<usize, &Record>> = BTreeMap::new();
    for record in run.records.iter().filter(|record| record.is_attention()) {
        let what = if record.what == "dense" { "dense" } else { "sparse" };
        let by = format!("{what}, {}, {}, d={}", record.rung, record.dtype, record.head_dim);
        let name = if record.what == "prism" { format!("{by}, whole call") } else { by };
        let place = lines.entry(name).or_default().entry(record.kv_len).or_insert(record);
        if record.density < place.density {
            *place = record;
        }
    }
    let points = || lines.values().flatten();
    let (Some(shortest), Some(longest)) =
        (points().map(|(n, _)| *n).min(), points().map(|(n, _)| *n).max())
    else {
        return Ok(());
    };
    let fastest = points().map(|(_, record)| record.ms).fold(f64::MAX, f64::min);
    let slowest = points().map(|(_, record)| record.ms).fold(0.0, f64::max);
    draw(path, (960, 640), |canvas| {
        let caption = format!("attention on {}: milliseconds, sustained", run.gpu);
        let across = (shortest as f64 / 1.2)..(longest as f64 * 1.2);
        let mut chart = ChartBuilder::on(canvas)
            .caption(caption, ("sans-serif", 18))
            .margin(12)
            .x_label_area_size(40)
            .y_label_area_size(60)
            .build_cartesian_2d(
                across.log_scale().base(2.0),
                (fastest / 1.5..slowest * 1.5).log_scale(),
            )?;
        chart
            .configure_mesh()
            .light_line_style(WHITE)
            .x_desc("tokens")
            .y_desc("ms")
            .x_label_formatter(&|n| tokens(n.round() as usize))
            .y_label_formatter(&|ms| digits(*ms))
            .draw()?;
        for (index, (name, line)) in lines.iter().enumerate() {
            let colour = colour(index);
            let peer = line.values().any(|record| record.peer);
            let stroke = colour.stroke_width(if peer { 1 } else { 2 });
            let points: Vec<_> = line.iter().map(|(n, r)| (*n as f64, r.ms)).collect();
            chart
                .draw_series([PathElement::new(points.clone(), stroke)])?
                .label(format!("{name}{}", densities(line)))
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], stroke));
            chart.draw_series(points.into_iter().map(|p| Circle::new(p, 3, colour.filled())))?;
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperLeft)
            .background_style(WHITE.mix(0.85))
            .border_style(BLACK.mix(0.3))
            .draw()?;
        Ok(())
    })
}

/// The share of each of [`PARTS`], a bar for each shape, from the fastest record of each part;
/// shapes of which a part wasn't timed have none.
pub fn breakdown(path: &Path, run: &Run) -> Result<()> {
    let mut bars: BTreeMap<(usize, &str, usize), [f64; PARTS.len()]> = BTreeMap::new();
    for record in run.records.iter().filter(|record| !record.peer) {
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
    draw().map_err(|error: Box<dyn std::error::Error>| anyhow!("{}: {error}", path.display()))
}
