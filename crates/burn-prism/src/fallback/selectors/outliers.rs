//! Sub-blocks with their outlier keys apart ([`prism_core::selectors::outliers`]).

use std::ops::Range;

use burn::backend::{Backend, FloatDType};
use prism_core::BlockGrid;
use prism_core::second_order::SubBlocks;
use prism_core::select::ByMass;
use prism_core::selectors::Outliers;

use crate::fallback::choice::{Choice, RowSource};
use crate::fallback::softmax::{masses, probabilities, scores};
use crate::fallback::sub_blocks::{by_block, by_row};
use crate::fallback::tensor::{Bool, Float, Int};
use crate::ops::{PrismBackend, Side};

/// Means and variances of the sub-blocks of all sequences, in f32.
pub struct Parts<B: Backend> {
    q: Float<B>,
    k: Float<B>,
    variances: Float<B>,
}

impl<B: PrismBackend> Parts<B> {
    pub fn new(q: &Float<B>, k: &Float<B>, grids: &[BlockGrid], options: &Outliers) -> Self {
        let subdivided = |sub| grids.iter().map(|grid| grid.subdivided(sub)).collect::<Vec<_>>();
        let [query_sub, key_sub] = options.subs(grids.first().map_or(1, BlockGrid::block));
        let (means, variances) = B::prism_pool_moments(k.0.clone(), subdivided(key_sub));
        let q = B::prism_pool(q.0.clone(), subdivided(query_sub), Side::Queries);
        Self { q: Float(q), k: Float(means), variances: Float(variances) }
    }

    /// The heads of some sequences on one grid; `k` are the keys of these.
    pub fn heads(
        &self,
        k: Float<B>,
        sequences: &Range<usize>,
        grid: &BlockGrid,
        scale: f32,
        options: &Outliers,
    ) -> Heads<B> {
        let [query_sub, key_sub] = options.subs(grid.block());
        let grid = SubBlocks::new(*grid, query_sub, key_sub);
        let of = |x: &Float<B>| x.clone().slice(0, sequences.clone());
        let subs = grid.keys().key_blocks();
        let of_keys = |x: &Float<B>| of(x).slice(2, 0..subs).transpose();
        let (outliers, positions) = shortest(k, &grid);
        let counts = (0..subs).map(|t| (grid.keys().keys(t).len() as f32).ln()).collect();
        let device = self.q.device();
        Heads {
            q: of(&self.q) * scale,
            k: of_keys(&self.k),
            variances: of_keys(&self.variances),
            log_counts: Float::from_list(counts, &device).reshape([1, 1, 1, subs]),
            outliers: outliers.transpose(),
            positions,
            grid,
            target: options.target(),
        }
    }
}

/// The shortest key of each sub-block, the first of several: `[batch, kv_heads, sub-blocks, head_dim]`, and
/// its position `[batch, kv_heads, 1, sub-blocks]`.
fn shortest<B: Backend>(k: Float<B>, grid: &SubBlocks) -> (Float<B>, Int<B>) {
    let [batch, heads, _, d] = k.dims();
    let (subs, sub, device) = (grid.keys().key_blocks(), grid.keys().block(), k.device());
    let k = k.slice(2, 0..grid.blocks().kv_len()).cast(FloatDType::F32);
    let closeness = (k.clone() * k.clone()).sum(3) * -1.0;
    let dims = [batch, heads, subs * sub, 1];
    let closeness =
        Float::join(vec![closeness], 2, dims, f32::MIN, &device).reshape([batch, heads, subs, sub]);
    let best = (closeness.clone() - closeness.max(3)).eq(0.0).int();
    let first = best.clone().cumsum().is(1) & !best.below(1);
    let keys = Float::join(vec![k], 2, [batch, heads, subs * sub, d], 0.0, &device)
        .reshape([batch, heads, subs, sub, d]);
    let others = !first.clone().reshape([batch, heads, subs, sub, 1]);
    let outliers = keys.fill(&others, 0.0).sum(3).reshape([batch, heads, subs, d]);
    let position = Int::range(0..subs * sub, &device).reshape([1, 1, subs, sub]);
    let positions = (first.int() * position).sum(3).reshape([batch, heads, 1, subs]);
    (outliers, positions)
}

