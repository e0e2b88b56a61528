//! Attention over selected blocks, a tile of queries at a time.

use std::ops::Range;

use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Backend, FloatDType, TensorMetadata};
use prism_core::BlockGrid;
use prism_core::selection::WORD_BITS;

use super::tensor::{Bool, Float, Int};
use super::{TILE, runs, steps};
use crate::ops::AttendParams;

/// LSE of a query that reads no key.
const SILENT: f32 = f32::NEG_INFINITY;

/// Attention of Q `[batch, q_heads, q_len, head_dim]` to K and V
/// `[batch, kv_heads, kv_len, head_dim]` over the selected blocks (`None`: every causal block):
/// output in the dtype of Q, and LSE `[batch, q_heads, q_len]` in f32. Differentiable in Q, K, V.
pub fn attend<B: Backend>(
    q: FloatTensor<B>,
    k: FloatTensor<B>,
    v: FloatTensor<B>,
    words: Option<IntTensor<B>>,
    params: &AttendParams,
) -> (FloatTensor<B>, FloatTensor<B>) {
    let dtype = FloatDType::from(q.dtype());
    let (q, k, v) = (Float::<B>(q), Float::<B>(k), Float::<B>(v));
    let words = words.map(Int::<B>);
    let device = q.device();
    let [batch, heads, q_len, d] = q.dims();
    let [_, kv_heads, ..] = k.dims::<4>();
    let group = heads / kv_heads;
    let (mut outs, mut lses) = (Vec::new(), Vec::new());
    for (sequences, grid) in runs(&params.grids) {
        let sight = grid.q_len() - grid.blind_queries();
        if sight == 0 {
            let lines = sequences.len() * heads;
            outs.push(Float::full([lines, q_len, d], 0.0, &device));
            lses.push(Float::full([lines, q_len], SILENT, &device));
            continue;
        }
        // A line is a kv head of a sequence, with the `group` query heads that share it.
        let lines = sequences.len() * kv_heads;
        let keys = |x: &Float<B>| {
            let x = x.clone().slice(0, sequences.clone());
            x.slice(2, 0..grid.kv_len()).reshape([lines, grid.kv_len(), d])
        };
        let (k, v) = (keys(&k), keys(&v));
        let q = q.clone().slice(0, sequences.clone());
        let q = q.reshape([lines, group, q_len, d]);
        let words = words.clone().map(|words| {
            let [_, _, rows, width] = words.dims();
            let words = words.slice(0, sequences.clone());
            words.reshape([lines, group, rows, width])
        });
        let per_line = group * sight.min(grid.block()) * grid.kv_len();
        for lines in steps(lines, (TILE / per_line).max(1)) {
            let tile = Lines {
                q: q.clone().slice(0, lines.clone()).cast(FloatDType::F32),
                k: k.clone().slice(0, lines.clone()).cast(FloatDType::F32),
                v: v.clone().slice(0, lines.clone()).cast(FloatDType::F32),
                words: words.clone().map(|words| words.slice(0, lines)),
                grid,
                scale: params.scale as f32,
            };
            let (out, lse) = tile.attend();
            outs.push(out.reshape([tile.lines() * group, q_len, d]));
            lses.push(lse.reshape([tile.lines() * group, q_len]));
        }
    }
    let out = Float::join(outs, 0, [batch * heads, q_len, d], 0.0, &device);
    let lse = Float::join(lses, 0, [batch * heads, q_len], SILENT, &device);
    (out.reshape([batch, heads, q_len, d]).cast(dtype).0, lse.reshape([batch, heads, q_len]).0)
}

/// Some lines on one grid, in f32.
struct Lines<'a, B: Backend> {
    /// Queries, `[lines, group, q_len, head_dim]`.
    q: Float<B>,
    /// Keys, `[lines, kv_len, head_dim]`.
    k: Float<B>,
    /// Values, `[lines, kv_len, head_dim]`.
    v: Float<B>,
    /// Words of the selection, `[lines, group, rows, width]`.
    words: Option<Int<B>>,
    grid: &'a BlockGrid,
    /// Factor on the scores, above 0. Only their distance from the maximum is scaled: for large
    /// scores that keeps the bits which a product with the scale would round away.
    scale: f32,
}

