//! Asks a method for runs of rows, lets the backend choose by what it says, and joins the results.

use std::ops::Range;

use burn::backend::Backend;
use burn::backend::tensor::{Device, IntTensor};
use prism_core::selection::WORD_BITS;
use prism_core::{BlockGrid, SelectionRule};

use super::choice::{Choice, Masses, RowSource};
use super::tensor::{Bool, Int};
use super::{TILE, runs, steps};
use crate::ops::{ChooseParams, PrismBackend};

/// How what is said becomes a selection.
pub struct Rule<'a> {
    pub grids: &'a [BlockGrid],
    pub rule: &'a SelectionRule,
    pub more_follows: bool,
    pub heads: usize,
}

impl Rule<'_> {
    /// Words `[batch, q_heads, rows, ceil(key_blocks / 32)]` and counts `[batch, q_heads, rows]`;
    /// `source_of` is asked once for each run of sequences on one grid.
    pub fn select<B: PrismBackend, S: RowSource<B>>(
        &self,
        device: &Device<B>,
        source_of: impl Fn(Range<usize>, &BlockGrid) -> S,
    ) -> (IntTensor<B>, IntTensor<B>) {
        let (rows, key_blocks) = prism_core::selection::extent(self.grids);
        let width = key_blocks.div_ceil(WORD_BITS);
        let dims = |batch, last| [batch, self.heads, rows, last];
        let (mut words, mut counts) = (Vec::new(), Vec::new());
        for (sequences, grid) in runs(self.grids) {
            let batch = sequences.len();
            let (some_words, some_counts) = if grid.rows() == 0 {
                (Vec::new(), Vec::new())
            } else {
                let source = source_of(sequences, grid);
                steps(grid.rows(), (TILE / (batch * self.heads * grid.key_blocks())).max(1))
                    .map(|rows| {
                        let Masses { masses, bands, by } =
                            self.ask(grid, batch, rows.clone(), &source, device);
                        let (rule, more_follows) = (*self.rule, self.more_follows);
                        let params =
                            ChooseParams::new(*grid, rows, bands, by, rule, more_follows, width);
                        let (words, counts) = B::prism_choose(masses.0, params);
                        (Int(words), Int(counts))
                    })
                    .unzip()
            };
            words.push(Int::<B>::join(some_words, 2, dims(batch, width), 0, device));
            counts.push(Int::<B>::join(some_counts, 2, dims(batch, 1), 0, device));
        }
        let batch = self.grids.len();
        let words = Int::join(words, 0, dims(batch, width), 0, device);
        let counts = Int::join(counts, 0, dims(batch, 1), 0, device);
        (words.0, counts.reshape([batch, self.heads, rows]).0)
    }

    /// What some rows say. A row may take more on the way than what comes of it, so the source is asked for a
    /// few at a time: the many steps from there to a selection are done for all of them at once.
    fn ask<B: Backend>(
        &self,
        grid: &BlockGrid,
        batch: usize,
        rows: Range<usize>,
        source: &impl RowSource<B>,
        device: &Device<B>,
    ) -> Masses<B> {
        let blocks = grid.causal_blocks(rows.end - 1);
        let dims = [batch, self.heads, rows.len(), blocks];
        let future = future::<B>(grid, &rows, device);
        let few = (TILE / source.row_elements()).max(1);
        if few >= rows.len() {
            return source.choose(rows, &future).masses(dims, &future);
        }
        let part = |some: Range<usize>| {
            let own = some.start + rows.start..some.end + rows.start;
            let blocks = grid.causal_blocks(own.end - 1);
            let dims = [batch, self.heads, some.len(), blocks];
            match source.choose(own, &future.clone().slice(2, some).slice(3, 0..blocks)) {
                Choice::Blocks(blocks) => Choice::Blocks(blocks.expand(dims)),
                masses => masses,
            }
        };
        let all = Choice::join(steps(rows.len(), few).map(part).collect(), dims, device);
        all.masses(dims, &future)
    }
}

/// Blocks after each of some rows, `[1, 1, rows, blocks]`, as far as the last of them reads.
pub fn future<B: Backend>(grid: &BlockGrid, rows: &Range<usize>, device: &Device<B>) -> Bool<B> {
    let (first, blocks) = (grid.first_block(), grid.causal_blocks(rows.end - 1));
    let v = Int::<B>::range(0..blocks, device).reshape([1, 1, 1, blocks]);
    let u = Int::range(rows.start + first..rows.end + first, device);
    (u.reshape([1, 1, rows.len(), 1]) - v).below(0)
}
