//! What each head of each layer read of a prompt that came in chunks.

use std::ops::Range;

use anyhow::Result;
use prism_core::BlockGrid;
use prism_models::{LayerTrace, Llama};

use crate::output;

/// Selected over causal blocks of each layer and head.
///
/// `traces` hold every layer of the first chunk, then of the next; the chunks are the positions
/// `read`, `chunk` at a time, in blocks of `block`.
pub fn by_head(
    llama: &Llama,
    traces: &[LayerTrace],
    read: Range<usize>,
    chunk: usize,
    block: usize,
) -> Result<Vec<Vec<f64>>> {
    let (layers, heads) = (llama.config().layers, llama.config().q_heads);
    let mut selected = vec![vec![0.0; heads]; layers];
    let mut causal = 0.0;
    let ends = read.clone().step_by(chunk).map(|start| (start, (start + chunk).min(read.end)));
    for ((start, end), traces) in ends.zip(traces.chunks(layers)) {
        let pairs = BlockGrid::new(block, end - start, end)?.causal_pairs() as f64;
        causal += pairs;
        for (trace, selected) in traces.iter().zip(&mut selected) {
            let densities = match &trace.report.selected {
                Some(blocks) => blocks.density_by_head()?,
                None => vec![1.0; heads],
            };
            selected.iter_mut().zip(densities).for_each(|(sum, density)| *sum += density * pairs);
        }
    }
    let share = |sum: f64| sum / causal;
    Ok(selected.into_iter().map(|heads| heads.into_iter().map(share).collect()).collect())
}

/// Mean over layers and heads.
pub fn mean(by_head: &[Vec<f64>]) -> f64 {
    let all = by_head.iter().flatten();
    all.clone().sum::<f64>() / all.count().max(1) as f64
}

/// A row a layer: its mean, and every head.
pub fn table(by_head: &[Vec<f64>]) -> String {
    let mut table = output::table(&["layer", "density", "by head"]);
    for (layer, heads) in by_head.iter().enumerate() {
        let shown: Vec<String> = heads.iter().map(|density| format!("{density:.2}")).collect();
        let mean = heads.iter().sum::<f64>() / heads.len() as f64;
        table.add_row([layer.to_string(), format!("{mean:.3}"), shown.join(" ")]);
    }
    table.to_string()
}
