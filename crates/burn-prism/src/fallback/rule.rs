//! The selection rule of [`prism_core::select`] for all rows of all heads at once, from block masses
//! or from blocks.

use std::ops::Range;

use burn::backend::Backend;
use burn::backend::tensor::{Device, IntTensor};
use prism_core::selection::WORD_BITS;
use prism_core::{BlockGrid, Budget, SelectionRule};

use super::choice::{By, Choice, RowSource};
use super::tensor::{Bool, Int};
use super::{TILE, runs, steps};

/// How masses become a selection.
pub struct Rule<'a> {
    pub grids: &'a [BlockGrid],
    pub rule: &'a SelectionRule,
    pub more_follows: bool,
    pub heads: usize,
}

impl Rule<'_> {
    /// Words `[batch, q_heads, rows, ceil(key_blocks / 32)]` and counts `[batch, q_heads, rows]`;
    /// `source_of` is asked once for each run of sequences on one grid.
    pub fn select<B: Backend, S: RowSource<B>>(
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
                    .map(|rows| pack(self.select_rows(grid, batch, rows, &source, device), width))
                    .unzip()
            };
            words.push(Int::join(some_words, 2, dims(batch, width), 0, device));
            counts.push(Int::join(some_counts, 2, dims(batch, 1), 0, device));
        }
        let batch = self.grids.len();
        let words = Int::join(words, 0, dims(batch, width), 0, device);
        let counts = Int::join(counts, 0, dims(batch, 1), 0, device);
        (words.0, counts.reshape([batch, self.heads, rows]).0)
    }

    /// What some rows say; `future` is as of [`RowSource::choose`]. A row may take more on the way than what
    /// comes of it, so the source is asked for a few at a time: the many steps from there to a selection are
    /// done for all of them at once.
    fn ask<B: Backend>(
        &self,
        grid: &BlockGrid,
        batch: usize,
        rows: Range<usize>,
        source: &impl RowSource<B>,
        future: &Bool<B>,
        device: &Device<B>,
    ) -> Choice<B> {
        let few = (TILE / source.row_elements()).max(1);
        if few >= rows.len() {
            return source.choose(rows, future);
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
        let dims = [batch, self.heads, rows.len(), grid.causal_blocks(rows.end - 1)];
        Choice::join(steps(rows.len(), few).map(part).collect(), dims, device)
    }

    /// The blocks that some rows read, `[batch, q_heads, rows, blocks]`; `blocks` are those that
    /// the last of the rows may read.
    fn select_rows<B: Backend>(
        &self,
        grid: &BlockGrid,
        batch: usize,
        rows: Range<usize>,
        source: &impl RowSource<B>,
        device: &Device<B>,
    ) -> Bool<B> {
        let rule = self.rule;
        let first = grid.first_block();
        let blocks = grid.causal_blocks(rows.end - 1);
        let number = |n: usize| Int::<B>::full([1, 1, 1, 1], saturate(n), device);
        let dims = [batch, self.heads, rows.len(), blocks];
        let v = Int::range(0..blocks, device).reshape([1, 1, 1, blocks]);
        let u = Int::range(rows.start + first..rows.end + first, device);
        let age = u.reshape([1, 1, rows.len(), 1]) - v.clone();
        let future = age.below(0);
        let sink = v.below(saturate(rule.sink_blocks));
        let recent = age.below(saturate(rule.recent_blocks));
        let forced = (sink | recent) & !future.clone();

        let one = Int::full(dims, 1, device);
        let mut selected = forced.clone().expand(dims);
        let mut best = Int::full(dims, -1, device);
        let choice = self.ask(grid, batch, rows.clone(), source, &future, device);
        let by_masses = matches!(choice, Choice::Masses(_, By::Budget | By::AfterForced(_)));
        match choice {
            Choice::Masses(bands, by) => {
                for masses in bands {
                    let kept = match (by, rule.budget, rule.target()) {
                        (By::Budget, Budget::TopK(k), _) => heaviest(&masses, &one, &number(k)),
                        (By::Budget, Budget::Mass(_), Some(mass)) => {
                            heaviest(&masses, &masses, &number(mass as usize))
                        }
                        (By::Budget, Budget::Mass(_), None) | (By::AfterForced(None), ..) => {
                            !future.clone()
                        }
                        (By::AfterForced(Some(target)), ..) => {
                            let held = masses.clone().fill(&!forced.clone().expand(dims), 0).sum(3);
                            let free = masses.clone().fill(&forced, -1);
                            heaviest(&free, &free, &(number(target as usize) - held))
                        }
                        (By::Above(least), ..) => !masses.below(saturate(least as usize)),
                    };
                    selected = selected | kept;
                    best = best.max(masses);
                }
            }
            Choice::Blocks(blocks) => {
                selected = selected | (blocks & !future.clone());
                // The nearest are the best.
                best = (one.clone() * v).fill(&future, -1);
            }
        }

        // By masses a row has at least one block.
        if rule.min_blocks > 1 || !by_masses && rule.min_blocks > 0 {
            let lacking = number(rule.min_blocks) - selected.clone().int().sum(3);
            let free = best.clone().fill(&selected, -1);
            selected = selected | heaviest(&free, &one, &lacking.at_least(0));
        }
        if let Some(max) = rule.max_blocks {
            let room = number(max) - forced.clone().int().sum(3);
            let chosen = best.fill(&(forced.clone() | !selected), -1);
            selected = forced | heaviest(&chosen, &one, &room.at_least(0));
        }
        if !by_masses {
            let none = selected.clone().int().sum(3).is(0);
            selected = selected | (none & age.is(0));
        }
        let dense = match self.more_follows {
            true => 0,
            false => rule.dense_last_blocks.min(grid.rows()),
        };
        let dense_from = grid.rows() - dense;
        if rows.end > dense_from {
            let count = rows.len();
            let row = Int::range(rows, device).reshape([1, 1, count, 1]);
            selected = selected | !(future | row.below(saturate(dense_from)));
        }
        selected
    }
}

