//! What is gained, against length, beside the published figures.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Result;
use plotters::prelude::*;

use super::curves::{Axes, CHART, Line, SIZE, curves, extremes, names};
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

/// How many times as long FlashAttention-3 takes, dense, against length, both logarithmic: our dense attention,
/// sparse attention and whole call, each on the fastest rung and at about the published density; the peers;
/// the published kernels. Nothing without that peer.
pub fn speedup(path: &Path, run: &Run) -> Result<()> {
    let lines = lines(run);
    let Some([(shortest, longest), (least, most)]) = extremes(&lines) else { return Ok(()) };
    draw(path, SIZE, |canvas| {
        let (left, right) = canvas.split_horizontally(CHART);
        let caption = format!("attention on {}: × FlashAttention-3, dense", run.gpu);
        let mut chart = ChartBuilder::on(&left)
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
        };
        curves(&mut chart, &lines, &axes)?;
        names(&right, &lines)
    })
}

fn lines(run: &Run) -> Vec<Line> {
    let mut by: BTreeMap<(bool, String), BTreeMap<usize, f64>> = BTreeMap::new();
    let published = |record: &&Record| {
        let heads = [record.q_heads, record.kv_heads, record.head_dim];
        heads == [32, 8, 128] && record.dtype == "bf16" && record.rung != FLASH_ATTENTION_3
    };
    for record in run.records.iter().filter(published).filter(|record| is_nearest(run, record)) {
        let Some(times) = run.ratio(record, FLASH_ATTENTION_3) else { continue };
        let mut put = |what: &str, times: f64| {
            let by_whom = if record.peer { &record.rung } else { "ours" };
            let line = by.entry((record.peer, format!("{by_whom}, {what}"))).or_default();
            let place = line.entry(record.kv_len).or_insert(times);
            *place = place.max(times);
        };
        put(&record.what, times);
        if record.what == "attend"
            && let Some(whole) = run.whole(record)
        {
            put("whole call", times * record.ms / whole.ms);
        }
    }
    if by.is_empty() {
        return Vec::new();
    }
    let known = PUBLISHED.map(|Published { tokens, dense, estimation, sparse }| {
        (tokens as f64, [dense / sparse, dense / (estimation + sparse)])
    });
    let ours = by.into_iter().map(|((peer, name), line)| Line {
        name,
        peer,
        points: line.into_iter().map(|(tokens, times)| (tokens as f64, times)).collect(),
    });
    let theirs = ["published, attend", "published, whole call"].into_iter().enumerate();
    let theirs = theirs.map(|(which, name)| Line {
        name: name.into(),
        peer: true,
        points: known.iter().map(|(tokens, times)| (*tokens, times[which])).collect(),
    });
    ours.chain(theirs).collect()
}

/// Whether a record is dense, or no other of its length lies nearer to the published density.
fn is_nearest(run: &Run, record: &Record) -> bool {
    let off = |record: &Record| (record.density - DENSITY).abs();
    let rivals = run.records.iter().filter(|rival| rival.what == record.what);
    record.density == 1.0
        || rivals.filter(|rival| rival.same_shape(record)).all(|rival| off(record) <= off(rival))
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
        let named: Vec<_> = lines.iter().map(|line| line.name.as_str()).collect();
        assert_eq!(named, ["ours, attend", "published, attend", "published, whole call"]);
        assert_eq!(lines[0].points, [(32_768.0, 8.0)]);
        assert!((lines[1].points[4].1 - 3.9).abs() < 0.1);
    }
}