impl<B: Backend> Lines<'_, B> {
    fn lines(&self) -> usize {
        self.k.dims::<3>()[0]
    }

    /// Output `[lines, group, q_len, head_dim]` and LSE `[lines, group, q_len, 1]`.
    fn attend(&self) -> (Float<B>, Float<B>) {
        let device = self.q.device();
        let [lines, group, q_len, d] = self.q.dims();
        let blind = self.grid.blind_queries();
        let (mut outs, mut lses) = (Vec::new(), Vec::new());
        if blind > 0 {
            outs.push(Float::full([lines, group, blind, d], 0.0, &device));
            lses.push(Float::full([lines, group, blind, 1], SILENT, &device));
        }
        // A NaN value must reach the rows that read it and no other, but 0 · NaN is NaN: such
        // values become 0, and the weights of the rows that read them NaN.
        let poison = (self.v.clone().detach() * 0.0).sum(2);
        let v = self.v.clone().fill(&poison.is_nan(), 0.0);
        let poison = poison.reshape([lines, 1, 1, self.grid.kv_len()]);

        let step = TILE / (lines * group * self.grid.kv_len());
        for seeing in steps(self.grid.q_len() - blind, step.max(1)) {
            let queries = seeing.start + blind..seeing.end + blind;
            let keys = self.grid.visible_keys(queries.end - 1);
            let count = queries.len();
            let unread = self.unread(&queries, keys);
            let q = self.q.clone().slice(2, queries);
            let k = self.k.clone().slice(1, 0..keys);
            let scores = q
                .reshape([lines, group * count, d])
                .matmul(k.transpose())
                .reshape([lines, group, count, keys])
                .fill(&unread, f32::NEG_INFINITY);
            let max = scores.clone().detach().max(3);
            let max = max.clone().fill(&max.eq(f32::NEG_INFINITY), 0.0);
            let weights = ((scores - max.clone()) * self.scale).exp();
            let total = weights.clone().sum(3);
            let empty = total.eq(0.0);
            let total = total.fill(&empty, 1.0);
            let weights = (weights + poison.clone().slice(3, 0..keys)).fill(&unread, 0.0);
            let out = weights
                .reshape([lines, group * count, keys])
                .matmul(v.clone().slice(1, 0..keys))
                .reshape([lines, group, count, d]);
            outs.push(out / total.clone());
            lses.push((total.log() + max * self.scale).fill(&empty, SILENT));
        }
        (
            Float::join(outs, 2, [lines, group, q_len, d], 0.0, &device),
            Float::join(lses, 2, [lines, group, q_len, 1], SILENT, &device),
        )
    }

    /// Which of the first `keys` keys each query does not read,
    /// `[lines or 1, group or 1, queries, keys]`.
    fn unread(&self, queries: &Range<usize>, keys: usize) -> Bool<B> {
        let device = self.q.device();
        let position = |i: usize| self.grid.visible_keys(i) - 1;
        let positions = position(queries.start)..position(queries.end - 1) + 1;
        let positions = Int::<B>::range(positions, &device);
        let count = queries.len();
        let future = Int::range(0..keys, &device)
            .reshape([1, 1, 1, keys])
            .gt(&positions.clone().reshape([1, 1, count, 1]));
        let Some(words) = &self.words else {
            return future;
        };
        let [lines, group, ..] = words.dims::<4>();
        let block = self.grid.block();
        let rows = positions / block as i32 + -(self.grid.first_block() as i32);
        let (blocks, width) = (keys.div_ceil(block), block.min(keys));
        let words = words.clone().slice(3, 0..blocks.div_ceil(WORD_BITS)).select(2, rows);
        let unselected = unpack(words).slice(3, 0..blocks).is(0);
        let unselected = unselected
            .reshape([lines, group, count, blocks, 1])
            .expand([lines, group, count, blocks, width])
            .reshape([lines, group, count, blocks * width]);
        unselected.slice(3, 0..keys) | future
    }
}

/// Words `[.., .., .., width]` as `[.., .., .., 32 · width]`, 0 where the bit is not set.
fn unpack<B: Backend>(words: Int<B>) -> Int<B> {
    let [a, b, c, width] = words.dims();
    let bits = Int::bits(&words.device()).reshape([1, 1, 1, 1, WORD_BITS]);
    (words.reshape([a, b, c, width, 1]) & bits).reshape([a, b, c, width * WORD_BITS])
}
