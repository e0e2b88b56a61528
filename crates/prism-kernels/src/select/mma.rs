//! Scores on tensor cores, then a plane a row. A tile of 8 queries makes the 16 rows of `mma.sync`
//! m16n8k16: one copy a band, with the dims of the other zeroed, so that a key that is read serves
//! both bands and a lane gets both scores of a pair.
//!
//! Operands are sums of two f16 [`halves`](super::halves): q·k = h·h + (h·l + l·h), but for l·l, which
//! is below f32's own rounding. Where a sum isn't finite, the product is taken anew, dim by dim.

use cubecl::prelude::*;

use super::digits::{BINS, heaviest_by_digits};
use super::halves::{Split, halved, magnitude, scale, split};
use super::rule::{Row, RuleShape, limited, select_row, to_masses};
use super::scores::{KeyTile, again, score};
use super::write::{Line, write_row};
use super::{SelectNumbers, SelectProblem, Selection, buffers, masked};
use crate::band_mask::BandMask;
use crate::capabilities::Capabilities;
use crate::operand::buffer;
use crate::span::{Spans, span};
use crate::work::{cube_count, launch};

/// Elements of a vector: what a lane reads of a key or a query at once.
pub(super) const WIDE: usize = 4;
/// Dims that a warp multiplies at once. A lane's four lie side by side, since it doesn't matter which
/// dim a fragment calls which, as long as both operands agree.
const DIMS: usize = 16;
/// Tiles of 8 keys that a warp scores at once.
pub(super) const KEY_TILES: usize = 4;
const KEYS: usize = KEY_TILES * 8;
/// Queries a cube, one a warp. With 16, keys are read from the second-level cache half as often, but
/// shared memory then holds the masses of one cube, whose warps wait for each other.
pub(super) const ROWS: usize = 8;

/// What the kernel is compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct MmaShape {
    pub block: usize,
    pub dim: usize,
    pub bands: BandMask,
    pub rule: RuleShape,
    pub ragged: bool,
    /// Masses that a row and band has room for.
    pub room: usize,
}

impl MmaShape {
    /// Vectors from one query to the next in shared memory: 4 modulo 8, so that the two queries that
    /// eight lanes read at once lie in different banks.
    pub fn pitch(&self) -> usize {
        (self.dim / WIDE - 4).next_multiple_of(8) + 4
    }

    /// Vectors that hold the queries and, once there are scores, the bins of the search.
    fn query_room(&self) -> usize {
        ROWS * (2 * self.pitch()).max(self.rule.bands as usize * BINS / WIDE)
    }

    fn shared_memory(&self) -> usize {
        let bands = self.rule.bands as usize;
        (self.query_room() * WIDE + ROWS * bands * (self.room + 1)) * 4
    }

    /// Runs of groups of dims that any band holds.
    pub fn groups(&self) -> Vec<(usize, usize)> {
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
    // What comes of CubeCL's LLVM compiler, which has no asynchronous copies, has not been checked.
    if !capabilities.mma_f16 || !capabilities.copy_async || dim % DIMS != 0 {
        return None;
    }
    // The four queries that half a warp writes at once lie in different banks.
    let (banks, first) = if bands == 2 { (16, 4) } else { (32, 8) };
    let shape = MmaShape {
        block: problem.grids[0].block(),
        dim,
        bands: *problem.bands,
        rule: RuleShape::new(problem.rule, 32, bands as u32, capabilities.copy_async),
        ragged,
        room: key_blocks.next_multiple_of(KEYS).next_multiple_of(banks) + first,
    };
    let fits = shape.shared_memory() <= capabilities.shared_memory
        && ROWS * 32 <= capabilities.units as usize;
    fits.then_some(shape)
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
    let k_heads = problem.grids.len() * problem.heads[1];
    let k_rows = k_heads * keys;
    let Split { halves, inverses } = split(client, problem.k_means, [k_heads, keys], shape.dim);
    let [q, k, factors, bits, counts, lengths] = buffers(problem, &spans, selection, WIDE);
    // SAFETY: queries and keys past the last are read as the last, and write nothing.
    unsafe {
        launch!(
            select_mma,
            client,
            cube_count(client, heads * selection.rows.div_ceil(ROWS)),
            CubeDim::new_2d(32, ROWS as u32),
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
    let rows = comptime!(ROWS);
    let room = comptime!(shape.room);
    let pitch = comptime!(shape.pitch());
    let chunks = comptime!(shape.dim / WIDE);
    let mut queries = Shared::<[Vector<u32, Const<4>>]>::new_aligned_slice(
        comptime!(shape.query_room()),
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
    // Of each query and four dims first the upper halves, then the lower ones, as a fragment takes
    // them: two dims of the first band, the same of the second, the other two dims.
    let fragments = queries.with_vector_size_mut::<Const<1>>();
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
            let x = halved(x, scale.factor);
            #[unroll]
            for part in 0..2usize {
                let at = ((part * rows + own) * pitch + c) * 4;
                #[unroll]
                for pair in 0..2usize {
                    fragments[at + pair * 2 + i] = Vector::new(x.extract(part * 2 + pair));
                    if comptime!(bands == 1) {
                        fragments[at + pair * 2 + 1] = Vector::new(0u32);
                    }
                }
            }
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
    let selected = if comptime!(shape.rule.by_mass) {
        let found = heaviest_by_digits::<Const<4>>(
            &mut masses,
            // Nobody reads the queries any more.
            &mut queries,
            own * comptime!(bands * BINS / WIDE),
            &place,
            &rule,
            rule.budget,
            most,
            bands,
            comptime!(shape.rule),
        );
        limited::<Const<4>>(&mut masses, &place, &rule, most, found, comptime!(shape.rule))
    } else {
        select_row::<Const<4>>(&mut masses, &place, &rule, most, comptime!(shape.rule))
    };
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
