//! What is gained, against length, beside the published figures.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Result;
use plotters::prelude::*;

use super::curves::{Axes, Line, curves, extremes};
use super::draw;
use crate::report::{FLASH_ATTENTION_3, Record, Run, digits, tokens};

/// The published kernels (Triton), and FlashAttention-3 dense in the same run: one H200, 32 query heads, 8 kv
/// heads, d=128, bf16.
struct Published {
    tokens: usize,
    /// Milliseconds of FlashAttention-3.
    dense: f64,
    /// Milliseconds of finding the blocks; repeating K and V, which it does too, isn't counted.
    estimation: f64,
    /// Milliseconds of attention over them.
    sparse: f64,
}

const PUBLISHED: [Published; 5] = [
    Published { tokens: 8192, dense: 0.918, estimation: 0.766, sparse: 0.487 },
    Published { tokens: 16_384, dense: 3.02, estimation: 1.22, sparse: 0.905 },
    Published { tokens: 32_768, dense: 12.8, estimation: 1.11, sparse: 3.91 },
    Published { tokens: 65_536, dense: 51.8, estimation: 1.56, sparse: 14.1 },
    Published { tokens: 131_072, dense: 213.0, estimation: 3.27, sparse: 54.4 },
];
/// The share of the blocks that they read, about.
const DENSITY: f64 = 0.105;

/// How many times as long FlashAttention-3 takes, dense, against length, both logarithmic: our attention and
/// our whole call at about the published density, and the published ones. Nothing without that peer.
pub fn speedup(path: &Path, run: &Run) -> Result<()> {
    let lines = lines(run);
    let Some([(shortest, longest), (least, most)]) = extremes(&lines) else { return Ok(()) };
    draw(path, (960, 640), |canvas| {
        let caption = format!("attention on {}: × FlashAttention-3, dense", run.gpu);
        let mut chart = ChartBuilder::on(canvas)
            .caption(caption, ("sans-serif", 18))
            .margin(12)
            .x_label_area_size(40)
            .y_label_area_size(60)
            .build_cartesian_2d(
                (shortest / 1.2..longest * 1.2).log_scale().base(2.0),
                (least.min(1.0) / 1.2..most * 1.5).log_scale().base(2.0),
            )?;
        let axes = Axes {
            x: "tokens",
            y: "×",
            x_label: &|n| tokens(n.round() as usize),
            y_label: &|times| digits(*times),
            names: SeriesLabelPosition::UpperLeft,
        };
        curves(&mut chart, &lines, &axes)
    })
}

fn lines(run: &Run) -> Vec<Line> {
    let mut by: BTreeMap<String, BTreeMap<usize, &Record>> = BTreeMap::new();
    let published = |record: &&Record| {
        let heads = [record.q_heads, record.kv_heads, record.head_dim];
        heads == [32, 8, 128] && record.dtype == "bf16" && record.is_attention()
    };
    let compared = |record: &&Record| run.ratio(record, FLASH_ATTENTION_3).is_some();
    for record in run.records.iter().filter(published).filter(compared) {
        if record.rung == FLASH_ATTENTION_3 {
            continue;
        }
        let name = format!("{}, {}", record.rung, record.what);
        let place = by.entry(name).or_default().entry(record.kv_len).or_insert(record);
        if (record.density - DENSITY).abs() < (place.density - DENSITY).abs() {
            *place = record;
        }
    }
    let mut lines = Vec::new();
    for (name, records) in by {
        let times = |record: &Record, ms: f64| {
            let dense = run.ratio(record, FLASH_ATTENTION_3)? * record.ms;
            Some((record.kv_len as f64, dense / ms))
        };
        let points = records.values().filter_map(|record| times(record, record.ms)).collect();
        let peer = records.values().any(|record| record.peer);
        // The same with what finds the blocks, where that was timed.
        let whole: Vec<_> = (records.values())
            .filter(|record| record.what == "attend")
            .filter_map(|record| {
                let parts = run.whole(record)?.parts;
                let finding = parts[..parts.len() - 1].iter().sum::<f64>();
                times(record, finding + record.ms)
            })
            .collect();
        let whole_name = format!("{name}, whole call");
        lines.push(Line { name, peer, points });
        if !whole.is_empty() {
            lines.push(Line { name: whole_name, peer, points: whole });
        }
    }
    if !lines.is_empty() {
        for (name, with_estimation) in
            [("published, attend", false), ("published, whole call", true)]
        {
            let points = PUBLISHED.map(|Published { tokens, dense, estimation, sparse }| {
                let ms = if with_estimation { estimation + sparse } else { sparse };
                (tokens as f64, dense / ms)
            });
            lines.push(Line { name: name.into(), peer: true, points: points.to_vec() });
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::tests::{record, run};

    #[test]
    fn published_figures_stand_beside_compared_ones_only() {
        let ours = record("attend", "hopper", 32_768, 1.5);
        assert!(lines(&run(vec![ours.clone()])).is_empty());
        let peer = record("dense", FLASH_ATTENTION_3, 32_768, 12.0);
        let lines = lines(&run(vec![peer, ours]));
        let names: Vec<_> = lines.iter().map(|line| line.name.as_str()).collect();
        assert_eq!(names, ["hopper, attend", "published, attend", "published, whole call"]);
        assert_eq!(lines[0].points, [(32_768.0, 8.0)]);
        assert!((lines[1].points[4].1 - 3.9).abs() < 0.1);
    }
}
