//! Masses of blocks from scores of their sub-blocks.

use std::ops::Range;

use burn::backend::Backend;
use prism_core::second_order::SubBlocks;

use super::softmax::{masses, probabilities};
use super::tensor::{Bool, Float, Int};

/// Integer masses of some rows, `[batch, q_heads, rows, blocks]`, −1 where `future`: softmax of the
/// scores of each query sub-block over its causal key sub-blocks, summed over the key sub-blocks of a
/// block and averaged over the query sub-blocks of a row.
///
/// `scores` is asked for query sub-blocks and for a number of key sub-blocks:
/// `[batch, q_heads, query sub-blocks, key sub-blocks]`.
pub fn block_masses<B: Backend>(
    grid: &SubBlocks,
    rows: Range<usize>,
    future: &Bool<B>,
    scores: impl Fn(Range<usize>, usize) -> Float<B>,
) -> Int<B> {
    let [.., blocks] = future.dims::<4>();
    let per_block = grid.keys_per_block();
    let subs = grid.of_row(rows.start).start..grid.of_row(rows.end - 1).end;
    let (queries, keys) = (subs.len(), (blocks * per_block).min(grid.keys().key_blocks()));
    let scores = scores(subs.clone(), keys);
    let (device, [batch, heads, ..]) = (scores.device(), scores.dims::<4>());

    let causal = subs.clone().map(|a| grid.causal_keys(a) as i32).collect();
    let causal = Int::from_list(causal, &device).reshape([1, 1, queries, 1]);
    let unseen = Int::range(0..keys, &device).reshape([1, 1, 1, keys]).ge(&causal);
    let p = probabilities(scores, &unseen);
    let sums = by_row(grid, &rows, by_block(grid, p, blocks)).sum(2).reshape([
        batch,
        heads,
        rows.len(),
        blocks,
    ]);
    let counts = rows.clone().map(|row| grid.of_row(row).len() as f32).collect();
    let counts = Float::from_list(counts, &device).reshape([1, 1, rows.len(), 1]);
    masses(sums / counts, future)
}

/// Sums over the key sub-blocks of each block: from `[batch, q_heads, query sub-blocks, key sub-blocks]` to
/// `[batch, q_heads, query sub-blocks, blocks]`.
pub fn by_block<B: Backend>(grid: &SubBlocks, p: Float<B>, blocks: usize) -> Float<B> {
    let (per_block, device) = (grid.keys_per_block(), p.device());
    let [batch, heads, queries, _] = p.dims();
    let dims = [batch, heads, queries, blocks * per_block];
    Float::join(vec![p], 3, dims, 0.0, &device)
        .reshape([batch, heads, queries * blocks, per_block])
        .sum(3)
        .reshape([batch, heads, queries, blocks])
}

/// What the query sub-blocks of some rows say, `[batch, q_heads, query sub-blocks, blocks]`, row by row:
/// `[batch, q_heads · rows, query sub-blocks a row, blocks]`. A chunk may start and end within a row: there
/// stand zeros.
pub fn by_row<B: Backend>(grid: &SubBlocks, rows: &Range<usize>, p: Float<B>) -> Float<B> {
    let (per_row, device) = (grid.queries_per_block(), p.device());
    let [batch, heads, _, blocks] = p.dims();
    let before = (grid.queries().first_block() + grid.of_row(rows.start).start) % per_row;
    let mut parts = vec![p];
    if before > 0 {
        parts.insert(0, Float::full([batch, heads, before, blocks], 0.0, &device));
    }
    Float::join(parts, 2, [batch, heads, rows.len() * per_row, blocks], 0.0, &device).reshape([
        batch,
        heads * rows.len(),
        per_row,
        blocks,
    ])
}
