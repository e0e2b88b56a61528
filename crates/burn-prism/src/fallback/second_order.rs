//! Selection by second-order scores, as [`prism_core::second_order`].

use std::ops::Range;

use burn::backend::Backend;
use burn::backend::tensor::{Device, FloatTensor, IntTensor};
use prism_core::second_order::SubBlocks;

use super::rule::{BlockMasses, Rule};
use super::softmax::{masses, probabilities, scores};
use super::tensor::{Bool, Float, Int};
use crate::ops::SecondOrderParams;

/// Selection from means of query sub-blocks `[batch, q_heads, query sub-blocks, head_dim]` and
/// means and variances of key sub-blocks `[batch, kv_heads, key sub-blocks, head_dim]`: words
/// `[batch, q_heads, rows, ceil(key_blocks / 32)]` and counts `[batch, q_heads, rows]`.
pub fn select_second_order<B: Backend>(
    q_means: FloatTensor<B>,
    k_means: FloatTensor<B>,
    k_variances: FloatTensor<B>,
    params: &SecondOrderParams,
) -> (IntTensor<B>, IntTensor<B>) {
    let [q, k, variances] = [q_means, k_means, k_variances].map(Float::<B>);
    let device = q.device();
    let [_, heads, _, d] = q.dims();
    let [batch, kv_heads, keys, _] = k.dims();
    // Both terms of a score are one dot product of 2 · head_dim.
    let q = q * (1.0 / (d as f32).sqrt());
    let square = q.clone() * q.clone() * 0.5;
    let [_, _, queries, _] = q.dims::<4>();
    let q = Float::join(vec![q, square], 3, [batch, heads, queries, 2 * d], 0.0, &device);
    let k = Float::join(vec![k, variances], 3, [batch, kv_heads, keys, 2 * d], 0.0, &device);
    let k = k.transpose();
    let SecondOrderParams { grids, rule, more_follows, .. } = params;
    Rule { grids, rule, more_follows: *more_follows, heads }.select(&device, |sequences, _| Heads {
        q: q.clone().slice(0, sequences.clone()),
        k: k.clone().slice(0, sequences.clone()),
        grid: params.sub_blocks(sequences.start),
        device: device.clone(),
    })
}

/// The heads of some sequences on one grid.
struct Heads<B: Backend> {
    /// Scaled means and half their squares, `[batch, q_heads, query sub-blocks, 2 · head_dim]`.
    q: Float<B>,
    /// Means and variances, `[batch, kv_heads, 2 · head_dim, key sub-blocks]`.
    k: Float<B>,
    grid: SubBlocks,
    device: Device<B>,
}

impl<B: Backend> BlockMasses<B> for Heads<B> {
    fn row_elements(&self) -> usize {
        let [batch, heads, ..] = self.q.dims::<4>();
        batch * heads * self.grid.queries_per_block() * self.grid.keys().key_blocks()
    }

    fn masses(&self, rows: Range<usize>, future: &Bool<B>) -> Vec<Int<B>> {
        let (grid, device) = (&self.grid, &self.device);
        let [.., blocks] = future.dims::<4>();
        let [batch, heads, ..] = self.q.dims::<4>();
        let (per_row, per_block) = (grid.queries_per_block(), grid.keys_per_block());
        let subs = grid.of_row(rows.start).start..grid.of_row(rows.end - 1).end;
        let (queries, keys) = (subs.len(), (blocks * per_block).min(grid.keys().key_blocks()));

        let causal = subs.clone().map(|a| grid.causal_keys(a) as i32).collect();
        let causal = Int::from_list(causal, device).reshape([1, 1, queries, 1]);
        let unseen = Int::range(0..keys, device).reshape([1, 1, 1, keys]).ge(&causal);
        let q = self.q.clone().slice(2, subs.clone());
        let p = probabilities(scores(q, self.k.clone().slice(3, 0..keys)), &unseen);

        // Sums over the key sub-blocks of a block.
        let dims = [batch, heads, queries, blocks * per_block];
        let p = Float::join(vec![p], 3, dims, 0.0, device)
            .reshape([batch, heads, queries * blocks, per_block])
            .sum(3)
            .reshape([batch, heads, queries, blocks]);
        // Means over the query sub-blocks of a row; a chunk may start and end within one.
        let before = (grid.queries().first_block() + subs.start) % per_row;
        let mut parts = vec![p];
        if before > 0 {
            parts.insert(0, Float::full([batch, heads, before, blocks], 0.0, device));
        }
        let sums = Float::join(parts, 2, [batch, heads, rows.len() * per_row, blocks], 0.0, device)
            .reshape([batch, heads * rows.len(), per_row, blocks])
            .sum(2)
            .reshape([batch, heads, rows.len(), blocks]);
        let counts = rows.clone().map(|row| grid.of_row(row).len() as f32).collect();
        let counts = Float::from_list(counts, device).reshape([1, 1, rows.len(), 1]);
        vec![masses(sums / counts, future)]
    }
}
