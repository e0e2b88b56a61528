//! Columns and diagonals of blocks, the same for all rows of a head.

use std::ops::Range;

use burn::backend::Backend;
use prism_core::BlockGrid;
use prism_core::masses::MASS_ONE;

use crate::fallback::choice::{Choice, RowSource};
use crate::fallback::tensor::{Bool, Float, Int};
use crate::ops::{Prefix, PrismBackend};

/// The heads of some sequences on one grid.
pub struct Lines<B: Backend> {
    /// 1 where key block v is a column, `[batch, q_heads, 1, key_blocks]`.
    pub columns: Int<B>,
    /// 1 where block distance u − v is a diagonal, `[batch, q_heads, 1, key_blocks]`.
    pub distances: Int<B>,
    /// More blocks of each row, `[batch, q_heads, rows, key_blocks]`.
    pub pairs: Option<Bool<B>>,
    pub first_block: usize,
}

impl<B: Backend> RowSource<B> for Lines<B> {
    fn row_elements(&self) -> usize {
        let [batch, heads, _, blocks] = self.columns.dims::<4>();
        batch * heads * blocks
    }

    fn choose(&self, rows: Range<usize>, future: &Bool<B>) -> Choice<B> {
        let device = self.columns.device();
        let [batch, heads, ..] = self.columns.dims::<4>();
        let [.., blocks] = future.dims::<4>();
        let count = rows.len();
        let own = rows.start + self.first_block..rows.end + self.first_block;
        let u = Int::range(own, &device).reshape([1, 1, count, 1]);
        let v = Int::range(0..blocks, &device).reshape([1, 1, 1, blocks]);
        let distance = (u - v).at_least(0).reshape([count * blocks]);
        let diagonal = self.distances.clone().select(3, distance);
        let diagonal = diagonal.reshape([batch, heads, count, blocks]).is(1);
        let column = self.columns.clone().slice(3, 0..blocks).is(1);
        let lines = column | diagonal;
        Choice::Blocks(match &self.pairs {
            None => lines,
            Some(pairs) => lines | pairs.clone().slice(2, rows).slice(3, 0..blocks),
        })
    }
}

/// Shares as integer masses.
pub fn masses<B: Backend>(shares: Float<B>) -> Int<B> {
    (shares * MASS_ONE as f32).round()
}

/// The heaviest of each head, `[batch, heads, 1, length]`, 1 for each of them.
pub fn heaviest<B: PrismBackend>(masses: Int<B>, limits: Int<B>, prefix: Prefix) -> Int<B> {
    Int(B::prism_heaviest(masses.0, limits.0, prefix))
}

/// The `count` largest of each head, the first `forced` before all others.
pub fn largest<B: PrismBackend>(masses: Int<B>, forced: usize, count: Int<B>) -> Int<B> {
    let device = masses.device();
    let [.., len] = masses.dims::<4>();
    let first = Int::range(0..len, &device).reshape([1, 1, 1, len]).below(forced as i32);
    // More than any share.
    heaviest(masses.fill(&first, MASS_ONE as i32 + 1), count, Prefix::Count)
}

/// Sums over runs of a block, `[batch, heads, 1, key_blocks]` of `[batch, heads, 1, kv_len]`.
pub fn by_block<B: Backend>(x: Float<B>, grid: &BlockGrid) -> Float<B> {
    let device = x.device();
    let [batch, heads, ..] = x.dims::<4>();
    let (blocks, block) = (grid.key_blocks(), grid.block());
    Float::join(vec![x], 3, [batch, heads, 1, blocks * block], 0.0, &device)
        .reshape([batch, heads, blocks, block])
        .sum(3)
        .reshape([batch, heads, 1, blocks])
}
