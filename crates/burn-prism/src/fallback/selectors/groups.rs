//! Antidiagonal sums of tiles (XAttention), and single tokens as tiles of one (the oracle).

use std::ops::Range;

use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Backend, FloatDType};
use prism_core::BlockGrid;
use prism_core::masses::MASS_ONE;
use prism_core::second_order::SubBlocks;
use prism_core::select::ByMass;

use crate::fallback::choice::{Choice, RowSource};
use crate::fallback::rule::future;
use crate::fallback::softmax::scores;
use crate::fallback::sub_blocks::block_masses;
use crate::fallback::tensor::{Bool, Float, Int};
use crate::fallback::{TILE, steps};
use crate::ops::{AntidiagonalParams, PrismBackend};

/// The heads of some sequences on one grid.
pub struct Groups<B: Backend> {
    /// `[batch, q_heads, q_len, head_dim]`.
    pub q: Float<B>,
    /// `[batch, kv_heads, kv_len, head_dim]`.
    pub k: Float<B>,
    pub grid: BlockGrid,
    pub stride: usize,
    /// Of attention.
    pub scale: f32,
    /// The mass of a row where forced blocks count first; the rule's budget decides without it.
    pub after_forced: Option<f64>,
}

impl<B: PrismBackend> RowSource<B> for Groups<B> {
    fn row_elements(&self) -> usize {
        // The masses alone: the operation takes care of what it needs on the way.
        let [batch, heads, ..] = self.q.dims::<4>();
        batch * heads * self.grid.key_blocks()
    }

    fn choose(&self, rows: Range<usize>, _future: &Bool<B>) -> Choice<B> {
        let params = AntidiagonalParams::new(self.grid, rows, self.stride, self.scale.into());
        let masses = B::prism_antidiagonal_masses(self.q.0.clone(), self.k.0.clone(), params);
        let by = self.after_forced.map_or(ByMass::Budget, |share| {
            let target = ((share * f64::from(MASS_ONE)).round() as u32).max(1);
            ByMass::AfterForced((share < 1.0).then_some(target))
        });
        Choice::Masses(vec![Int(masses)], by)
    }
}

/// Integer masses of some rows, `[batch, q_heads, rows, blocks]`, in tensor ops.
pub fn antidiagonal_masses<B: Backend>(
    q: FloatTensor<B>,
    k: FloatTensor<B>,
    params: &AntidiagonalParams,
) -> IntTensor<B> {
    let (q, k) = (Float::<B>(q), Float::<B>(k));
    let (device, [batch, heads, ..]) = (q.device(), q.dims::<4>());
    let AntidiagonalParams { grid, rows, .. } = params;
    let blocks = grid.causal_blocks_of(rows);
    let vectors = Vectors::new(q, k, params);
    let few = (TILE / vectors.row_elements()).max(1);
    let some = steps(rows.len(), few).map(|some| {
        let own = some.start + rows.start..some.end + rows.start;
        let future = future::<B>(grid, &own, &device);
        let masses = block_masses(&vectors.grid, own, &future, |groups, keys| {
            scores(vectors.queries(groups), vectors.k.clone().slice(3, 0..keys))
        });
        let wide = [batch, heads, some.len(), blocks];
        Int::join(vec![masses], 3, wide, -1, &device)
    });
    Int::join(some.collect(), 2, [batch, heads, rows.len(), blocks], -1, &device).0
}

/// Groups as vectors, whose products are the sums along antidiagonals.
struct Vectors<B: Backend> {
    /// `[batch, q_heads, q_len, head_dim]`, cut to the queries that see a key.
    q: Float<B>,
    /// A group is a row: `[batch, kv_heads, stride · head_dim, groups]`, f32.
    k: Float<B>,
    grid: SubBlocks,
    stride: usize,
    /// Of attention, over the stride.
    scale: f32,
}

impl<B: Backend> Vectors<B> {
    fn new(q: Float<B>, k: Float<B>, params: &AntidiagonalParams) -> Self {
        let AntidiagonalParams { grid, rows, stride, scale } = params;
        let stride = *stride;
        let [batch, kv_heads, _, d] = k.dims();
        let device = k.device();
        // Up to the last block that is read.
        let end = (grid.causal_blocks_of(rows) * grid.block()).min(grid.kv_len());
        let groups = end.div_ceil(stride);
        let k = k.slice(2, 0..end).cast(FloatDType::F32);
        let k = Float::join(vec![k], 2, [batch, kv_heads, groups * stride, d], 0.0, &device)
            .reshape([batch, kv_heads, groups, stride * d])
            .transpose();
        let q = q.slice(2, grid.blind_queries()..grid.q_len());
        let scale = *scale as f32 / stride as f32;
        Self { q, k, grid: SubBlocks::new(*grid, stride, stride), stride, scale }
    }

    /// Elements that one row takes on the way.
    fn row_elements(&self) -> usize {
        let [batch, heads, ..] = self.q.dims::<4>();
        let groups = self.grid.keys().key_blocks().max(self.stride * self.q.dims::<4>()[3]);
        batch * heads * self.grid.queries_per_block() * groups
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
