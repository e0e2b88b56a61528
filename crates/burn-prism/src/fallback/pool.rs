//! Block means.

use std::ops::Range;

use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, FloatDType};
use prism_core::BlockGrid;

use super::runs;
use super::tensor::Float;
use crate::ops::Side;

/// Block means of `x` `[batch, heads, length, head_dim]` in f32, `[batch, heads, blocks, head_dim]`;
/// 0 for blocks that a shorter sequence lacks.
pub fn pool<B: Backend>(x: FloatTensor<B>, grids: &[BlockGrid], side: Side) -> FloatTensor<B> {
    let x = Float::<B>(x);
    let device = x.device();
    let [batch, heads, _, d] = x.dims();
    let most = grids.iter().map(|grid| count(grid, side)).max();
    let most = most.unwrap_or(0);
    let parts = runs(grids)
        .map(|(sequences, grid)| {
            let dims = [sequences.len(), heads, most, d];
            let means = means(&x.clone().slice(0, sequences), &blocks(grid, side));
            Float::join(means, 2, dims, 0.0, &device)
        })
        .collect();
    Float::join(parts, 0, [batch, heads, most, d], 0.0, &device).0
}

/// Means over neighbouring ranges of tokens. Ranges of one length, that is, all but the first and
/// the last, take one op.
fn means<B: Backend>(x: &Float<B>, blocks: &[Range<usize>]) -> Vec<Float<B>> {
    let [batch, heads, _, d] = x.dims();
    blocks
        .chunk_by(|a, b| a.len() == b.len())
        .map(|even| {
            let (count, len) = (even.len(), even[0].len());
            x.clone()
                .slice(2, even[0].start..even[count - 1].end)
                .cast(FloatDType::F32)
                .reshape([batch, heads, count, len, d])
                .mean(3)
                .reshape([batch, heads, count, d])
        })
        .collect()
}

fn count(grid: &BlockGrid, side: Side) -> usize {
    match side {
        Side::Queries => grid.rows(),
        Side::Keys => grid.key_blocks(),
    }
}

fn blocks(grid: &BlockGrid, side: Side) -> Vec<Range<usize>> {
    (0..count(grid, side))
        .map(|block| match side {
            Side::Queries => grid.queries(block),
            Side::Keys => grid.keys(block),
        })
        .collect()
}