/// The heads of some sequences on one grid.
pub struct Heads<B: Backend> {
    /// Scaled means, `[batch, q_heads, query sub-blocks, head_dim]`.
    q: Float<B>,
    /// Means, `[batch, kv_heads, head_dim, key sub-blocks]`.
    k: Float<B>,
    /// As the means.
    variances: Float<B>,
    /// Logarithms of the numbers of keys, `[1, 1, 1, key sub-blocks]`.
    log_counts: Float<B>,
    /// As the means.
    outliers: Float<B>,
    /// Of the outliers, `[batch, kv_heads, 1, key sub-blocks]`.
    positions: Int<B>,
    grid: SubBlocks,
    target: u32,
}

impl<B: Backend> Heads<B> {
    /// Scores of the first `keys` sub-blocks and then of their outliers, `[batch, q_heads, query
    /// sub-blocks, 2 · keys]`; −∞ of what isn't seen.
    fn scores(&self, subs: Range<usize>, keys: usize) -> Float<B> {
        let q = self.q.clone().slice(2, subs.clone());
        let [batch, heads, queries, _] = q.dims();
        let device = q.device();
        let of = |x: &Float<B>| x.clone().slice(3, 0..keys);
        let variance = scores(q.clone() * q.clone(), of(&self.variances));
        let log_counts = of(&self.log_counts);
        // What n draws of a variance add up to, typically; see the reference.
        let few = (variance.clone() - log_counts.clone() * 2.0).le(0.0);
        let gaussian = (variance.clone() * 0.5 + log_counts.clone()).fill(&!few.clone(), 0.0);
        let frozen = (variance * 2.0 * log_counts).sqrt().fill(&few, 0.0);
        let clouds = scores(q.clone(), of(&self.k)) + gaussian + frozen;
        let alone = scores(q, of(&self.outliers));

        let list = |of: &dyn Fn(usize) -> usize| {
            let list = subs.clone().map(|a| of(a) as i32).collect();
            Int::from_list(list, &device).reshape([1, 1, queries, 1])
        };
        let (grid, blocks) = (&self.grid, self.grid.blocks());
        let causal = list(&|a| grid.causal_keys(a));
        let visible = list(&|a| blocks.visible_keys(grid.queries().queries(a).end - 1));
        let unseen = Int::range(0..keys, &device).reshape([1, 1, 1, keys]).ge(&causal);
        let [_, kv_heads, ..] = self.k.dims::<4>();
        let late = self.positions.clone().slice(3, 0..keys).ge(&visible);
        let late = late
            .reshape([batch, kv_heads, 1, queries, keys])
            .expand([batch, kv_heads, heads / kv_heads, queries, keys])
            .reshape([batch, heads, queries, keys]);
        let parts =
            vec![clouds.fill(&unseen, f32::NEG_INFINITY), alone.fill(&late, f32::NEG_INFINITY)];
        Float::join(parts, 3, [batch, heads, queries, 2 * keys], 0.0, &device)
    }
}

impl<B: Backend> RowSource<B> for Heads<B> {
    fn row_elements(&self) -> usize {
        let [batch, heads, ..] = self.q.dims::<4>();
        2 * batch * heads * self.grid.queries_per_block() * self.grid.keys().key_blocks()
    }

    fn choose(&self, rows: Range<usize>, future: &Bool<B>) -> Choice<B> {
        let [.., blocks] = future.dims::<4>();
        let grid = &self.grid;
        let subs = grid.of_row(rows.start).start..grid.of_row(rows.end - 1).end;
        let keys = (blocks * grid.keys_per_block()).min(grid.keys().key_blocks());
        let scores = self.scores(subs, keys);
        let unseen = scores.eq(f32::NEG_INFINITY);
        let p = probabilities(scores, &unseen);
        let p = p.clone().slice(3, 0..keys) + p.slice(3, keys..2 * keys);
        let [batch, heads, ..] = self.q.dims::<4>();
        let largest = by_row(grid, &rows, by_block(grid, p, blocks)).max(2).reshape([
            batch,
            heads,
            rows.len(),
            blocks,
        ]);
        Choice::Masses(vec![masses(largest, future)], ByMass::Above(self.target))
    }
}
