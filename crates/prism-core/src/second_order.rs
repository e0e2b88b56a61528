//! Second-order block scores: means of sub-blocks, and how far keys scatter around theirs.
//!
//! A query q that meets a Gaussian cloud of keys with mean k̄ and variance σ² in each dim finds
//! exp(q·k/√d) = exp(q·k̄/√d + ½ Σ_c q_c² σ_c² / d) on average. So a block is worth more than its
//! mean says where its keys scatter along what the query looks for, and sub-blocks keep what a
//! mean over a whole block would cancel. For query sub-block a and key sub-block b:
//!
//! score(a, b) = s · (q̄_a · k̄_b) + ½ s² Σ_c q̄_a\[c\]² var_b\[c\], s = 1/√head_dim.
//!
//! Softmax over the causal key sub-blocks of each query sub-block, in integer masses
//! ([`crate::masses`]); the mass of a key block for a row is the sum over the key sub-blocks of the
//! block, averaged over the query sub-blocks of the row. Sub-blocks of RoPE'd keys are short enough
//! to need neither bands nor temperatures.

use std::ops::Range;

use crate::grid::BlockGrid;
use crate::masses::integer_masses;

/// Sub-blocks of one sequence: query and key sub-blocks on the grid of its blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SubBlocks {
    blocks: BlockGrid,
    queries: BlockGrid,
    keys: BlockGrid,
}

impl SubBlocks {
    /// Divides the blocks of a grid into query sub-blocks of `query_sub` and key sub-blocks of
    /// `key_sub` positions, which [`Scoring::validate`](crate::Scoring::validate) has checked.
    pub fn new(blocks: BlockGrid, query_sub: usize, key_sub: usize) -> Self {
        Self { blocks, queries: blocks.subdivided(query_sub), keys: blocks.subdivided(key_sub) }
    }

    /// The grid of the blocks.
    pub fn blocks(&self) -> &BlockGrid {
        &self.blocks
    }

    /// The grid of the query sub-blocks: its rows.
    pub fn queries(&self) -> &BlockGrid {
        &self.queries
    }

    /// The grid of the key sub-blocks: its key blocks.
    pub fn keys(&self) -> &BlockGrid {
        &self.keys
    }

    /// Query sub-blocks a block.
    pub fn queries_per_block(&self) -> usize {
        self.blocks.block() / self.queries.block()
    }

    /// Key sub-blocks a block.
    pub fn keys_per_block(&self) -> usize {
        self.blocks.block() / self.keys.block()
    }

    /// Query sub-blocks of row `row`, as rows of [`queries`](Self::queries).
    pub fn of_row(&self, row: usize) -> Range<usize> {
        let first = self.queries.first_block();
        let block = self.blocks.first_block() + row;
        let sub = |block: usize| {
            (block * self.queries_per_block()).clamp(first, self.queries.key_blocks()) - first
        };
        sub(block)..sub(block + 1)
    }

    /// Key sub-blocks that query sub-block `a` may read: those that begin no later than its last
    /// query.
    pub fn causal_keys(&self, a: usize) -> usize {
        let end = (self.queries.first_block() + a + 1) * self.queries.block();
        end.min(self.blocks.kv_len()).div_ceil(self.keys.block())
    }
}

/// Pooled vectors of one head of one sequence.
#[derive(Debug, Clone, Copy)]
pub struct HeadMoments<'a> {
    /// Means of the query sub-blocks, `[query sub-blocks, head_dim]`.
    pub q_means: &'a [f32],
    /// Means of the key sub-blocks of the kv head, `[key sub-blocks, head_dim]`.
    pub k_means: &'a [f32],
    /// Variances of the same, of each dim by itself (population).
    pub k_variances: &'a [f32],
    /// Elements of a head.
    pub head_dim: usize,
}

/// Visits the rows of one head in order with the integer masses of the row's causal blocks.
pub fn for_each_row(head: HeadMoments, grid: &SubBlocks, visit: impl FnMut(usize, &[u32])) {
    let d = head.head_dim;
    let scale = 1.0 / (d as f64).sqrt();
    // Both terms of a score are one dot product of 2 · head_dim.
    let keys: Vec<f64> = (head.k_means.chunks_exact(d).zip(head.k_variances.chunks_exact(d)))
        .flat_map(|(mean, variance)| mean.iter().chain(variance).map(|&x| f64::from(x)))
        .collect();
    let mut query = vec![0.0; 2 * d];
    let score = |a: usize, scores: &mut Vec<f32>| {
        for (c, &q) in head.q_means[a * d..][..d].iter().enumerate() {
            let q = f64::from(q) * scale;
            (query[c], query[d + c]) = (q, 0.5 * q * q);
        }
        let causal = keys.chunks_exact(2 * d).take(grid.causal_keys(a));
        scores.extend(causal.map(|key| dot(&query, key) as f32));
    };
    for_each_row_of(grid, score, visit);
}

