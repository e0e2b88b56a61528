//! Block means and variances.

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
    reduce(&Float::<B>(x), grids, side, |tokens| tokens.mean(3)).0
}

/// Means and variances of the key blocks of `x`, each as [`pool`] returns means. Variances are
/// those of the population, each dim by itself.
pub fn pool_moments<B: Backend>(
    x: FloatTensor<B>,
    grids: &[BlockGrid],
) -> (FloatTensor<B>, FloatTensor<B>) {
    let x = Float::<B>(x);
    let means = reduce(&x, grids, Side::Keys, |tokens| tokens.mean(3));
    let variances = reduce(&x, grids, Side::Keys, |tokens| {
        let deviation = tokens.clone() - tokens.mean(3);
        (deviation.clone() * deviation).mean(3)
    });
    (means.0, variances.0)
}

/// Reduces the tokens of each block, `[batch, heads, blocks, tokens, head_dim]`, along dim 3.
fn reduce<B: Backend>(
    x: &Float<B>,
    grids: &[BlockGrid],
    side: Side,
    block: impl Fn(Float<B>) -> Float<B>,
) -> Float<B> {
    let device = x.device();
    let [batch, heads, _, d] = x.dims();
    let most = grids.iter().map(|grid| count(grid, side)).max();
    let most = most.unwrap_or(0);
    let parts = runs(grids)
        .map(|(sequences, grid)| {
            let dims = [sequences.len(), heads, most, d];
            let x = x.clone().slice(0, sequences);
            Float::join(reduce_ranges(&x, &blocks(grid, side), &block), 2, dims, 0.0, &device)
        })
        .collect();
    Float::join(parts, 0, [batch, heads, most, d], 0.0, &device)
}

/// Reduces neighbouring ranges of tokens. Ranges of one length, that is, all but the first and
/// the last, are reduced at once.
fn reduce_ranges<B: Backend>(
    x: &Float<B>,
    blocks: &[Range<usize>],
    block: impl Fn(Float<B>) -> Float<B>,
) -> Vec<Float<B>> {
    let [batch, heads, _, d] = x.dims();
    blocks
        .chunk_by(|a, b| a.len() == b.len())
        .map(|even| {
            let (count, len) = (even.len(), even[0].len());
            let tokens = x
                .clone()
                .slice(2, even[0].start..even[count - 1].end)
                .cast(FloatDType::F32)
                .reshape([batch, heads, count, len, d]);
            block(tokens).reshape([batch, heads, count, d])
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
