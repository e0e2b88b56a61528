//! Antidiagonal sums of tiles (XAttention), and single tokens as tiles of one (the oracle).

use std::ops::Range;

use burn::backend::{Backend, FloatDType};
use prism_core::BlockGrid;
use prism_core::masses::MASS_ONE;
use prism_core::second_order::SubBlocks;

use crate::fallback::choice::{By, Choice, RowSource};
use crate::fallback::softmax::scores;
use crate::fallback::sub_blocks::block_masses;
use crate::fallback::tensor::{Bool, Float, Int};

/// The heads of some sequences on one grid.
pub struct Groups<B: Backend> {
    /// `[batch, q_heads, q_len, head_dim]`, cut to the queries that see a key.
    q: Float<B>,
    /// A group is a row: `[batch, kv_heads, stride · head_dim, groups]`, f32.
    k: Float<B>,
    grid: SubBlocks,
    stride: usize,
    /// Of attention, over the stride.
    scale: f32,
    after_forced: Option<f64>,
}

impl<B: Backend> Groups<B> {
    /// `after_forced` is the mass of a row where forced blocks count first; the rule's budget decides
    /// without it.
    pub fn new(
        q: Float<B>,
        k: Float<B>,
        grid: &BlockGrid,
        stride: usize,
        scale: f32,
        after_forced: Option<f64>,
    ) -> Self {
        let [batch, kv_heads, _, d] = k.dims();
        let device = k.device();
        let groups = grid.kv_len().div_ceil(stride);
        let k = k.slice(2, 0..grid.kv_len()).cast(FloatDType::F32);
        let k = Float::join(vec![k], 2, [batch, kv_heads, groups * stride, d], 0.0, &device)
            .reshape([batch, kv_heads, groups, stride * d])
            .transpose();
        let q = q.slice(2, grid.blind_queries()..grid.q_len());
        let scale = scale / stride as f32;
        Self { q, k, grid: SubBlocks::new(*grid, stride, stride), stride, scale, after_forced }
    }

    /// Some groups of queries, each in reverse: `[batch, q_heads, groups, stride · head_dim]`. Positions
    /// without a query hold zeros.
    fn queries(&self, groups: Range<usize>) -> Float<B> {
        let (q, stride) = (&self.q, self.stride);
        let [batch, heads, queries, d] = q.dims();
        let device = q.device();
        let before = self.grid.blocks().first_position() % stride;
        let start = (groups.start * stride).saturating_sub(before);
        let end = (groups.end * stride - before).min(queries);
        let missing = if groups.start == 0 { before } else { 0 };
        let mut parts = vec![q.clone().slice(2, start..end).cast(FloatDType::F32)];
        if missing > 0 {
            parts.insert(0, Float::full([batch, heads, missing, d], 0.0, &device));
        }
        let positions = groups.len() * stride;
        let q = Float::join(parts, 2, [batch, heads, positions, d], 0.0, &device);
        let q = if stride == 1 {
            q
        } else {
            let reversed = |i: usize| (i / stride * stride + stride - 1 - i % stride) as i32;
            q.select(2, Int::from_list((0..positions).map(reversed).collect(), &device))
        };
        q.reshape([batch, heads, groups.len(), stride * d]) * self.scale
    }
}

impl<B: Backend> RowSource<B> for Groups<B> {
    fn row_elements(&self) -> usize {
        let [batch, heads, ..] = self.q.dims::<4>();
        let groups = self.grid.keys().key_blocks().max(self.stride * self.q.dims::<4>()[3]);
        batch * heads * self.grid.queries_per_block() * groups
    }

    fn choose(&self, rows: Range<usize>, future: &Bool<B>) -> Choice<B> {
        let masses = block_masses(&self.grid, rows, future, |groups, keys| {
            scores(self.queries(groups), self.k.clone().slice(3, 0..keys))
        });
        let by = self.after_forced.map_or(By::Budget, |share| {
            let target = ((share * f64::from(MASS_ONE)).round() as u32).max(1);
            By::AfterForced((share < 1.0).then_some(target))
        });
        Choice::Masses(vec![masses], by)
    }
}
