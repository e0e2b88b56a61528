//! One tile of queries of one head against all the keys that it reads.

use std::f32::consts::LOG2_E;
use std::ops::Range;

use prism_core::grid::BlockGrid;
use pulp::{Simd, WithSimd};

use super::blocks::Blocks;
use super::matmul::{Lanes, accumulate, score};
use super::softmax::{Running, mask};
use super::view::{Element, Head};

/// Most queries of a tile: what one pass over K and V from an outer cache serves.
pub(super) const TILE_QUERIES: usize = 128;
/// Keys scored at a time: many enough to spread the cost of the running softmax, few enough that
/// their scores against one panel stay in the innermost cache.
const TILE_KEYS: usize = 128;
/// Most lanes of a panel, and most panels of a tile, of any instruction set.
const MOST_LANES: usize = 64;
const MOST_PANELS: usize = TILE_QUERIES / 8;
/// f32 a cache line, to which every part of the scratch is aligned.
const LINE: usize = 16;

/// Consecutive queries of one head: the unit of work of one thread.
#[derive(Debug)]
pub(super) struct Tile<'o, T> {
    /// Sequence.
    pub(super) batch: usize,
    /// Query head.
    pub(super) head: usize,
    /// Queries, at most [`TILE_QUERIES`]; each sees at least one key.
    pub(super) queries: Range<usize>,
    /// Output, `[queries, dim]`.
    pub(super) out: &'o mut [T],
    /// Log-sum-exp, `[queries]`, empty if it isn't wanted.
    pub(super) lse: &'o mut [f32],
}

/// What one tile is computed from.
pub(super) struct Inputs<'a, T> {
    pub(super) q: Head<'a, T>,
    pub(super) k: Head<'a, T>,
    pub(super) v: Head<'a, T>,
    pub(super) grid: BlockGrid,
    pub(super) blocks: Blocks<'a>,
    /// `batch * q_heads + head`, the line of `blocks`.
    pub(super) line: usize,
    /// Factor on q·k, above 0.
    pub(super) scale: f32,
}

/// Working memory of one thread.
pub(super) struct Scratch {
    memory: Vec<f32>,
    dim: usize,
}

/// The parts of the scratch, all starting on a cache line.
struct Parts<'s> {
    /// Queries, `[panel, dim, lane]`.
    queries: &'s mut [f32],
    /// Output so far, `[panel, dim, lane]`.
    out: &'s mut [f32],
    /// Scores, then weights, of one tile of keys, `[key, lane]`.
    scores: &'s mut [f32],
    /// Rows of K or V that need a copy, `[key, dim]`.
    keys: &'s mut [f32],
    values: &'s mut [f32],
    /// One row, `[dim]`.
    row: &'s mut [f32],
}

impl Scratch {
    /// Scratch for heads of `dim` elements.
    pub(super) fn new(dim: usize) -> Self {
        let memory = vec![0.0; Self::sizes(dim).iter().sum::<usize>() + LINE];
        Self { memory, dim }
    }

    fn sizes(dim: usize) -> [usize; 6] {
        // Lanes are a power of two below `TILE_QUERIES`: panels round no tile up beyond it.
        let panels = TILE_QUERIES * dim;
        let keys = TILE_KEYS * dim;
        [panels, panels, TILE_KEYS * MOST_LANES, keys, keys, dim]
            .map(|len| len.next_multiple_of(LINE))
    }

    fn parts(&mut self) -> Parts<'_> {
        let skip = self.memory.as_ptr().align_offset(LINE * size_of::<f32>()).min(LINE);
        let mut rest = &mut self.memory[skip..];
        let [queries, out, scores, keys, values, row] = Self::sizes(self.dim).map(|len| {
            let (part, after) = std::mem::take(&mut rest).split_at_mut(len);
            rest = after;
            part
        });
        Parts { queries, out, scores, keys, values, row }
    }
}

/// Computes one tile, vectorised as a whole.
pub(super) struct Compute<'c, 'a, 'o, T> {
    pub(super) inputs: Inputs<'a, T>,
    pub(super) tile: Tile<'o, T>,
    pub(super) scratch: &'c mut Scratch,
}

impl<T: Element> WithSimd for Compute<'_, '_, '_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { inputs, tile, scratch } = self;
        let Tile { queries, out, lse, .. } = tile;
        for (row, strip) in strips(&inputs.grid, queries.clone()) {
            let local = strip.start - queries.start..strip.end - queries.start;
            let lanes = strip.len();
            let out = &mut out[local.start * inputs.q.dim()..local.end * inputs.q.dim()];
            let lse = if lse.is_empty() { &mut [] } else { &mut lse[local] };
            let strip = Strip { inputs: &inputs, row, queries: strip, out, lse };
            // Vectors × keys of sums: 8 cover the latency of a fused multiply-add, and fit even 16
            // registers. One vector where half of the lanes would idle; plain lanes without SIMD.
            if S::IS_SCALAR {
                strip.run::<S, 8, 2>(simd, scratch.parts());
            } else if lanes <= S::F32_LANES {
                strip.run::<S, 1, 8>(simd, scratch.parts());
            } else {
                strip.run::<S, 2, 4>(simd, scratch.parts());
            }
        }
    }
}

/// The rows of a selection that `queries` lie in, each with its part of them; all see a key.
pub(super) fn strips(
    grid: &BlockGrid,
    queries: Range<usize>,
) -> impl Iterator<Item = (usize, Range<usize>)> {
    let mut start = queries.start;
    std::iter::from_fn(move || {
        let strip_start = start;
        if strip_start >= queries.end {
            return None;
        }
        let row = (grid.visible_keys(strip_start) - 1) / grid.block() - grid.first_block();
        start = grid.queries(row).end.min(queries.end);
        Some((row, strip_start..start))
    })
}

