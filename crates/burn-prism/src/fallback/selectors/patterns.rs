//! Patterns that look at no tensor.

use std::ops::Range;

use burn::backend::Backend;
use burn::backend::tensor::Device;
use prism_core::BlockGrid;
use prism_core::selectors::{Dilated, Streaming};

use crate::fallback::choice::{Choice, RowSource};
use crate::fallback::tensor::{Bool, Int};

/// First tokens and a window.
pub struct Windows<B: Backend> {
    /// Key blocks below this are read by every row.
    sinks: i32,
    /// Of each row the first block of its window, 0 for rows that read everything.
    first: Vec<i32>,
    device: Device<B>,
}

impl<B: Backend> Windows<B> {
    pub fn new(options: &Streaming, grid: &BlockGrid, device: &Device<B>) -> Self {
        let (sink, ..) = options.tokens();
        let first = |row| options.window_start(grid, row) as i32;
        Self {
            sinks: sink.div_ceil(grid.block()).min(grid.key_blocks()) as i32,
            first: (0..grid.rows()).map(first).collect(),
            device: device.clone(),
        }
    }
}

impl<B: Backend> RowSource<B> for Windows<B> {
    fn row_elements(&self) -> usize {
        self.first.len()
    }

    fn choose(&self, rows: Range<usize>, future: &Bool<B>) -> Choice<B> {
        let [.., blocks] = future.dims::<4>();
        let v = Int::<B>::range(0..blocks, &self.device).reshape([1, 1, 1, blocks]);
        let count = rows.len();
        let first = Int::from_list(self.first[rows].to_vec(), &self.device);
        Choice::Blocks(v.below(self.sinks) | v.ge(&first.reshape([1, 1, count, 1])))
    }
}

/// Segments and strides.
pub struct Segments<B: Backend> {
    /// Of each pair, the segment of a block `[key_blocks]` and whether a head keeps it
    /// `[1, q_heads, 1, key_blocks]`.
    pairs: Vec<(Vec<i32>, Int<B>)>,
    first_block: usize,
    heads: usize,
    device: Device<B>,
}

impl<B: Backend> Segments<B> {
    pub fn new(options: &Dilated, grid: &BlockGrid, heads: usize, device: &Device<B>) -> Self {
        let blocks = grid.key_blocks();
        let pair = |pair: usize| {
            let segment = |v| options.segment(grid.block(), pair, v) as i32;
            let kept = (0..heads)
                .flat_map(|h| (0..blocks).map(move |v| (h, v)))
                .map(|(h, v)| i32::from(options.keeps(grid.block(), pair, v, h)))
                .collect();
            let kept = Int::from_list(kept, device).reshape([1, heads, 1, blocks]);
            ((0..blocks).map(segment).collect(), kept)
        };
        Self {
            pairs: (0..options.segments.len()).map(pair).collect(),
            first_block: grid.first_block(),
            heads,
            device: device.clone(),
        }
    }
}

impl<B: Backend> RowSource<B> for Segments<B> {
    fn row_elements(&self) -> usize {
        self.heads * self.pairs.first().map_or(1, |(segments, _)| segments.len())
    }

    fn choose(&self, rows: Range<usize>, future: &Bool<B>) -> Choice<B> {
        let [.., blocks] = future.dims::<4>();
        let own = rows.start + self.first_block..rows.end + self.first_block;
        let list = |values: &[i32]| Int::<B>::from_list(values.to_vec(), &self.device);
        let mut read = !future.clone() & future.clone();
        for (segments, kept) in &self.pairs {
            let u = list(&segments[own.clone()]).reshape([1, 1, rows.len(), 1]);
            let v = list(&segments[..blocks]).reshape([1, 1, 1, blocks]);
            let row_kept = kept.clone().slice(3, own.clone());
            let row_kept = row_kept.reshape([1, self.heads, rows.len(), 1]);
            let both = row_kept * kept.clone().slice(3, 0..blocks);
            read = read | (u.eq(&v) & both.is(1));
        }
        Choice::Blocks(read)
    }
}