/// [`for_each_row`] by any scores of sub-blocks: `score` appends those of a query sub-block, over its
/// causal key sub-blocks.
pub fn for_each_row_of(
    grid: &SubBlocks,
    mut score: impl FnMut(usize, &mut Vec<f32>),
    mut visit: impl FnMut(usize, &[u32]),
) {
    let (mut scores, mut masses, mut blocks) = (Vec::new(), Vec::new(), Vec::new());
    let mut sums: Vec<u64> = Vec::new();
    for row in 0..grid.blocks.rows() {
        sums.clear();
        sums.resize(grid.blocks.causal_blocks(row), 0);
        let subs = grid.of_row(row);
        for a in subs.clone() {
            scores.clear();
            score(a, &mut scores);
            integer_masses(&scores, &mut masses);
            for (sum, masses) in sums.iter_mut().zip(masses.chunks(grid.keys_per_block())) {
                *sum += masses.iter().map(|&mass| u64::from(mass)).sum::<u64>();
            }
        }
        let count = subs.len().max(1) as u64;
        blocks.clear();
        blocks.extend(sums.iter().map(|sum| (sum / count) as u32));
        visit(row, &blocks);
    }
}

/// Dot product in eight partial sums, which the processor can work on at once.
fn dot(a: &[f64], b: &[f64]) -> f64 {
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<8>(), b.as_chunks::<8>());
    let mut sums = [0.0; 8];
    for (a, b) in a.iter().zip(b) {
        for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
            *sum += a * b;
        }
    }
    let rest: f64 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    sums.iter().sum::<f64>() + rest
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::masses::MASS_ONE;
    use proptest::prelude::*;

    fn masses(head: HeadMoments, grid: &SubBlocks) -> Vec<Vec<u32>> {
        let mut rows = Vec::new();
        for_each_row(head, grid, |_, masses| rows.push(masses.to_vec()));
        rows
    }

    proptest! {
        #[test]
        fn sub_blocks_divide_the_rows_and_see_what_they_may(
            query_sub in 1usize..6, key_sub in 1usize..6, times in 1usize..4,
            q_len in 0usize..150, kv_len in 0usize..150,
        ) {
            let block = query_sub * key_sub * times;
            let grid = BlockGrid::new(block, q_len, kv_len).unwrap();
            let subs = SubBlocks::new(grid, query_sub, key_sub);
            let mut next = 0;
            for row in 0..grid.rows() {
                let of_row = subs.of_row(row);
                prop_assert!(of_row.start == next && !of_row.is_empty());
                next = of_row.end;
                for a in of_row {
                    let last = grid.visible_keys(subs.queries().queries(a).end - 1) - 1;
                    prop_assert_eq!(subs.causal_keys(a), last / key_sub + 1);
                    let block = (subs.causal_keys(a) - 1) / subs.keys_per_block();
                    prop_assert!(block < grid.causal_blocks(row));
                }
            }
            prop_assert_eq!(next, subs.queries().rows());
        }
    }

    #[test]
    fn masses_of_a_row_add_up_to_one() {
        let (d, len) = (4, 100);
        let subs = SubBlocks::new(BlockGrid::new(32, 70, len).unwrap(), 16, 8);
        let noise = |n: usize, by: f32| -> Vec<f32> {
            (0..n * d).map(|i| (i * 7919 % 1009) as f32 / 1009.0 * by).collect()
        };
        let (q_means, k_means) = (noise(subs.queries().rows(), 9.0), noise(13, 5.0));
        let k_variances = noise(13, 2.0);
        let head = HeadMoments {
            q_means: &q_means,
            k_means: &k_means,
            k_variances: &k_variances,
            head_dim: d,
        };
        for row in masses(head, &subs) {
            let total: i64 = row.iter().map(|&mass| i64::from(mass)).sum();
            assert!((total - i64::from(MASS_ONE)).abs() <= 16, "{total}");
        }
    }

    /// Two blocks of one mean: keys that scatter weigh exp(½ q² σ² / d) times those that don't.
    #[test]
    fn scattered_keys_weigh_more() {
        let subs = SubBlocks::new(BlockGrid::new(16, 1, 32).unwrap(), 16, 16);
        let head = HeadMoments {
            q_means: &[2.0; 4],
            k_means: &[0.5; 8],
            k_variances: &[0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.5, 0.0],
            head_dim: 4,
        };
        let rows = masses(head, &subs);
        let ratio = f64::from(rows[0][1]) / f64::from(rows[0][0]);
        assert!((ratio / (0.5f64 * 4.0 * 1.5 / 4.0).exp() - 1.0).abs() < 1e-6, "{ratio}");
    }

    /// A bad key sub-block has no mass; the others share what there is.
    #[test]
    fn a_nan_stays_in_its_sub_block() {
        let subs = SubBlocks::new(BlockGrid::new(32, 32, 64).unwrap(), 32, 16);
        let mut k_means = [1.0f32; 8];
        k_means[2] = f32::NAN;
        let head = HeadMoments {
            q_means: &[1.0; 2],
            k_means: &k_means,
            k_variances: &[0.0; 8],
            head_dim: 2,
        };
        let total = f64::from(MASS_ONE);
        let row = &masses(head, &subs)[0];
        assert!((f64::from(row[0]) / total - 1.0 / 3.0).abs() < 1e-8);
        assert!((f64::from(row[1]) / total - 2.0 / 3.0).abs() < 1e-8);
    }
}