/// The part of a tile that lies in one row of the selection.
struct Strip<'c, 'a, 'o, T> {
    inputs: &'c Inputs<'a, T>,
    row: usize,
    queries: Range<usize>,
    out: &'o mut [T],
    lse: &'o mut [f32],
}

impl<T: Element> Strip<'_, '_, '_, T> {
    #[inline(always)]
    fn run<S: Simd, const N: usize, const R: usize>(mut self, simd: S, parts: Parts<'_>) {
        let Parts { queries, out, scores, keys, values, row } = parts;
        let lanes = N * S::F32_LANES;
        let dim = self.inputs.q.dim();
        let panels = self.queries.len().div_ceil(lanes);
        let queries = &mut queries[..panels * dim * lanes];
        let out = &mut out[..panels * dim * lanes];
        self.pack(lanes, queries, row);
        out.fill(0.0);

        let queries = vectors::<S, N>(queries);
        let sums = vectors_mut::<S, N>(out);
        let scores = vectors_mut::<S, N>(scores);
        let mut running = [Running::<S, N>::new(simd, self.inputs.scale * LOG2_E); MOST_PANELS];
        let Inputs { k, v, grid, blocks, line, .. } = self.inputs;
        let visible = grid.visible_keys(self.queries.end - 1);
        for run in blocks.runs(grid, *line, self.row) {
            let end = grid.keys(run.end - 1).end.min(visible);
            let mut start = grid.keys(run.start).start;
            while start < end {
                let tile = start..end.min(start + TILE_KEYS);
                let keys = k.rows(tile.clone(), keys);
                let values = v.rows(tile.clone(), values);
                for (panel, running) in running[..panels].iter_mut().enumerate() {
                    // Lane l sees the keys below `first + l`.
                    let first = grid.visible_keys(self.queries.start + panel * lanes);
                    let last = visible.min(first + lanes - 1);
                    if last <= tile.start {
                        continue;
                    }
                    let count = tile.end.min(last) - tile.start;
                    let full = count.min(first.saturating_sub(tile.start));
                    let scores = &mut scores[..count];
                    let panel = panel * dim..(panel + 1) * dim;
                    score::<S, N, R>(simd, &queries[panel.clone()], keys, scores);
                    if full < count {
                        mask(simd, &mut scores[full..], tile.start + full - first);
                    }
                    let rescale = running.update(simd, scores);
                    let sums = &mut sums[panel];
                    accumulate::<S, N, R>(simd, scores, full, values, rescale, sums);
                }
                start = tile.end;
            }
        }

        for (panel, running) in running[..panels].iter().enumerate() {
            let (mut max, mut sum) = ([0.0; MOST_LANES], [0.0; MOST_LANES]);
            vectors_mut::<S, N>(&mut max)[0] = running.max;
            vectors_mut::<S, N>(&mut sum)[0] = running.sum;
            let out = &out[panel * dim * lanes..][..dim * lanes];
            self.unpack(panel * lanes, lanes, out, &max, &sum, row);
        }
    }

    /// Reads the queries into `into`, `[panel, dim, lane]`; idle lanes get zeros.
    #[inline(always)]
    fn pack(&self, lanes: usize, into: &mut [f32], row: &mut [f32]) {
        let q = self.inputs.q;
        let dim = q.dim();
        into.fill(0.0);
        for (local, i) in self.queries.clone().enumerate() {
            q.read(i, row);
            let panel = &mut into[local / lanes * lanes * dim..][..lanes * dim];
            for (column, &value) in panel.chunks_exact_mut(lanes).zip(&*row) {
                column[local % lanes] = value;
            }
        }
    }

    /// Writes the outputs of one panel, the first of which is query `start` of this strip, from
    /// the weighted sums `from`, `[dim, lane]`.
    #[inline(always)]
    fn unpack(
        &mut self,
        start: usize,
        lanes: usize,
        from: &[f32],
        max: &[f32],
        sum: &[f32],
        row: &mut [f32],
    ) {
        let dim = self.inputs.q.dim();
        let out = self.out.chunks_exact_mut(dim).enumerate().skip(start).take(lanes);
        for (lane, (query, out)) in out.enumerate() {
            // No weight at all, every score was −∞: zeros, whatever was summed.
            let empty = sum[lane] == 0.0;
            let inverse = sum[lane].recip();
            for (value, column) in row.iter_mut().zip(from.chunks_exact(lanes)) {
                *value = if empty { 0.0 } else { column[lane] * inverse };
            }
            T::narrow(&row[..dim], out);
            if let Some(lse) = self.lse.get_mut(query) {
                let max = f64::from(max[lane]) * f64::from(self.inputs.scale);
                *lse = (max + f64::from(sum[lane]).ln()) as f32;
            }
        }
    }
}

/// Whole groups of `N` vectors of `values`.
#[inline(always)]
fn vectors<S: Simd, const N: usize>(values: &[f32]) -> &[Lanes<S, N>] {
    S::as_simd_f32s(values).0.as_chunks().0
}

/// Whole groups of `N` vectors of `values`.
#[inline(always)]
fn vectors_mut<S: Simd, const N: usize>(values: &mut [f32]) -> &mut [Lanes<S, N>] {
    S::as_mut_simd_f32s(values).0.as_chunks_mut().0
}
