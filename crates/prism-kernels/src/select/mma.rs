//! Scores on tensor cores, then a plane a row. A tile of 8 queries makes the 16 rows of `mma.sync`
//! m16n8k16: one copy a band, with the dims of the other zeroed, so that a key that is read serves
//! both bands and a lane gets both scores of a pair.
//!
//! Operands are sums of two f16 [`halves`](super::halves): q·k = h·h + (h·l + l·h), but for l·l, which
//! is below f32's own rounding. Where a sum isn't finite, the product is taken anew, dim by dim.

use cubecl::cmma::{MatrixIdent, MmaDefinition};
use cubecl::prelude::*;
use half::f16;

use super::halves::{Split, halved, magnitude, scale, split};
use super::rule::{Row, RuleShape, score_bits, select_row, to_masses};
use super::write::{Line, write_row};
use super::{SelectNumbers, SelectProblem, Selection, buffers, masked};
use crate::band_mask::BandMask;
use crate::capabilities::Capabilities;
use crate::operand::buffer;
use crate::span::{Span, Spans, span};
use crate::work::{cube_count, launch};

/// Elements of a vector: what a lane reads of a key or a query at once.
const WIDE: usize = 4;
/// Dims that a warp multiplies at once. A lane's four lie side by side, since it doesn't matter which
/// dim a fragment calls which, as long as both operands agree.
const DIMS: usize = 16;
/// Tiles of 8 keys that a warp scores at once.
const KEY_TILES: usize = 4;
const KEYS: usize = KEY_TILES * 8;
/// Tiles of queries a cube: with two, keys are read from the second-level cache half as often.
const TILES: usize = 1;

/// What the kernel is compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct MmaShape {
    block: usize,
    dim: usize,
    bands: BandMask,
    rule: RuleShape,
    ragged: bool,
    /// Tiles of 8 queries a cube, which has as many warps as queries.
    tiles: usize,
    /// Masses that a row and band has room for.
    room: usize,
}

impl MmaShape {
    fn rows(&self) -> usize {
        self.tiles * 8
    }

    /// Vectors from one query to the next in shared memory: 4 modulo 8, so that the two queries that
    /// eight lanes read at once lie in different banks.
    fn pitch(&self) -> usize {
        (self.dim / WIDE - 4).next_multiple_of(8) + 4
    }

    fn shared_memory(&self) -> usize {
        self.rows() * self.rule.bands as usize * (self.pitch() * WIDE + self.room) * 4
    }

    /// Runs of groups of dims that any band holds.
    fn groups(&self) -> Vec<(usize, usize)> {
        let held = |p: &usize| (0..2).any(|z| self.bands.touches(z, p * DIMS, DIMS));
        let groups: Vec<usize> = (0..self.dim / DIMS).filter(held).collect();
        let runs = groups.chunk_by(|a, b| a + 1 == *b);
        runs.map(|run| (run[0], run[run.len() - 1] + 1)).collect()
    }
}

/// The layout for a problem, unless the device or its shared memory don't allow one.
fn layout(capabilities: &Capabilities, problem: &SelectProblem, ragged: bool) -> Option<MmaShape> {
    let dim = problem.heads[2];
    let key_blocks = prism_core::selection::extent(problem.grids).1;
    let bands = problem.bands.present().len();
    if !capabilities.mma_f16 || dim % DIMS != 0 {
        return None;
    }
    // The four queries that half a warp writes at once lie in different banks.
    let (banks, first) = if bands == 2 { (16, 4) } else { (32, 8) };
    let shape = |tiles| MmaShape {
        block: problem.grids[0].block(),
        dim,
        bands: *problem.bands,
        rule: RuleShape::new(problem.rule, 32, bands as u32, capabilities.copy_async),
        ragged,
        tiles,
        room: key_blocks.next_multiple_of(KEYS).next_multiple_of(banks) + first,
    };
    let fits = |shape: &MmaShape| {
        shape.shared_memory() <= capabilities.shared_memory
            && shape.rows() * 32 <= capabilities.units as usize
    };
    [std::env::var("TILES").map_or(TILES, |x| x.parse().unwrap()), 1]
        .map(shape)
        .into_iter()
        .find(fits)
}

/// Whether the kernel runs a problem.
pub(super) fn runs(capabilities: &Capabilities, problem: &SelectProblem) -> bool {
    layout(capabilities, problem, false).is_some()
}

pub(super) fn launch(
    client: &Client,
    capabilities: &Capabilities,
    problem: &SelectProblem,
    selection: &Selection,
) {
    let spans = Spans::new(client, problem.grids);
    let Some(shape) = layout(capabilities, problem, spans.ragged()) else { return };
    let heads = problem.grids.len() * problem.heads[0];
    let keys = prism_core::selection::extent(problem.grids).1;
    let k_rows = problem.grids.len() * problem.heads[1] * keys;
    let Split { halves, inverses } = split(client, problem.k_means, k_rows, shape.dim);
    let [q, k, factors, bits, counts, lengths] = buffers(problem, &spans, selection, WIDE);
    // SAFETY: queries and keys past the last are read as the last, and write nothing.
    unsafe {
        launch!(
            select_mma,
            client,
            cube_count(client, heads * selection.rows.div_ceil(shape.rows())),
            CubeDim::new_2d(32, shape.rows() as u32),
            q,
            k,
            buffer(&halves, k_rows * shape.dim / WIDE),
            buffer(&inverses, k_rows),
            factors,
            bits,
            counts,
            lengths,
            problem.numbers(&spans, selection),
            heads,
            1usize,
            shape,
        );
    }
}

