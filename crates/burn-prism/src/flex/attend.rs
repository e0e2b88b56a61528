//! Causal block-sparse attention over the tiles of a batch.

use std::cmp::Reverse;
use std::ops::Range;
use std::sync::Mutex;

use prism_core::error::{PrismError, Result};
use prism_core::grid::BlockGrid;
use prism_core::selection::{WORD_BITS, extent};
use prism_core::shape::AttentionShape;
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

pub use super::blocks::Blocks;
use super::tile::{Compute, Inputs, Scratch, TILE_QUERIES, Tile, strips};
use super::view::{Element, View};

/// Multiply-adds of one of the two products from which another thread pays off, some 10 µs.
const WORTH_A_THREAD: usize = 1 << 19;

/// One attention call.
#[derive(Debug, Clone, Copy)]
pub struct AttendProblem<'a, T> {
    /// Queries, `[batch, q_heads, q_len, head_dim]`.
    pub q: View<'a, T>,
    /// Keys, `[batch, kv_heads, kv_len, head_dim]`.
    pub k: View<'a, T>,
    /// Values, `[batch, kv_heads, kv_len, head_dim]`.
    pub v: View<'a, T>,
    /// Block grid of each sequence; what lies behind its lengths is padding and never read.
    pub grids: &'a [BlockGrid],
    /// Which key blocks are read; blocks past the diagonal are ignored.
    pub blocks: Blocks<'a>,
    /// Factor on q·k; above 0.
    pub scale: f32,
    /// Whether to return the log-sum-exp too.
    pub want_lse: bool,
}

/// Output `[batch, q_heads, q_len, head_dim]` and, if wanted, the natural log-sum-exp of the scores
/// `[batch, q_heads, q_len]`, both contiguous. Rows that read no key are 0 with LSE −∞.
pub type Attended<T> = (Vec<T>, Option<Vec<f32>>);

/// Softmax attention: query `i` of a sequence reads the first `visible_keys(i)` keys as far as
/// their blocks are selected for its row.
///
/// The result has the same bits whatever the number of threads (those of the current rayon pool),
/// and a selection of every causal block has those of [`Blocks::Dense`].
///
/// # Errors
/// Shapes, grids or words that don't fit each other.
pub fn attend<T: Element>(problem: &AttendProblem<'_, T>) -> Result<Attended<T>> {
    let shape = check(problem)?;
    let queries = shape.batch * shape.q_heads * shape.q_len;
    let mut out = vec![T::default(); queries * shape.head_dim];
    let mut lse = vec![f32::NEG_INFINITY; if problem.want_lse { queries } else { 0 }];
    let tiles = split(&shape, problem.grids, &mut out, &mut lse);
    Arch::new().dispatch(Schedule { problem, shape: &shape, tiles });
    Ok((out, problem.want_lse.then_some(lse)))
}

fn check<T: Element>(problem: &AttendProblem<'_, T>) -> Result<AttentionShape> {
    let AttendProblem { q, k, v, grids, blocks, .. } = problem;
    let shape = AttentionShape::new(q.shape(), k.shape(), v.shape())?;
    if grids.len() != shape.batch {
        let reason = format!("expected {} grids, got {}", shape.batch, grids.len());
        return Err(PrismError::Lengths { reason });
    }
    for (b, grid) in grids.iter().enumerate() {
        if grid.q_len() > shape.q_len || grid.kv_len() > shape.kv_len {
            let reason = format!(
                "sequence {b} has {} queries and {} keys, but the tensors hold {} and {}",
                grid.q_len(),
                grid.kv_len(),
                shape.q_len,
                shape.kv_len
            );
            return Err(PrismError::Lengths { reason });
        }
    }
    if let Blocks::Selected { words, words_per_row, rows } = *blocks {
        let (least_rows, key_blocks) = extent(grids);
        let total = [shape.batch, shape.q_heads, rows, words_per_row]
            .into_iter()
            .try_fold(1, usize::checked_mul);
        if rows < least_rows
            || words_per_row < key_blocks.div_ceil(WORD_BITS)
            || total != Some(words.len())
        {
            let reason = format!(
                "{} words of {rows} rows of {words_per_row} don't fit {} sequences of {} heads, \
                 {least_rows} rows and {key_blocks} key blocks",
                words.len(),
                shape.batch,
                shape.q_heads
            );
            return Err(PrismError::Selection { reason });
        }
    }
    Ok(shape)
}

