//! Selection by second-order scores, as [`prism_core::second_order`].

use std::ops::Range;

use burn::backend::Backend;
use burn::backend::tensor::{FloatTensor, IntTensor};
use prism_core::second_order::SubBlocks;
use prism_core::select::ByMass;

use super::choice::{Choice, RowSource};
use super::rule::Rule;
use super::softmax::scores;
use super::sub_blocks::block_masses;
use super::tensor::{Bool, Float};
use crate::ops::{PrismBackend, SecondOrderParams};

/// Selection from means of query sub-blocks `[batch, q_heads, query sub-blocks, head_dim]` and
/// means and variances of key sub-blocks `[batch, kv_heads, key sub-blocks, head_dim]`: words
/// `[batch, q_heads, rows, ceil(key_blocks / 32)]` and counts `[batch, q_heads, rows]`.
pub fn select_second_order<B: PrismBackend>(
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
    })
}

/// The heads of some sequences on one grid.
struct Heads<B: Backend> {
    /// Scaled means and half their squares, `[batch, q_heads, query sub-blocks, 2 · head_dim]`.
    q: Float<B>,
    /// Means and variances, `[batch, kv_heads, 2 · head_dim, key sub-blocks]`.
    k: Float<B>,
    grid: SubBlocks,
}

impl<B: Backend> RowSource<B> for Heads<B> {
    fn row_elements(&self) -> usize {
        let [batch, heads, ..] = self.q.dims::<4>();
        batch * heads * self.grid.queries_per_block() * self.grid.keys().key_blocks()
    }

    fn choose(&self, rows: Range<usize>, future: &Bool<B>) -> Choice<B> {
        let masses = block_masses(&self.grid, rows, future, |subs, keys| {
            scores(self.q.clone().slice(2, subs), self.k.clone().slice(3, 0..keys))
        });
        Choice::Masses(vec![masses], ByMass::Budget)
    }
}
