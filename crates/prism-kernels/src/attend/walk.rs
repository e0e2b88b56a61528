//! The pieces of work and the blocks that each reads, the same for every rung.

use cubecl::prelude::*;

use super::AttendNumbers;
use crate::span::Span;

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

/// One piece of work: a tile of queries of one row of one head.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Item {
    /// Sequence and query head, batch-major.
    pub head: usize,
    pub row: usize,
    pub tile: usize,
}

/// Item number `i`: kv heads one after the other, so that their keys stay in cache; within one,
/// the rows that read most come first, and the heads of a group lie side by side.
#[cube]
pub(crate) fn item(
    order: &[u32],
    numbers: &AttendNumbers,
    i: usize,
    #[comptime] shape: WalkShape,
) -> Item {
    let tiles = comptime!(shape.tiles);
    let tile = i % tiles;
    let place = i / tiles;
    if comptime!(shape.ordered) {
        let line = usize::cast_from(order[place]);
        Item { head: line / numbers.rows, row: line % numbers.rows, tile }
    } else {
        let rest = place / numbers.group;
        let head = (rest / numbers.rows) * numbers.group + place % numbers.group;
        Item { head, row: numbers.rows - 1 - rest % numbers.rows, tile }
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

/// Causal blocks of a row; 0 where a shorter sequence lacks it.
#[cube]
pub(crate) fn causal_blocks(span: &Span, row: usize, #[comptime] block: usize) -> usize {
    let causal = (span.first_block(block) + row + 1).min(span.key_blocks(block));
    select(row < span.rows(block), causal, 0usize)
}

/// Positions of the queries of a tile of `size` within its row: first and end.
#[cube]
pub(crate) fn positions(
    span: &Span,
    row: usize,
    tile: usize,
    size: usize,
    #[comptime] block: usize,
) -> (usize, usize) {
    let start = (span.first_block(block) + row) * block;
    let end = (start + block).min(span.kv_len);
    let first = (start + tile * size).min(end);
    let last = (first + size).min(end);
    let seen = span.first_position();
    (first.max(seen), last.max(seen))
}
