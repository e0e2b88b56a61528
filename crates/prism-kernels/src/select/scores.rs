//! Scores of the queries of a cube for a tile of keys, in one band, by one warp on tensor cores.

use cubecl::cmma::{MatrixIdent, MmaDefinition};
use cubecl::prelude::*;
use half::f16;

use super::SelectNumbers;
use super::mma::{KEY_TILES, MmaShape, PAIR, PLANES, ROWS, WIDE, groups, held};
use super::rule::score_bits;
use crate::span::Span;

/// What a warp scores at once: all queries of the cube for `KEYS` keys.
#[derive(CubeType, Clone, Copy)]
pub(super) struct KeyTile {
    /// The team, whose queries and masses these are.
    pub team: usize,
    /// Query head among those of all sequences.
    pub head: usize,
    /// Row of the cube's first query.
    pub first_row: usize,
    /// Index of the head's first key.
    pub first_key: usize,
    /// First key of the tile within its head.
    pub group: usize,
    /// Band.
    pub z: usize,
}

/// Scores of a tile in its band, −∞ for keys that a query doesn't see. Returns whether those of this lane are
/// numbers.
#[cube]
pub(super) fn score(
    queries: &Shared<[Vector<u32, Const<4>>]>,
    q_inverses: &Shared<[f32]>,
    masses: &mut Shared<[Vector<u32, Const<4>>]>,
    k_halves: &[Vector<u32, Const<4>>],
    k_inverses: &[f32],
    numbers: &SelectNumbers,
    span: &Span,
    tile: &KeyTile,
    #[comptime] shape: MmaShape,
) -> bool {
    let planes = comptime!(PLANES);
    let pitch = comptime!(shape.pitch());
    let chunks = comptime!(shape.dim / WIDE);
    let key_tiles = comptime!(KEY_TILES);
    let lane = UNIT_POS_X as usize;
    let def = MmaDefinition::<f16, f16, f32>::new(16usize, 8usize, 16usize);
    let size!(NF) = def.vector_size(MatrixIdent::A);
    let size!(NC) = def.vector_size(MatrixIdent::Accumulator);

    // Of each tile of keys the scores of a row for a pair of them, and those of the row's neighbour.
    let mut sums = Array::<Vector<f32, NC>>::new(comptime!(KEY_TILES * 2));
    #[unroll]
    for i in 0..comptime!(KEY_TILES * 2) {
        sums[i] = Vector::new(0.0f32);
    }
    // The lane's key of each tile, and its dims.
    let mut lines = Array::<usize>::new(key_tiles);
    #[unroll]
    for n in 0..key_tiles {
        let key = (tile.group + n * 8 + lane / 4).min(numbers.key_blocks - 1);
        lines[n] = (tile.first_key + key) * chunks + lane % 4;
    }
    let base = tile.team * comptime!(shape.query_room());
    let mut left = groups(tile.z, shape);
    while left > 0u32 {
        let p = (left.find_first_set() - 1u32) as usize;
        let mut keys = Array::<Vector<u32, Const<4>>>::new(key_tiles);
        #[unroll]
        for n in 0..key_tiles {
            keys[n] = k_halves[lines[n] + p * 4];
        }
        let at = base + (lane / 4) * pitch + p * 4 + lane % 4;
        let high = queries[at];
        let low = queries[at + planes * pitch];
        // h·h, h·l, l·h: products that add to the same sums stand apart.
        #[unroll]
        for part in 0..3usize {
            let k_at = comptime!(part % 2 * 2);
            let query = if comptime!(part == 2) { low } else { high };
            let mut a = Array::<Vector<f16, NF>>::new(4usize);
            #[unroll]
            for i in 0..4usize {
                a[i] = Vector::<f16, NF>::reinterpret(query.extract(i));
            }
            #[unroll]
            for n in 0..key_tiles {
                let mut b = Array::<Vector<f16, NF>>::new(2usize);
                #[unroll]
                for i in 0..2usize {
                    b[i] = Vector::<f16, NF>::reinterpret(keys[n].extract(k_at + i));
                }
                let c = comptime!(n * 2);
                let mut acc = Array::<Vector<f32, NC>>::new(2usize);
                acc[0] = sums[c];
                acc[1] = sums[c + 1];
                let acc = def.execute::<NF, NF, NC>(&a, &b, &acc);
                sums[c] = acc[0];
                sums[c + 1] = acc[1];
            }
        }
        left = left & (left - 1u32);
    }

    let mut largest = 0u32;
    let pairs = masses.with_vector_size_mut::<Const<2>>();
    let row = (lane / 4) * comptime!(PAIR);
    #[unroll]
    for n in 0..key_tiles {
        let key = tile.group + n * 8 + (lane % 4) * 2;
        let mut inverses = Vector::<f32, Const<2>>::new(0.0f32);
        #[unroll]
        for e in 0..2usize {
            let key = tile.first_key + (key + e).min(numbers.key_blocks - 1);
            inverses.insert(e, k_inverses[key]);
        }
        #[unroll]
        for i in 0..comptime!(PAIR) {
            let causal = span.causal_blocks(tile.first_row + row + i, comptime!(shape.block));
            let inverse = q_inverses[tile.team * comptime!(ROWS) + row + i];
            let products = sums[comptime!(n * 2 + i)];
            let mut pair = Vector::<u32, Const<2>>::new(0xff80_0000u32);
            #[unroll]
            for e in 0..2usize {
                let score = products.extract(e) * inverse * inverses.extract(e);
                largest = largest.max(u32::reinterpret(score) & 0x7fff_ffffu32);
                let seen = key + e < causal;
                pair.insert(e, select(seen, u32::reinterpret(score), 0xff80_0000u32));
            }
            pairs[((tile.team * comptime!(ROWS) + row + i) * comptime!(shape.room) + key) / 2] =
                pair;
        }
    }
    largest < 0x7f80_0000u32
}

/// Takes the scores anew that this lane wrote, dim by dim.
#[cube]
pub(super) fn again(
    q_means: &[Vector<f32, Const<4>>],
    k_means: &[Vector<f32, Const<4>>],
    factors: &[f32],
    masses: &mut Shared<[Vector<u32, Const<4>>]>,
    numbers: &SelectNumbers,
    span: &Span,
    tile: &KeyTile,
    #[comptime] shape: MmaShape,
) {
    let chunks = comptime!(shape.dim / WIDE);
    let lane = UNIT_POS_X as usize;
    let masses = masses.with_vector_size_mut::<Const<1>>();
    for at in 0..comptime!(KEY_TILES * 2) {
        let key = tile.group + (at / 2) * 8 + (lane % 4) * 2 + at % 2;
        #[unroll]
        for i in 0..comptime!(PAIR) {
            let row = (lane / 4) * comptime!(PAIR) + i;
            if key < span.causal_blocks(tile.first_row + row, comptime!(shape.block)) {
                let line = tile.head * numbers.rows + tile.first_row + row;
                let k = (tile.first_key + key) * chunks;
                let factor = factors[line * 2 + tile.z];
                let mut sum = 0.0f32;
                for c in 0..chunks {
                    let held = held(c, tile.z, shape);
                    #[unroll]
                    for e in 0..4usize {
                        let q = q_means[line * chunks + c].extract(e) * factor;
                        let more = fma(q, k_means[k + c].extract(e), sum);
                        sum = select((held >> e as u32) & 1u32 == 1u32, more, sum);
                    }
                }
                masses[(tile.team * comptime!(ROWS) + row) * comptime!(shape.room) + key] =
                    Vector::new(score_bits(sum));
            }
        }
    }
}