#[cube(launch_unchecked, create_dummy_kernel)]
fn select_mma(
    q_means: &[Vector<f32, Const<4>>],
    k_means: &[Vector<f32, Const<4>>],
    k_halves: &[Vector<u32, Const<4>>],
    k_inverses: &[f32],
    factors: &[f32],
    words: &mut [u32],
    counts: &mut [u32],
    lengths: &[u32],
    numbers: SelectNumbers,
    heads: usize,
    step: usize,
    #[comptime] shape: MmaShape,
) {
    let block = comptime!(shape.block);
    let bands = comptime!(shape.rule.bands as usize);
    let rows = comptime!(shape.rows());
    let room = comptime!(shape.room);
    let pitch = comptime!(shape.pitch());
    let chunks = comptime!(shape.dim / WIDE);
    let mut queries = Shared::<[Vector<u32, Const<4>>]>::new_aligned_slice(
        comptime!(bands * rows * pitch),
        16usize,
    );
    let mut q_inverses = Shared::<[f32]>::new_slice(comptime!(bands * rows));
    let mut masses = Shared::<[Vector<u32, Const<4>>]>::new_aligned_slice(
        comptime!(bands * rows * room / 4),
        16usize,
    );
    // The longest rows of every head first.
    let cubes = numbers.rows.div_ceil(rows);
    if CUBE_POS >= heads * cubes {
        terminate!();
    }
    let head = CUBE_POS % heads;
    let first_row = (cubes - 1 - CUBE_POS / heads) * rows;
    let span = span(
        lengths,
        head / numbers.q_heads,
        numbers.q_len,
        numbers.kv_len,
        comptime!(shape.ragged),
    );

    // Each plane its own row, here and at the end.
    let own = UNIT_POS_Y as usize;
    let lane = UNIT_POS_X as usize;
    let row = first_row + own;
    let line = head * numbers.rows + row.min(numbers.rows - 1);
    #[unroll]
    for i in 0..bands {
        let z = comptime!(shape.bands.present()[i]);
        let factor = factors[line * 2 + z];
        let mut largest = 0u32;
        let mut c = lane;
        while c < chunks {
            let x = q_means[line * chunks + c];
            let x = masked::<Const<4>>(x, factor, c * 4, comptime!(shape.bands), z);
            largest = largest.max(magnitude(x));
            c += 32usize;
        }
        let scale = scale(plane_max(largest));
        let mut c = lane;
        while c < chunks {
            let x = q_means[line * chunks + c];
            let x = masked::<Const<4>>(x, factor, c * 4, comptime!(shape.bands), z);
            queries[(i * rows + own) * pitch + c] = halved(x, scale.factor);
            c += 32usize;
        }
        if lane == 0 {
            q_inverses[i * rows + own] = scale.inverse;
        }
    }
    sync_cube();

    // Scores of every row of the tile for the keys that its last row sees.
    let reach = span.causal_blocks((first_row + rows - 1).min(span.rows(block).max(1) - 1), block);
    let first_key = (head / numbers.group) * numbers.key_blocks;
    let mut group = UNIT_POS_Y as usize * comptime!(KEYS);
    while group < reach {
        let tile = KeyTile { head, first_row, first_key, group };
        let finite = score(
            &queries,
            &q_inverses,
            &mut masses,
            k_halves,
            k_inverses,
            &numbers,
            &span,
            &tile,
            step,
            shape,
        );
        if !finite {
            again(q_means, k_means, factors, &mut masses, &numbers, &span, &tile, shape);
        }
        group += comptime!(rows * KEYS);
    }
    sync_cube();

    let causal = select(row < numbers.rows, span.causal_blocks(row, block), 0usize);
    let dense = numbers.dense(&span, row, block);
    let place = Row {
        start: own * comptime!(bands * room / 4),
        stride: comptime!(room / 4).runtime(),
        causal: select(dense, 0usize, causal),
        lane,
    };
    let most = to_masses::<Const<4>>(&mut masses, &place, bands, comptime!(shape.rule));
    let rule = numbers.rule();
    let selected = select_row::<Const<4>>(&mut masses, &place, &rule, most, comptime!(shape.rule));
    // Lanes read each other's masses from here on.
    sync_plane();
    if row < numbers.rows {
        let line = Line {
            index: head * numbers.rows + row,
            words_per_row: numbers.words_per_row,
            causal,
            dense,
        };
        write_row::<Const<4>>(
            words,
            counts,
            &mut masses,
            &line,
            &place,
            &rule,
            &selected,
            comptime!(shape.rule),
        );
    }
}

