//! Scores of the queries of a cube for a tile of keys, by one warp on tensor cores.

use cubecl::cmma::{MatrixIdent, MmaDefinition};
use cubecl::prelude::*;
use half::f16;

use super::SelectNumbers;
use super::mma::{KEY_TILES, MmaShape, ROWS, WIDE};
use super::rule::score_bits;
use crate::span::Span;

/// What a warp scores at once: all queries of the cube for `KEYS` keys.
#[derive(CubeType, Clone, Copy)]
pub(super) struct KeyTile {
    /// Query head among those of all sequences.
    pub head: usize,
    /// Row of the cube's first query.
    pub first_row: usize,
    /// Index of the head's first key.
    pub first_key: usize,
    /// First key of the tile within its head.
    pub group: usize,
}

/// Scores of a tile, −∞ for keys that a query doesn't see. Returns whether those of this lane are
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
    step: usize,
    #[comptime] shape: MmaShape,
) -> bool {
    let bands = comptime!(shape.rule.bands as usize);
    let rows = comptime!(ROWS);
    let pitch = comptime!(shape.pitch());
    let chunks = comptime!(shape.dim / WIDE);
    let key_tiles = comptime!(KEY_TILES);
    let lane = UNIT_POS_X as usize;
    let def = MmaDefinition::<f16, f16, f32>::new(16usize, 8usize, 16usize);
    let size!(NF) = def.vector_size(MatrixIdent::A);
    let size!(NC) = def.vector_size(MatrixIdent::Accumulator);

    // Of each tile of keys the first band's pair of scores and the second's.
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
        lines[n] = tile.first_key * chunks + key * 4 + lane % 4;
    }
    let runs = comptime!(shape.groups());
    #[unroll]
    for run in 0..comptime!(runs.len()) {
        let (from, to) = comptime!(runs[run]);
        // A step that the compiler doesn't know keeps the loop rolled.
        let mut p = from.runtime();
        while p < to {
            let mut keys = Array::<Vector<u32, Const<4>>>::new(key_tiles);
            #[unroll]
            for n in 0..key_tiles {
                keys[n] = k_halves[lines[n] + p * 4 * numbers.key_blocks];
            }
            let at = (lane / 4) * pitch + p * 4 + lane % 4;
            let high = queries[at];
            let low = queries[at + rows * pitch];
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
            p += step;
        }
    }

    let mut largest = 0u32;
    let pairs = masses.with_vector_size_mut::<Const<2>>();
    let row = lane / 4;
    let causal = span.causal_blocks(tile.first_row + row, comptime!(shape.block));
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
        for i in 0..bands {
            let inverse = q_inverses[i * rows + row];
            let products = sums[comptime!(n * 2 + i)];
            let mut pair = Vector::<u32, Const<2>>::new(0xff80_0000u32);
            #[unroll]
            for e in 0..2usize {
                let score = products.extract(e) * inverse * inverses.extract(e);
                largest = largest.max(u32::reinterpret(score) & 0x7fff_ffffu32);
                let seen = key + e < causal;
                pair.insert(e, select(seen, u32::reinterpret(score), 0xff80_0000u32));
            }
            pairs[((row * bands + i) * comptime!(shape.room) + key) / 2] = pair;
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
    let bands = comptime!(shape.rule.bands as usize);
    let chunks = comptime!(shape.dim / WIDE);
    let lane = UNIT_POS_X as usize;
    let masses = masses.with_vector_size_mut::<Const<1>>();
    for at in 0..comptime!(KEY_TILES * 2) {
        let row = lane / 4;
        let key = tile.group + (at / 2) * 8 + (lane % 4) * 2 + at % 2;
        if key < span.causal_blocks(tile.first_row + row, comptime!(shape.block)) {
            let line = tile.head * numbers.rows + tile.first_row + row;
            let k = (tile.first_key + key) * chunks;
            #[unroll]
            for i in 0..bands {
                let z = comptime!(shape.bands.present()[i]);
                let factor = factors[line * 2 + z];
                let mut sum = 0.0f32;
                #[unroll]
                for c in 0..chunks {
                    #[unroll]
                    for e in 0..4usize {
                        if comptime!(shape.bands.touches(z, c * WIDE + e, 1)) {
                            let q = q_means[line * chunks + c].extract(e) * factor;
                            sum = fma(q, k_means[k + c].extract(e), sum);
                        }
                    }
                }
                let place = (row * bands + i) * comptime!(shape.room) + key;
                masses[place] = Vector::new(score_bits(sum));
            }
        }
    }
}
