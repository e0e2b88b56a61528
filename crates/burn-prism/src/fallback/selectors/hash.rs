//! Shared buckets of block means (Reformer).

use std::ops::Range;

use burn::backend::Backend;
use prism_core::BlockGrid;
use prism_core::selectors::Lsh;

use crate::fallback::choice::{Choice, RowSource};
use crate::fallback::tensor::{Bool, Float, Int};

/// The heads of some sequences on one grid.
pub struct Buckets<B: Backend> {
    /// `[batch, q_heads, rows, rounds]`.
    q: Int<B>,
    /// `[batch, q_heads, rounds, key_blocks]`.
    k: Int<B>,
}

impl<B: Backend> Buckets<B> {
    /// From means of blocks.
    pub fn new(q: Float<B>, k: Float<B>, grid: &BlockGrid, options: &Lsh) -> Self {
        let device = q.device();
        let [_, heads, _, d] = q.dims::<4>();
        let [batch, kv_heads, ..] = k.dims::<4>();
        let (rounds, half) = (options.rounds, options.buckets / 2);
        let directions = Float::from_list(options.directions(d), &device)
            .reshape([1, 1, rounds * half, d])
            .transpose();
        let hash = |x: Float<B>| {
            let [batch, heads, blocks, _] = x.dims();
            let along = x
                .reshape([1, 1, batch * heads * blocks, d])
                .matmul(directions.clone())
                .reshape([batch, heads, blocks * rounds, half]);
            let opposite = along.clone() * -1.0;
            let dims = [batch, heads, blocks * rounds, 2 * half];
            let both = Float::join(vec![along, opposite], 3, dims, 0.0, &device);
            // The first of the largest; 0 where a NaN leaves none.
            let largest = (both.clone() - both.max(3)).eq(0.0).int();
            let first = largest.clone() * largest.clone().cumsum().is(1).int();
            let bucket = first * Int::range(0..2 * half, &device).reshape([1, 1, 1, 2 * half]);
            bucket.sum(3).reshape([batch, heads, blocks, rounds])
        };
        let q = hash(q.slice(2, 0..grid.rows()));
        let k = hash(k.slice(2, 0..grid.key_blocks()));
        let group = heads / kv_heads;
        let of_heads = Int::from_list((0..heads).map(|h| (h / group) as i32).collect(), &device);
        let k = Int::join(
            (0..rounds)
                .map(|round| {
                    let one = k.clone().slice(3, round..round + 1);
                    one.reshape([batch, kv_heads, 1, grid.key_blocks()])
                })
                .collect(),
            2,
            [batch, kv_heads, rounds, grid.key_blocks()],
            0,
            &device,
        );
        Self { q, k: k.select(1, of_heads) }
    }
}

impl<B: Backend> RowSource<B> for Buckets<B> {
    fn row_elements(&self) -> usize {
        let [batch, heads, _, blocks] = self.k.dims::<4>();
        batch * heads * blocks
    }

    fn choose(&self, rows: Range<usize>, future: &Bool<B>) -> Choice<B> {
        let [.., blocks] = future.dims::<4>();
        let rounds = self.k.dims::<4>()[2];
        let q = self.q.clone().slice(2, rows);
        let shared = |round: usize| {
            let k = self.k.clone().slice(2, round..round + 1).slice(3, 0..blocks);
            q.clone().slice(3, round..round + 1).eq(&k)
        };
        let first = shared(0);
        Choice::Blocks((1..rounds).fold(first, |any, round| any | shared(round)))
    }
}