/// What a warp scores at once: all queries of the cube for `KEYS` keys.
#[derive(CubeType, Clone, Copy)]
struct KeyTile {
    /// Query head among those of all sequences.
    head: usize,
    /// Row of the cube's first query.
    first_row: usize,
    /// Index of the head's first key.
    first_key: usize,
    /// First key of the tile within its head.
    group: usize,
}

/// Scores of a tile, −∞ for keys that a query doesn't see. Returns whether those of this lane are
/// numbers.
#[cube]
fn score(
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
    let rows = comptime!(shape.rows());
    let tiles = comptime!(shape.tiles);
    let pitch = comptime!(shape.pitch());
    let chunks = comptime!(shape.dim / WIDE);
    let key_tiles = comptime!(KEY_TILES);
    let lane = UNIT_POS_X as usize;
    let def = MmaDefinition::<f16, f16, f32>::new(16usize, 8usize, 16usize);
    let size!(NF) = def.vector_size(MatrixIdent::A);
    let size!(NC) = def.vector_size(MatrixIdent::Accumulator);

    // Of each tile of queries and of keys the first band's pair of scores and the second's.
    let mut sums = Array::<Vector<f32, NC>>::new(comptime!(tiles * KEY_TILES * 2));
    #[unroll]
    for i in 0..comptime!(tiles * KEY_TILES * 2) {
        sums[i] = Vector::new(0.0f32);
    }
    // The lane's key of each tile, and its dims.
    let mut lines = Array::<usize>::new(key_tiles);
    #[unroll]
    for n in 0..key_tiles {
        let key = (tile.group + n * 8 + lane / 4).min(numbers.key_blocks - 1);
        lines[n] = (tile.first_key + key) * chunks + lane % 4;
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
                keys[n] = k_halves[lines[n] + p * 4];
            }
            #[unroll]
            for t in 0..tiles {
                let at = (t * 8 + lane / 4) * pitch + p * 4 + lane % 4;
                let first = queries[at];
                let mut second = Vector::<u32, Const<4>>::new(0u32);
                if comptime!(bands == 2) {
                    second = queries[at + rows * pitch];
                }
                // h·h, h·l, l·h: products that add to the same sums stand apart.
                #[unroll]
                for part in 0..3usize {
                    let (q_at, k_at) = comptime!((part / 2 * 2, part % 2 * 2));
                    let mut a = Array::<Vector<f16, NF>>::new(4usize);
                    #[unroll]
                    for i in 0..2usize {
                        a[i * 2] = Vector::<f16, NF>::reinterpret(first.extract(q_at + i));
                        a[i * 2 + 1] = Vector::<f16, NF>::reinterpret(second.extract(q_at + i));
                    }
                    #[unroll]
                    for n in 0..key_tiles {
                        let mut b = Array::<Vector<f16, NF>>::new(2usize);
                        #[unroll]
                        for i in 0..2usize {
                            b[i] = Vector::<f16, NF>::reinterpret(keys[n].extract(k_at + i));
                        }
                        let c = comptime!((t * KEY_TILES + n) * 2);
                        let mut acc = Array::<Vector<f32, NC>>::new(2usize);
                        acc[0] = sums[c];
                        acc[1] = sums[c + 1];
                        let acc = def.execute::<NF, NF, NC>(&a, &b, &acc);
                        sums[c] = acc[0];
                        sums[c + 1] = acc[1];
                    }
                }
            }
            p += step;
        }
    }

    let mut all_finite = true;
    let pairs = masses.with_vector_size_mut::<Const<2>>();
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
        for t in 0..tiles {
            let row = t * 8 + lane / 4;
            let causal = span.causal_blocks(tile.first_row + row, comptime!(shape.block));
            #[unroll]
            for i in 0..bands {
                let inverse = q_inverses[i * rows + row];
                let products = sums[comptime!((t * KEY_TILES + n) * 2 + i)];
                let mut pair = Vector::<u32, Const<2>>::new(0xff80_0000u32);
                #[unroll]
                for e in 0..2usize {
                    let score = products.extract(e) * inverse * inverses.extract(e);
                    all_finite = all_finite && finite(score);
                    let seen = key + e < causal;
                    pair.insert(e, select(seen, score_bits(score), 0xff80_0000u32));
                }
                pairs[((row * bands + i) * comptime!(shape.room) + key) / 2] = pair;
            }
        }
    }
    all_finite
}

/// Takes the scores anew that this lane wrote, dim by dim.
#[cube]
fn again(
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
    for at in 0..comptime!(shape.tiles * KEY_TILES * 2) {
        let row = (at / comptime!(KEY_TILES * 2)) * 8 + lane / 4;
        let key = tile.group + ((at / 2) % comptime!(KEY_TILES)) * 8 + (lane % 4) * 2 + at % 2;
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

#[cube]
fn finite(x: f32) -> bool {
    u32::reinterpret(x) & 0x7f80_0000u32 != 0x7f80_0000u32
}
