//! Rotary embedding of Q and K.

use std::f64::consts::LOG2_E;
use std::ops::Range;

use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, FloatDType, TensorMetadata};
use prism_core::{BlockGrid, RopeLayout};

use super::runs;
use super::tensor::Float;
use crate::ops::{PrismBackend, RotateParams, RotatedTensors, Side};

/// [`rotate`], and the means that the backend's own operation finds in both, of Q without the prescale.
pub fn rotate_and_pool<B: PrismBackend>(
    q: FloatTensor<B>,
    k: FloatTensor<B>,
    cos: FloatTensor<B>,
    sin: FloatTensor<B>,
    params: &RotateParams,
) -> RotatedTensors<B> {
    let plain = RotateParams { prescale: None, ..params.clone() };
    let unscaled = params.prescale.map(|_| turn::<B>(&q, (&cos, &sin), &plain, Side::Queries));
    let (q, k) = rotate::<B>(q, k, cos, sin, params);
    let unscaled = unscaled.unwrap_or_else(|| q.clone());
    let pooled_q = B::prism_pool(unscaled, params.grids.clone(), Side::Queries);
    let pooled_k = B::prism_pool(k.clone(), params.grids.clone(), Side::Keys);
    (q, k, pooled_q, pooled_k)
}

/// Q `[batch, q_heads, q_len, head_dim]` and K `[batch, kv_heads, kv_len, head_dim]` turned by the angles
/// of their positions, in f32 and then rounded; 0 outside of their sequences. `cos` and `sin` are
/// `[positions, rotary_dim / 2]`. Differentiable in Q and K.
pub fn rotate<B: Backend>(
    q: FloatTensor<B>,
    k: FloatTensor<B>,
    cos: FloatTensor<B>,
    sin: FloatTensor<B>,
    params: &RotateParams,
) -> (FloatTensor<B>, FloatTensor<B>) {
    let table = (&cos, &sin);
    let k = turn::<B>(&k, table, params, Side::Keys);
    (turn::<B>(&q, table, params, Side::Queries), k)
}

/// `x` `[batch, heads, len, head_dim]` turned by the angles of its positions on one side of the grids: what
/// [`rotate`] does to one of its tensors.
pub fn turn<B: Backend>(
    x: &FloatTensor<B>,
    (cos, sin): (&FloatTensor<B>, &FloatTensor<B>),
    params: &RotateParams,
    side: Side,
) -> FloatTensor<B> {
    let dtype = FloatDType::from(x.dtype());
    let x = Float::<B>(x.clone());
    let device = x.device();
    let [batch, heads, len, d] = x.dims();
    let mut turned = Vec::new();
    for (sequences, grid) in runs(&params.grids) {
        let (rows, first) = tokens(grid, side);
        let of = [sequences.len(), heads, len, d];
        let (blind, count) = (rows.start, rows.len());
        let mut parts = Vec::new();
        if blind > 0 {
            parts.push(Float::full([of[0], heads, blind, d], 0.0, &device));
        }
        if count > 0 {
            let table = [cos, sin].map(|table| {
                let table = Float::<B>(table.clone());
                let half = params.rotary_dim / 2;
                (half > 0)
                    .then(|| table.slice(0, first..first + count).reshape([1, 1, count, half]))
            });
            let part = x.clone().slice(0, sequences).slice(2, rows).cast(FloatDType::F32);
            let part = pairs(part, table, params);
            parts.push(match params.prescale {
                Some(scale) if side == Side::Queries => part * (scale * LOG2_E) as f32,
                _ => part,
            });
        }
        turned.push(Float::join(parts, 2, of, 0.0, &device));
    }
    Float::join(turned, 0, [batch, heads, len, d], 0.0, &device).cast(dtype).0
}

/// The rows of a sequence that hold tokens, and the position of the first.
fn tokens(grid: &BlockGrid, side: Side) -> (Range<usize>, usize) {
    match side {
        Side::Queries => (grid.blind_queries()..grid.q_len(), grid.first_position()),
        Side::Keys => (0..grid.kv_len(), 0),
    }
}

/// `x` `[n, heads, count, head_dim]` with its pairs turned by cos and sin `[1, 1, count, pairs]`.
fn pairs<B: Backend>(
    x: Float<B>,
    [cos, sin]: [Option<Float<B>>; 2],
    params: &RotateParams,
) -> Float<B> {
    let (Some(cos), Some(sin)) = (cos, sin) else { return x };
    let device = x.device();
    let [n, heads, count, d] = x.dims();
    let half = params.rotary_dim / 2;
    let turned = x.clone().slice(3, 0..2 * half);
    let (a, b) = match params.layout {
        RopeLayout::RotateHalf => {
            (turned.clone().slice(3, 0..half), turned.slice(3, half..2 * half))
        }
        RopeLayout::Interleaved => {
            let turned = turned.reshape([n, heads, count, half, 2]);
            let part =
                |at: usize| turned.clone().slice(4, at..at + 1).reshape([n, heads, count, half]);
            (part(0), part(1))
        }
    };
    let first = a.clone() * cos.clone() - b.clone() * sin.clone();
    let second = b * cos + a * sin;
    let turned = match params.layout {
        RopeLayout::RotateHalf => vec![first, second],
        RopeLayout::Interleaved => {
            let pair = [n, heads, count, half, 1];
            let both = vec![first.reshape(pair), second.reshape(pair)];
            let both = Float::join(both, 4, [n, heads, count, half, 2], 0.0, &device);
            vec![both.reshape([n, heads, count, 2 * half])]
        }
    };
    let mut parts = turned;
    if 2 * half < d {
        parts.push(x.slice(3, 2 * half..d));
    }
    Float::join(parts, 3, [n, heads, count, d], 0.0, &device)
}
