//! The producer: takes pieces of work, walks their selection and keeps the rings full.

use cubecl::prelude::*;

use super::super::AttendNumbers;
use super::super::walk::{tile, word};
use super::kernel::Room;
use super::{HALF, HALF_COLUMNS, HopperShape, TILE};
use crate::hopper::{bulk, ptx};

/// What consumers are told of a piece of work, packed into two words. The second word:
/// queries (0: no more work) | first query within its tile << 8 | diagonal << 16 | tiles << 17.
#[derive(CubeType, Clone, Copy)]
pub(super) struct Item {
    /// First query among the outputs of all heads.
    pub place: u32,
    /// Queries, 1 to 128; 0 means that there is no more work.
    pub queries: u32,
    /// Position of the first query within the tile of keys on the diagonal.
    pub offset: u32,
    /// Whether the diagonal tile is read; it comes first.
    pub diagonal: bool,
    /// Whether any tile is read.
    pub any: bool,
}

#[cube]
impl Item {
    /// Leaves the item where consumers find it.
    pub fn publish(&self, room: &Room) {
        let diagonal = select(self.diagonal, comptime!(1u32 << 16), 0u32);
        let any = select(self.any, comptime!(1u32 << 17), 0u32);
        ptx::store(room.item, self.place);
        ptx::store(room.item + 4u32, self.queries | (self.offset << 8u32) | diagonal | any);
    }
}

/// A word that the producer left at `address`. The lane that releases the place is the one that reads it, so
/// that the next word comes after for certain.
#[cube]
pub(super) fn told(address: u32, lane: u32) -> u32 {
    let mut word = 0u32;
    if lane == 0u32 {
        word = ptx::load(address);
    }
    plane_broadcast(word, 0u32)
}

/// The item that [`Item::publish`] left.
#[cube]
pub(super) fn received(room: &Room, lane: u32) -> Item {
    let place = told(room.item, lane);
    let packed = told(room.item + 4u32, lane);
    Item {
        place,
        queries: packed & 255u32,
        offset: (packed >> 8u32) & 255u32,
        diagonal: (packed >> 16u32) & 1u32 == 1u32,
        any: packed >> 17u32 == 1u32,
    }
}

/// Has a tile of 128 positions from `row` on copied, in halves of 64 dims.
#[cube]
fn copy(
    map: u64,
    to: u32,
    row: u32,
    head: u32,
    batch: u32,
    full: u32,
    #[comptime] shape: HopperShape,
) {
    ptx::arrive_expecting(full, comptime!(shape.tile_bytes() as u32));
    #[unroll]
    for half in 0..comptime!(shape.halves() as u32) {
        bulk::copy_box(
            to + half * comptime!(HALF as u32),
            map,
            comptime!(half * HALF_COLUMNS as u32),
            row,
            head,
            batch,
            full,
        );
    }
}

#[cube]
pub(super) fn produce(
    q: u64,
    k: u64,
    v: u64,
    words: &[u32],
    order: &[u32],
    lengths: &[u32],
    taken: &mut [Atomic<u32>],
    numbers: &AttendNumbers,
    room: &Room,
    #[comptime] shape: HopperShape,
) {
    let walk = comptime!(shape.walk);
    let bounded = comptime!(shape.bounded);
    let tile_bytes = comptime!(shape.tile_bytes() as u32);
    // Tiles a block.
    let tiles = comptime!(shape.walk.tiles);
    // The stage to be filled, and the parity of the phase that must have ended before.
    let mut stage = 0u32;
    let mut parity = 1u32;
    let mut parity_q = 1u32;
    bulk::prefetch_map(q);
    bulk::prefetch_map(k);
    bulk::prefetch_map(v);
    let mut next_item = taken[0].fetch_add(1u32);
    while usize::cast_from(next_item) < numbers.items {
        let piece =
            tile(order, lengths, numbers, usize::cast_from(next_item), comptime!(TILE), walk);
        // One ahead: the answer takes long.
        next_item = taken[0].fetch_add(1u32);
        if !piece.is_empty() {
            let (line, causal) = (piece.line, piece.causal);
            let (batch, head) = (piece.batch as u32, piece.kv_head as u32);
            let diagonal_tile = piece.first / TILE;
            let own_block = causal - 1;
            let own_word = word(words, numbers, line, own_block / 32, causal, walk.dense);
            let diagonal = (own_word >> (own_block % 32) as u32) & 1u32 == 1u32;

            // The diagonal tile comes first, then the others from position 0 on: word `w` with its bits
            // still to come, the word after it, and the tiles still to come of the current block.
            let words_of_row = causal.div_ceil(32usize);
            let mut w = 0usize;
            let mut bits = word(words, numbers, line, 0usize, causal, walk.dense);
            let mut ahead = 0u32;
            if words_of_row > 1 {
                ahead = word(words, numbers, line, 1usize, causal, walk.dense);
            }
            let mut next = 0usize;
            let mut stop = 0usize;
            let mut current = diagonal_tile;
            let mut loaded = diagonal;
            let mut first = true;
            let mut more = true;
            while more {
                // The tile after the current one.
                while next >= stop && w < words_of_row {
                    if bits == 0u32 {
                        w += 1;
                        bits = ahead;
                        ahead = 0u32;
                        if w + 1 < words_of_row {
                            ahead = word(words, numbers, line, w + 1, causal, walk.dense);
                        }
                    } else {
                        let bit = bits.find_first_set() - 1u32;
                        bits &= bits - 1u32;
                        next = (w * 32 + bit as usize) * tiles;
                        stop = (next + tiles).min(diagonal_tile);
                    }
                }
                let found = next < stop;
                if first {
                    ptx::wait(room.empty_q, parity_q, bounded);
                    parity_q ^= 1u32;
                    let item = Item {
                        place: piece.place as u32,
                        queries: (piece.end - piece.first) as u32,
                        offset: (piece.first % TILE) as u32,
                        diagonal,
                        any: diagonal || found,
                    };
                    item.publish(room);
                    if item.any {
                        let head = piece.head as u32;
                        copy(q, room.q, piece.query as u32, head, batch, room.full_q, shape);
                    } else {
                        ptx::arrive(room.full_q);
                    }
                    first = false;
                }
                if loaded {
                    let row = (current * TILE) as u32;
                    ptx::wait(room.empty_k + stage * 8, parity, bounded);
                    ptx::store(room.last + stage * 4, select(found, 0u32, 1u32));
                    let to = room.k + stage * tile_bytes;
                    copy(k, to, row, head, batch, room.full_k + stage * 8, shape);
                    ptx::wait(room.empty_v + stage * 8, parity, bounded);
                    let to = room.v + stage * tile_bytes;
                    copy(v, to, row, head, batch, room.full_v + stage * 8, shape);
                    stage += 1u32;
                    if stage == comptime!(shape.stages as u32) {
                        stage = 0u32;
                        parity ^= 1u32;
                    }
                }
                current = next + 0usize;
                next += 1;
                loaded = found;
                more = found;
            }
        }
    }
    ptx::wait(room.empty_q, parity_q, bounded);
    let end = Item { place: 0u32, queries: 0u32, offset: 0u32, diagonal: false, any: false };
    end.publish(room);
    ptx::arrive(room.full_q);
}
