//! Scores on tensor cores, then a plane a row. A tile of 8 queries makes the 16 rows of `mma.sync`
//! m16n8k8: one copy a band, with the dims of the other zeroed, so that a key that is read serves
//! both bands and a lane gets both scores of a pair.
//!
//! f32 operands are split in two TF32 halves, x = h + l exactly but for l's last bits:
//! q·k = h·h + (h·l + l·h) + l·l, of which the last term is below f32's own rounding. Where a sum
//! isn't finite its parts may cancel, and the product is taken anew, dim by dim.

use cubecl::cmma::{MatrixIdent, MmaDefinition};
use cubecl::prelude::*;

use super::rule::{Row, RuleShape, score_bits, select_row, to_masses};
use super::write::{Line, write_row};
use super::{SelectNumbers, SelectProblem, Selection, buffers, masked};
use crate::band_mask::BandMask;
use crate::capabilities::Capabilities;
use crate::span::{Span, Spans, span};
use crate::work::{cube_count, launch};

/// Elements of a vector: what a lane reads of a key or a query at once.
const WIDE: usize = 4;
/// Dims that a warp multiplies at once, in two steps: a lane's four lie side by side, since it
/// doesn't matter which dim a fragment calls which, as long as both operands agree.
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
    if !capabilities.mma_tf32 || dim % DIMS != 0 {
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
    let mut queries = Shared::<[Vector<f32, Const<4>>]>::new_aligned_slice(
        comptime!(bands * rows * pitch),
        16usize,
    );
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

    let mut at = UNIT_POS as usize;
    while at < rows * chunks {
        let row = at / chunks;
        let chunk = at % chunks;
        let line = head * numbers.rows + (first_row + row).min(numbers.rows - 1);
        let x = q_means[line * chunks + chunk];
        #[unroll]
        for i in 0..bands {
            let z = comptime!(shape.bands.present()[i]);
            queries[(i * rows + row) * pitch + chunk] =
                masked::<Const<4>>(x, factors[line * 2 + z], chunk * 4, comptime!(shape.bands), z);
        }
        at += comptime!(rows * 32);
    }
    sync_cube();

    // Scores of every row of the tile for the keys that its last row sees.
    let reach = span.causal_blocks((first_row + rows - 1).min(span.rows(block).max(1) - 1), block);
    let first_key = (head / numbers.group) * numbers.key_blocks;
    let mut group = UNIT_POS_Y as usize * comptime!(KEYS);
    while group < reach {
        score(
            &queries,
            &mut masses,
            k_means,
            &numbers,
            &span,
            first_row,
            first_key,
            group,
            step,
            shape,
        );
        group += comptime!(rows * KEYS);
    }
    sync_cube();

    // Each plane its own row.
    let own = UNIT_POS_Y as usize;
    let row = first_row + own;
    let causal = select(row < numbers.rows, span.causal_blocks(row, block), 0usize);
    let dense = numbers.dense(&span, row, block);
    let place = Row {
        start: own * comptime!(bands * room / 4),
        stride: comptime!(room / 4).runtime(),
        causal: select(dense, 0usize, causal),
        lane: UNIT_POS_X as usize,
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

/// Scores of all queries for the keys `group..group + KEYS`, by one warp; −∞ for those that a query
/// doesn't see.
#[cube]
fn score(
    queries: &Shared<[Vector<f32, Const<4>>]>,
    masses: &mut Shared<[Vector<u32, Const<4>>]>,
    k_means: &[Vector<f32, Const<4>>],
    numbers: &SelectNumbers,
    span: &Span,
    first_row: usize,
    first_key: usize,
    group: usize,
    step: usize,
    #[comptime] shape: MmaShape,
) {
    let bands = comptime!(shape.rule.bands as usize);
    let rows = comptime!(shape.rows());
    let tiles = comptime!(shape.tiles);
    let pitch = comptime!(shape.pitch());
    let chunks = comptime!(shape.dim / WIDE);
    let key_tiles = comptime!(KEY_TILES);
    let lane = UNIT_POS_X as usize;
    let def = MmaDefinition::<tf32, tf32, f32>::new(16usize, 8usize, 8usize);
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
        let key = (group + n * 8 + lane / 4).min(numbers.key_blocks - 1);
        lines[n] = (first_key + key) * chunks + lane % 4;
    }
    let runs = comptime!(shape.groups());
    #[unroll]
    for run in 0..comptime!(runs.len()) {
        let (from, to) = comptime!(runs[run]);
        // A step that the compiler doesn't know keeps the loop rolled.
        let mut p = from.runtime();
        while p < to {
            let mut keys = Sequence::<Array<Vector<tf32, NF>>>::new();
            #[unroll]
            for n in 0..key_tiles {
                keys.push(halves::<NF>(k_means[lines[n] + p * 4]));
            }
            #[unroll]
            for t in 0..tiles {
                let at = (t * 8 + lane / 4) * pitch + p * 4 + lane % 4;
                let first = halves::<NF>(queries[at]);
                let mut second = halves::<NF>(Vector::new(0.0f32));
                if comptime!(bands == 2) {
                    second = halves::<NF>(queries[at + rows * pitch]);
                }
                #[unroll]
                for s in 0..2usize {
                    let high = operand::<NF>(&first, &second, s * 2);
                    let low = operand::<NF>(&first, &second, s * 2 + 4);
                    // Products that add to the same sums stand apart.
                    #[unroll]
                    for n in 0..key_tiles {
                        let c = comptime!((t * KEY_TILES + n) * 2);
                        multiply::<NF, NC>(&def, &high, &keys[n], s * 2, &mut sums, c);
                    }
                    #[unroll]
                    for n in 0..key_tiles {
                        let c = comptime!((t * KEY_TILES + n) * 2);
                        multiply::<NF, NC>(&def, &high, &keys[n], s * 2 + 4, &mut sums, c);
                    }
                    #[unroll]
                    for n in 0..key_tiles {
                        let c = comptime!((t * KEY_TILES + n) * 2);
                        multiply::<NF, NC>(&def, &low, &keys[n], s * 2, &mut sums, c);
                    }
                }
            }
            p += step;
        }
    }

    let mut bad = false;
    let pairs = masses.with_vector_size_mut::<Const<2>>();
    #[unroll]
    for t in 0..tiles {
        let row = t * 8 + lane / 4;
        let causal = span.causal_blocks(first_row + row, comptime!(shape.block));
        #[unroll]
        for n in 0..key_tiles {
            let key = group + n * 8 + (lane % 4) * 2;
            #[unroll]
            for i in 0..bands {
                let scores = sums[comptime!((t * KEY_TILES + n) * 2 + i)];
                let mut pair = Vector::<u32, Const<2>>::new(0xff80_0000u32);
                #[unroll]
                for e in 0..2usize {
                    let score = scores.extract(e);
                    bad = bad || !finite(score);
                    let seen = key + e < causal;
                    pair.insert(e, select(seen, score_bits(score), 0xff80_0000u32));
                }
                pairs[((row * bands + i) * comptime!(shape.room) + key) / 2] = pair;
            }
        }
    }
    if bad {
        again(queries, masses, k_means, numbers, span, first_row, first_key, group, shape);
    }
}

/// Takes the scores anew that this lane wrote, dim by dim.
#[cube]
fn again(
    queries: &Shared<[Vector<f32, Const<4>>]>,
    masses: &mut Shared<[Vector<u32, Const<4>>]>,
    k_means: &[Vector<f32, Const<4>>],
    numbers: &SelectNumbers,
    span: &Span,
    first_row: usize,
    first_key: usize,
    group: usize,
    #[comptime] shape: MmaShape,
) {
    let bands = comptime!(shape.rule.bands as usize);
    let rows = comptime!(shape.rows());
    let chunks = comptime!(shape.dim / WIDE);
    let lane = UNIT_POS_X as usize;
    let masses = masses.with_vector_size_mut::<Const<1>>();
    for at in 0..comptime!(shape.tiles * KEY_TILES * 2) {
        let row = (at / comptime!(KEY_TILES * 2)) * 8 + lane / 4;
        let key = group + ((at / 2) % comptime!(KEY_TILES)) * 8 + (lane % 4) * 2 + at % 2;
        if key < span.causal_blocks(first_row + row, comptime!(shape.block)) {
            let k = (first_key + key) * chunks;
            #[unroll]
            for i in 0..bands {
                let q = (i * rows + row) * comptime!(shape.pitch());
                let mut sum = 0.0f32;
                #[unroll]
                for c in 0..chunks {
                    let z = comptime!(shape.bands.present()[i]);
                    if comptime!(shape.bands.touches(z, c * WIDE, WIDE)) {
                        let (q, k) = (queries[q + c], k_means[k + c]);
                        #[unroll]
                        for e in 0..4usize {
                            sum = fma(q.extract(e), k.extract(e), sum);
                        }
                    }
                }
                let place = (row * bands + i) * comptime!(shape.room) + key;
                masses[place] = Vector::new(score_bits(sum));
            }
        }
    }
}

/// The upper halves of four numbers, then the lower ones.
#[cube]
fn halves<NF: Size>(x: Vector<f32, Const<4>>) -> Array<Vector<tf32, NF>> {
    let mut out = Array::<Vector<tf32, NF>>::new(8usize);
    #[unroll]
    for e in 0..4usize {
        // TF32 has 10 bits of mantissa, f32 23.
        let high = u32::reinterpret(x.extract(e)) & 0xffff_e000u32;
        out[e] = Vector::<tf32, NF>::reinterpret(high);
        out[e + 4] = Vector::<tf32, NF>::reinterpret(x.extract(e) - f32::reinterpret(high));
    }
    out
}

/// The A operand of one step: the first band's queries above the second's.
#[cube]
fn operand<NF: Size>(
    first: &Array<Vector<tf32, NF>>,
    second: &Array<Vector<tf32, NF>>,
    #[comptime] at: usize,
) -> Array<Vector<tf32, NF>> {
    let mut out = Array::<Vector<tf32, NF>>::new(4usize);
    out[0] = first[at];
    out[1] = second[at];
    out[2] = first[at + 1];
    out[3] = second[at + 1];
    out
}

/// Adds the product with the two parts of a key from `at` on to the accumulator at `c`.
#[cube]
fn multiply<NF: Size, NC: Size>(
    def: &MmaDefinition<tf32, tf32, f32>,
    a: &Array<Vector<tf32, NF>>,
    key: &Array<Vector<tf32, NF>>,
    #[comptime] at: usize,
    sums: &mut Array<Vector<f32, NC>>,
    #[comptime] c: usize,
) {
    let mut b = Array::<Vector<tf32, NF>>::new(2usize);
    b[0] = key[at];
    b[1] = key[at + 1];
    let mut acc = Array::<Vector<f32, NC>>::new(2usize);
    acc[0] = sums[c];
    acc[1] = sums[c + 1];
    let acc = def.execute::<NF, NF, NC>(a, &b, &acc);
    sums[c] = acc[0];
    sums[c + 1] = acc[1];
}

#[cube]
fn finite(x: f32) -> bool {
    u32::reinterpret(x) & 0x7f80_0000u32 != 0x7f80_0000u32
}
