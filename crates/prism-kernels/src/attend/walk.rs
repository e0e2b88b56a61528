//! The pieces of work and the blocks that each reads, the same for every rung.

use cubecl::prelude::*;

use super::AttendNumbers;
use crate::span::span;

/// Where the blocks of a row come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct WalkShape {
    /// Positions a block.
    pub block: usize,
    /// Whether every causal block is read.
    pub dense: bool,
    /// Whether an order of work is given.
    pub ordered: bool,
    /// Whether sequences differ in length.
    pub ragged: bool,
    /// Whether to write the LSE.
    pub lse: bool,
    /// Tiles of queries a row.
    pub tiles: usize,
}

/// One piece of work: some queries of one row of one head, and what they may read.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Tile {
    /// Sequence.
    pub batch: usize,
    /// Query head within the sequence, and the kv head that it reads.
    pub head: usize,
    pub kv_head: usize,
    /// Row of the selection, heads first.
    pub line: usize,
    /// Causal blocks of the row.
    pub causal: usize,
    /// Positions of the queries: first and end.
    pub first: usize,
    pub end: usize,
    /// Index of the first query within its tensor, and among the outputs of all heads.
    pub query: usize,
    pub place: usize,
}

#[cube]
impl Tile {
    /// Whether a shorter sequence has none of these queries.
    pub fn is_empty(&self) -> bool {
        self.causal == 0 || self.first >= self.end
    }
}

/// Piece of work number `i`, of at most `size` queries. Kv heads come one after the other, so that
/// their keys stay in cache; within one, the rows that read most come first, and the heads of a
/// group lie side by side.
#[cube]
pub(crate) fn tile(
    order: &[u32],
    lengths: &[u32],
    numbers: &AttendNumbers,
    i: usize,
    #[comptime] size: usize,
    #[comptime] shape: WalkShape,
) -> Tile {
    let block = comptime!(shape.block);
    let tiles = comptime!(shape.tiles);
    let within = i % tiles;
    let mut line = i / tiles;
    if comptime!(shape.ordered) {
        line = usize::cast_from(order[line]);
    } else {
        let rest = line / numbers.group;
        let head = (rest / numbers.rows) * numbers.group + line % numbers.group;
        line = head * numbers.rows + numbers.rows - 1 - rest % numbers.rows;
    }
    let row = line % numbers.rows;
    let global_head = line / numbers.rows;
    let batch = global_head / numbers.q_heads;
    let head = global_head % numbers.q_heads;
    let span = span(lengths, batch, numbers.q_len, numbers.kv_len, comptime!(shape.ragged));
    let causal = span.causal_blocks(row, block);
    let start = (span.first_block(block) + row) * block;
    let stop = (start + block).min(span.kv_len);
    let seen = span.first_position();
    let first = (start + within * size).min(stop);
    let end = (first + size).min(stop).max(seen);
    let first = first.max(seen);
    let query = first - seen + span.blind;
    Tile {
        batch,
        head,
        kv_head: head / numbers.group,
        line,
        causal,
        first,
        end,
        query,
        place: global_head * numbers.tensor_q_len + query,
    }
}

/// Bits of the blocks `32 · w ..` that the row at `line` reads; `causal` are its causal blocks.
#[cube]
pub(crate) fn word(
    words: &[u32],
    numbers: &AttendNumbers,
    line: usize,
    w: usize,
    causal: usize,
    #[comptime] dense: bool,
) -> u32 {
    let left = (causal - w * 32).min(32usize) as u32;
    let all = 0xffff_ffffu32 >> (32u32 - left);
    if comptime!(dense) { all } else { words[line * numbers.words_per_row + w] & all }
}