/// All tiles of a batch, each with its part of the output.
fn split<'o, T>(
    shape: &AttentionShape,
    grids: &[BlockGrid],
    out: &'o mut [T],
    lse: &'o mut [f32],
) -> Vec<Tile<'o, T>> {
    let mut tiles = Vec::new();
    if out.is_empty() {
        return tiles;
    }
    let mut lse_heads = lse.chunks_exact_mut(shape.q_len);
    let out_heads = out.chunks_exact_mut(shape.q_len * shape.head_dim);
    let heads = (0..shape.batch).flat_map(|b| (0..shape.q_heads).map(move |h| (b, h)));
    for ((batch, head), mut out) in heads.zip(out_heads) {
        let mut lse = lse_heads.next().unwrap_or_default();
        let mut at = 0;
        for end in tile_ends(&grids[batch]) {
            let blind = at.max(grids[batch].blind_queries()) - at;
            let (start, len) = (at + blind, end - at - blind);
            take(&mut out, blind * shape.head_dim);
            take(&mut lse, blind);
            tiles.push(Tile {
                batch,
                head,
                queries: start..end,
                out: take(&mut out, len * shape.head_dim),
                lse: take(&mut lse, len),
            });
            at = end;
        }
    }
    tiles
}

/// Splits off the first `len` elements, fewer if there are fewer.
fn take<'o, T>(rest: &mut &'o mut [T], len: usize) -> &'o mut [T] {
    let all = std::mem::take(rest);
    let (part, after) = all.split_at_mut(len.min(all.len()));
    *rest = after;
    part
}

/// Ends of the tiles of a sequence: whole rows as long as they fit, else parts of one row.
fn tile_ends(grid: &BlockGrid) -> Vec<usize> {
    let mut ends = Vec::new();
    let mut start = grid.blind_queries();
    for row in 0..grid.rows() {
        let queries = grid.queries(row);
        if queries.end - start > TILE_QUERIES && queries.start > start {
            ends.push(queries.start);
            start = queries.start;
        }
        while queries.end - start > TILE_QUERIES {
            start += TILE_QUERIES;
            ends.push(start);
        }
    }
    if grid.rows() > 0 {
        ends.push(grid.q_len());
    }
    ends
}

struct Schedule<'c, 'a, 'o, T> {
    problem: &'c AttendProblem<'a, T>,
    shape: &'c AttentionShape,
    tiles: Vec<Tile<'o, T>>,
}

impl<T: Element> WithSimd for Schedule<'_, '_, '_, T> {
    type Output = ();

    fn with_simd<S: Simd>(self, simd: S) {
        let Self { problem, shape, tiles } = self;
        let line = |tile: &Tile<'_, T>| tile.batch * shape.q_heads + tile.head;
        let mut tiles: Vec<_> = tiles
            .into_iter()
            .map(|tile| {
                let grid = &problem.grids[tile.batch];
                let pairs = |strip: (usize, Range<usize>)| {
                    let blocks = problem.blocks.count(grid, line(&tile), strip.0);
                    blocks * grid.block().min(grid.kv_len()) * strip.1.len()
                };
                (strips(grid, tile.queries.clone()).map(pairs).sum(), tile)
            })
            .collect();
        // Longest first: what is left when a thread runs dry is short.
        tiles.sort_by_key(|&(pairs, _): &(usize, _)| Reverse(pairs));
        let work = tiles.iter().map(|(cost, _)| cost * shape.head_dim).sum::<usize>();
        let threads = rayon::current_num_threads().min(tiles.len()).min(1 + work / WORTH_A_THREAD);

        let queue = Mutex::new(tiles.into_iter());
        let next = || queue.lock().ok()?.next();
        let worker = |_| {
            let mut scratch = Scratch::new(shape.head_dim);
            while let Some((_, tile)) = next() {
                let kv_head = tile.head / shape.group();
                let inputs = Inputs {
                    q: problem.q.head(tile.batch, tile.head),
                    k: problem.k.head(tile.batch, kv_head),
                    v: problem.v.head(tile.batch, kv_head),
                    grid: problem.grids[tile.batch],
                    blocks: problem.blocks,
                    line: line(&tile),
                    scale: problem.scale,
                };
                simd.vectorize(Compute { inputs, tile, scratch: &mut scratch });
            }
        };
        if threads > 1 {
            (0..threads).into_par_iter().with_max_len(1).for_each(worker);
        } else {
            worker(0);
        }
    }
}
