//! What the last queries of a head read, by column and by diagonal (MInference, FlexPrefill).

use std::cmp::Reverse;

use crate::masses::{MASS_ONE, usable};
use crate::selectors::input::Head;
use crate::selectors::pooled::dot_wide;

/// Probabilities of the last queries, summed.
pub(super) struct LastQueries {
    /// Of each key, `[kv_len]`.
    pub vertical: Vec<f64>,
    /// Of each distance from the query's own position, `[kv_len]`.
    pub slash: Vec<f64>,
    /// Queries counted.
    pub queries: usize,
}

impl LastQueries {
    /// The last `count` queries of a head, as far as there are that many that see a key.
    ///
    /// Each row is an exact causal softmax. A NaN has no probability.
    pub fn new(head: &Head, count: usize) -> Self {
        let grid = &head.grid;
        let queries = count.min(grid.q_len() - grid.blind_queries().min(grid.q_len()));
        let mut vertical = vec![0.0; grid.kv_len()];
        let mut slash = vec![0.0; grid.kv_len()];
        let mut weights = Vec::new();
        for i in grid.q_len() - queries..grid.q_len() {
            let visible = grid.visible_keys(i);
            weights.clear();
            weights.extend((0..visible).map(|j| {
                let score = dot_wide(head.query(i), head.key(j)) * head.scale;
                f64::from(usable(score as f32))
            }));
            let max = weights.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            if max == f64::NEG_INFINITY {
                continue;
            }
            weights.iter_mut().for_each(|weight| *weight = (*weight - max).exp());
            let total: f64 = weights.iter().sum();
            for (j, weight) in weights.iter().enumerate() {
                vertical[j] += weight / total;
                slash[visible - 1 - j] += weight / total;
            }
        }
        Self { vertical, slash, queries }
    }
}

/// Shares of the last queries as integer masses, sums over runs of `run` values of one.
///
/// What is below 2⁻³⁰ is 0, so that the order of lines that nobody reads is the same everywhere.
pub(super) fn shares(sums: &[f64], queries: usize, run: usize) -> Vec<u32> {
    let unit = f64::from(MASS_ONE) / queries.max(1) as f64;
    sums.chunks(run).map(|sums| (sums.iter().sum::<f64>() * unit).round() as u32).collect()
}

/// Indices by (share descending, index ascending), those below `forced` before all others.
pub(super) fn ranking(shares: &[u32], forced: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..shares.len()).collect();
    order.sort_by_key(|&i| {
        (i >= forced, if i < forced { Reverse(0) } else { Reverse(shares[i]) }, i)
    });
    order
}
