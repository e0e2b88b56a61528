//! FlexPrefill: vertical-slash or query-aware, head by head.

use burn::backend::Backend;
use prism_core::BlockGrid;
use prism_core::selectors::FlexPrefill;

use super::last_queries::LastQueries;
use super::lines::{Lines, by_block, heaviest, largest, masses};
use crate::fallback::softmax::{probabilities, scores};
use crate::fallback::tensor::{Float, Int};
use crate::ops::{Prefix, PrismBackend};

/// What the heads of some sequences on one grid read; the means are those of its blocks.
pub fn lines<B: PrismBackend>(
    (q, k): (Float<B>, Float<B>),
    (means_q, means_k): (Float<B>, Float<B>),
    grid: &BlockGrid,
    scale: f32,
    options: &FlexPrefill,
) -> Lines<B> {
    let device = q.device();
    let [batch, heads, ..] = q.dims::<4>();
    let blocks = grid.key_blocks();
    let first_block = grid.first_block();
    if options.is_short(grid) {
        let all = Int::full([batch, heads, 1, blocks], 1, &device);
        return Lines { columns: all.clone(), distances: all, pairs: None, first_block };
    }
    let means_q = means_q.slice(2, 0..grid.rows());
    let keys = means_k.slice(2, 0..blocks).transpose();
    let last = LastQueries::new(q, &k, grid, scale, grid.block());
    let truth = by_block(last.vertical.clone(), grid);
    let none = Int::<B>::range(0..blocks, &device).reshape([1, 1, 1, blocks]).below(0);
    let estimate = probabilities(scores(last.q.mean(2) * scale, keys.clone()), &none);
    let distance = divergence(estimate, truth.clone()).sqrt();
    // Below τ, strictly.
    let query_aware = !(distance.gt(options.tau as f32) | distance.eq(options.tau as f32));

    let (least, most) = options.limits(grid);
    let target = || Int::full([batch, heads, 1, 1], options.target() as i32, &device);
    let choose = |shares: Float<B>| {
        let tokens = masses(shares.clone());
        let tokens = heaviest(tokens, target(), Prefix::Reaching).sum(3);
        let count = (tokens / grid.block() as i32 + 1).at_least(least as i32).at_most(most as i32);
        let count = count.fill(&query_aware, least as i32);
        largest(masses(by_block(shares, grid)), 1, count)
    };
    let (columns, distances) = (choose(last.vertical), choose(last.slash));
    let pairs = (options.tau > 0.0).then(|| {
        let rows = grid.rows();
        let u = Int::range(first_block..first_block + rows, &device).reshape([1, 1, rows, 1]);
        let v = Int::range(0..blocks, &device).reshape([1, 1, 1, blocks]);
        let future = (u - v).below(0);
        let p = probabilities(scores(means_q * scale, keys), &future);
        // All rows share one budget: a row has an equal share of the mass.
        let shares = masses(p * (1.0 / rows as f32)).fill(&future, -1);
        let shares = shares.reshape([batch, heads, 1, rows * blocks]);
        let pairs = heaviest(shares, target(), Prefix::Within);
        let pairs = pairs.reshape([batch, heads, rows, blocks]).is(1);
        pairs & query_aware.clone().expand([batch, heads, rows, blocks])
    });
    Lines { columns, distances, pairs, first_block }
}

/// Jensen–Shannon divergence along the last dim, natural log; 0 · ln 0 is 0.
fn divergence<B: Backend>(p: Float<B>, q: Float<B>) -> Float<B> {
    let middle = ((p.clone() + q.clone()) * 0.5).at_least(f32::MIN_POSITIVE);
    let term = |p: Float<B>| {
        let ratio = (p.clone() / middle.clone()).at_least(f32::MIN_POSITIVE);
        (p * ratio.log()).sum(3)
    };
    ((term(p) + term(q)) * 0.5).at_least(0.0)
}