/// The smallest prefix of the blocks, by (mass descending, index ascending), whose weights add up
/// to `target`; every block if they don't. Blocks of negative mass take no part.
pub fn heaviest<B: Backend>(masses: &Int<B>, weights: &Int<B>, target: &Int<B>) -> Bool<B> {
    let Edge { heavier, tied, tied_weights, missing } = edge(masses, weights, target);
    let before = tied_weights.clone().cumsum() - tied_weights;
    heavier | (tied & before.lt(&missing))
}

/// The largest prefix in the same order whose masses add up to at most `limit`.
pub fn heaviest_within<B: Backend>(masses: &Int<B>, limit: &Int<B>) -> Bool<B> {
    let Edge { heavier, tied, tied_weights, missing } = edge(masses, masses, limit);
    heavier | (tied & !tied_weights.cumsum().gt(&missing))
}

/// Where a prefix ends.
struct Edge<B: Backend> {
    /// Blocks before those of its lightest mass, which don't reach the target.
    heavier: Bool<B>,
    /// Blocks of its lightest mass.
    tied: Bool<B>,
    /// Their weights, 0 elsewhere.
    tied_weights: Int<B>,
    /// What is missing of the target before them.
    missing: Int<B>,
}

/// The lightest mass of the prefix is found bit by bit; of the blocks that have just this mass,
/// the first ones complete the prefix.
fn edge<B: Backend>(masses: &Int<B>, weights: &Int<B>, target: &Int<B>) -> Edge<B> {
    let [batch, heads, rows, _] = masses.dims();
    let mut lightest = Int::full([batch, heads, rows, 1], 0, &masses.device());
    for bit in (0..31).rev() {
        let next = lightest.clone() + (1 << bit);
        let above = weights.clone().fill(&masses.lt(&next), 0).sum(3);
        lightest = lightest + above.ge(target).int() * (1 << bit);
    }
    let (heavier, tied) = (masses.gt(&lightest), masses.eq(&lightest));
    let missing = target.clone() - weights.clone().fill(&!heavier.clone(), 0).sum(3);
    let tied_weights = weights.clone().fill(&!tied.clone(), 0);
    Edge { heavier, tied, tied_weights, missing }
}

/// Bits `[batch, heads, rows, blocks]` as words `[batch, heads, rows, width]` and counts
/// `[batch, heads, rows, 1]`.
fn pack<B: Backend>(selected: Bool<B>, width: usize) -> (Int<B>, Int<B>) {
    let device = selected.device();
    let [batch, heads, rows, _] = selected.dims();
    let ones = selected.int();
    let dims = [batch, heads, rows, width * WORD_BITS];
    let words = Int::join(vec![ones.clone()], 3, dims, 0, &device)
        .reshape([batch, heads, rows, width, WORD_BITS]);
    let bits = Int::bits(&device).reshape([1, 1, 1, 1, WORD_BITS]);
    let words = (words * bits).sum(4);
    (words.reshape([batch, heads, rows, width]), ones.sum(3))
}

fn saturate(n: usize) -> i32 {
    i32::try_from(n).unwrap_or(i32::MAX)
}
