//! The masses of a row's key blocks, from the scores of its query sub-blocks over key sub-blocks.

use cubecl::prelude::*;

use super::SelectNumbers;
use super::rule::{Row, score_bits, to_masses};
use super::second_order::SecondOrderShape;
use crate::span::Span;

/// Where a worker keeps what, and what it works on.
#[derive(CubeType, Clone, Copy)]
pub(super) struct Place {
    /// Scores of the query sub-blocks worked at once, then their masses.
    pub scores: usize,
    /// Upper halves of the blocks' sums, then lower halves.
    pub masses: usize,
    /// Query head and kv head among those of all sequences.
    pub head: usize,
    pub kv_head: usize,
    /// Index among the worker's units.
    pub unit: usize,
    /// Blocks that the row sees.
    pub causal: usize,
}

/// Masses of the causal blocks of a row, at `at.masses`.
#[cube]
pub(super) fn block_masses<N: Size>(
    q_means: &[Vector<f32, N>],
    k_means: &[Vector<f32, N>],
    k_variances: &[Vector<f32, N>],
    scratch: &mut [u32],
    numbers: &SelectNumbers,
    span: &Span,
    at: &Place,
    row: usize,
    q_subs: usize,
    k_subs: usize,
    #[comptime] shape: SecondOrderShape,
) {
    let (q_sub, k_sub) = comptime!((shape.subs[0], shape.subs[1]));
    let planes = comptime!(shape.planes);
    let units = comptime!(shape.units);
    let per_row = comptime!(shape.block / shape.subs[0]);
    let per_block = comptime!(shape.block / shape.subs[1]);
    // Query sub-blocks of the row, on the grid of sub-blocks.
    let first =
        (span.first_position() / q_sub).max((span.first_block(shape.block) + row) * per_row);
    let end =
        ((span.first_block(shape.block) + row + 1) * per_row).min(span.kv_len.div_ceil(q_sub));

    let mut v = at.unit;
    while v < at.causal {
        scratch[at.masses + v] = 0u32;
        scratch[at.masses + numbers.key_blocks + v] = 0u32;
        v += units;
    }
    let mut sub = first;
    while sub < end {
        let count = (end - sub).min(planes);
        let reach = (((sub + count) * q_sub).min(span.kv_len)).div_ceil(k_sub);
        let q_line = at.head * q_subs + sub - span.first_position() / q_sub;
        score::<N>(q_means, k_means, k_variances, scratch, at, q_line, count, reach, k_subs, shape);
        if comptime!(!shape.alone) {
            sync_cube();
        }
        // Each plane its own sub-block.
        let mut own = 0usize;
        let mut lane = at.unit;
        if comptime!(!shape.alone) {
            own = at.unit / comptime!(shape.rule.lanes as usize);
            lane = at.unit % comptime!(shape.rule.lanes as usize);
        }
        let seen = (((sub + own + 1) * q_sub).min(span.kv_len)).div_ceil(k_sub);
        let scores = Row {
            start: at.scores + own * k_subs,
            stride: k_subs,
            causal: select(own < count, seen, 0usize),
            lane,
        };
        let masses = scratch.as_vectorized_mut();
        let _ = to_masses::<Const<1>>(masses, &scores, 1usize, comptime!(shape.rule));
        if comptime!(!shape.alone) {
            sync_cube();
        }
        let mut v = at.unit;
        while v < at.causal {
            let mut high = scratch[at.masses + v];
            let mut low = scratch[at.masses + numbers.key_blocks + v];
            for i in 0..count {
                let seen = (((sub + i + 1) * q_sub).min(span.kv_len)).div_ceil(k_sub);
                let begin = (v * per_block).min(seen);
                let stop = (begin + per_block).min(seen);
                for j in begin..stop {
                    let mass = scratch[at.scores + i * k_subs + j];
                    high += mass >> 16u32;
                    low += mass & 0xffffu32;
                }
                high += low >> 16u32;
                low &= 0xffffu32;
            }
            scratch[at.masses + v] = high;
            scratch[at.masses + numbers.key_blocks + v] = low;
            v += units;
        }
        if comptime!(!shape.alone) {
            sync_cube();
        }
        sub += planes;
    }
    // The average, rounded down: a long division in two steps, where 64-bit integers may lack.
    let count = (end - first).max(1) as u32;
    let mut v = at.unit;
    while v < at.causal {
        let high = scratch[at.masses + v];
        let low = scratch[at.masses + numbers.key_blocks + v];
        let rest = ((high % count) << 16u32) | low;
        scratch[at.masses + v] = ((high / count) << 16u32) + rest / count;
        v += units;
    }
    if comptime!(!shape.alone) {
        sync_cube();
    }
}

/// Scores of `count` query sub-blocks from `q_line` on, over `reach` key sub-blocks: both terms as
/// one dot product of the query with k̄ + ½ q var.
#[cube]
fn score<N: Size>(
    q_means: &[Vector<f32, N>],
    k_means: &[Vector<f32, N>],
    k_variances: &[Vector<f32, N>],
    scratch: &mut [u32],
    at: &Place,
    q_line: usize,
    count: usize,
    reach: usize,
    k_subs: usize,
    #[comptime] shape: SecondOrderShape,
) {
    let planes = comptime!(shape.planes);
    let width = N::value();
    let chunks = comptime!(shape.dim / width);
    let scale = comptime!(1.0 / (shape.dim as f32).sqrt());
    let mut v = at.unit;
    while v < reach {
        let mut dots = Array::<f32>::new(planes);
        #[unroll]
        for i in 0..planes {
            dots[i] = 0.0f32;
        }
        for c in 0..chunks {
            let mut key = (at.kv_head * chunks + c) * k_subs + v;
            if comptime!(shape.alone) {
                key = (at.kv_head * k_subs + v) * chunks + c;
            }
            let mean = k_means[key];
            let variance = k_variances[key];
            #[unroll]
            for i in 0..planes {
                let line = q_line + i.min(count - 1);
                let q = q_means[line * chunks + c] * Vector::new(scale);
                #[unroll]
                for e in 0..width {
                    let x = q.extract(e);
                    let key = fma(x * 0.5f32, variance.extract(e), mean.extract(e));
                    dots[i] = fma(x, key, dots[i]);
                }
            }
        }
        #[unroll]
        for i in 0..planes {
            if i < count {
                scratch[at.scores + i * k_subs + v] = score_bits(dots[i]);
            }
        }
        v += comptime!(shape.units);
    }
}
