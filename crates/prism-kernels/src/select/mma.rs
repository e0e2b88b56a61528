//! Scores on tensor cores, then a plane two rows. One band after the other: a tile of 16 queries makes
//! the rows of `mma.sync` m16n8k16, every key that is read serves all of them, and shared memory holds
//! the masses of one band. What a band keeps waits in the output for the other's.
//!
//! Operands are sums of two f16 [`halves`](super::halves): q·k = h·h + (h·l + l·h), but for l·l, which
//! is below f32's own rounding. Where a sum isn't finite, the product is taken anew, dim by dim.

use cubecl::prelude::*;

use super::digits::{BINS, heaviest_by_digits};
use super::halves::{Split, halved, magnitude, scale, split};
use super::rule::{Row, RuleShape, to_masses};
use super::scores::{KeyTile, again, score};
use super::search::{Search, heaviest};
use super::write::{Line, write_band};
use super::{SelectNumbers, SelectProblem, Selection, buffers};
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
/// Planes that work a tile together.
pub(super) const PLANES: usize = 8;
/// Such teams a cube, at most, each with its own tile. What hides the latency of one team's searches are
/// the other teams; in one cube, because the compiler then keeps to the registers that 24 warps leave.
const TEAMS: usize = 3;
/// Rows a plane, neighbours that it works side by side: one's arithmetic hides the other's latency.
pub(super) const PAIR: usize = 2;
/// Queries a tile.
pub(super) const ROWS: usize = PLANES * PAIR;

/// What the kernel is compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct MmaShape {
    pub block: usize,
    pub dim: usize,
    pub bands: BandMask,
    pub rule: RuleShape,
    pub ragged: bool,
    /// Masses that a row has room for.
    pub room: usize,
    /// Teams a cube.
    pub teams: usize,
}

impl MmaShape {
    /// Vectors from one query to the next in shared memory: 4 modulo 8, so that the two queries that
    /// eight lanes read at once lie in different banks.
    pub fn pitch(&self) -> usize {
        (self.dim / WIDE - 4).next_multiple_of(8) + 4
    }

    /// Vectors that hold the queries and, once there are scores, the bins of the search.
    pub fn query_room(&self) -> usize {
        (PLANES * 2 * self.pitch()).max(ROWS * BINS / WIDE)
    }

    /// Bytes a team.
    fn shared_memory(&self) -> usize {
        (self.query_room() * WIDE + ROWS * (self.room + 1)) * 4
    }

    /// Groups of dims that band `z` holds, as bits.
    fn groups(&self, z: usize) -> u32 {
        let held = |p: &usize| self.bands.touches(z, p * DIMS, DIMS);
        (0..self.dim / DIMS).filter(held).map(|p| 1 << p).sum()
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
    let mut shape = MmaShape {
        block: problem.grids[0].block(),
        dim,
        bands: *problem.bands,
        rule: RuleShape::new(problem.rule, 32, bands as u32, capabilities.copy_async),
        ragged,
        // The four pairs of rows that half a warp writes at once lie in different banks.
        room: key_blocks.next_multiple_of(KEYS) + 4,
        teams: 1,
    };
    // Limits compare the masses of both bands.
    let limited = shape.rule.fill || shape.rule.cut;
    let units = capabilities.units as usize / (PLANES * 32);
    shape.teams = TEAMS.min(units).min(capabilities.shared_memory / shape.shared_memory());
    let fits = shape.teams > 0;
    (fits && !limited).then_some(shape)
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
            cube_count(client, (heads * selection.rows.div_ceil(ROWS)).div_ceil(shape.teams)),
            CubeDim::new_2d(32, (shape.teams * PLANES) as u32),
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
    let room = comptime!(shape.room);
    let mut queries = Shared::<[Vector<u32, Const<4>>]>::new_aligned_slice(
        comptime!(shape.teams * shape.query_room()),
        16usize,
    );
    let mut q_inverses = Shared::<[f32]>::new_slice(comptime!(shape.teams * ROWS));
    let mut masses = Shared::<[Vector<u32, Const<4>>]>::new_aligned_slice(
        comptime!(shape.teams * ROWS * shape.room / 4),
        16usize,
    );
    // The longest rows of every head first.
    let tiles = numbers.rows.div_ceil(ROWS);
    let own = UNIT_POS_Y as usize % comptime!(PLANES);
    let team = UNIT_POS_Y as usize / comptime!(PLANES);
    let tile = CUBE_POS * comptime!(shape.teams) + team;
    if tile >= heads * tiles {
        terminate!();
    }
    let head = tile % heads;
    let first_row = (tiles - 1 - tile / heads) * comptime!(ROWS);
    let span = span(
        lengths,
        head / numbers.q_heads,
        numbers.q_len,
        numbers.kv_len,
        comptime!(shape.ragged),
    );
    let reach = span
        .causal_blocks((first_row + comptime!(ROWS - 1)).min(span.rows(block).max(1) - 1), block);
    let first_key = (head / numbers.group) * numbers.key_blocks;

    // The plane's rows. They are searched as if both were as long as the longer one: keys that the
    // other doesn't see have scores of −∞.
    let first = first_row + own * comptime!(PAIR);
    let mut longest = 0usize;
    #[unroll]
    for i in 0..comptime!(PAIR) {
        let searched = first + i < numbers.rows && !numbers.dense(&span, first + i, block);
        longest = select(searched, longest.max(span.causal_blocks(first + i, block)), longest);
    }
    let pair = Row {
        start: (team * comptime!(PLANES) + own) * comptime!(PAIR * shape.room / 4),
        stride: (room / 4).runtime(),
        causal: longest,
        lane: UNIT_POS_X as usize,
    };
    let rule = numbers.rule();
    // Band after band in one loop, so that the search is there once.
    let bands = comptime!(shape.bands.present());
    let mut band = 0usize;
    while band < comptime!(bands.len()).runtime() {
        let z = select(
            band == 0,
            comptime!(bands[0]).runtime(),
            comptime!(bands[bands.len() - 1]).runtime(),
        );
        meet(team);
        load_queries(
            q_means,
            factors,
            &mut queries,
            &mut q_inverses,
            &numbers,
            head,
            first,
            team,
            z,
            shape,
        );
        meet(team);
        // Scores of every row of the tile for the keys that its last row sees.
        let mut group = own * comptime!(KEYS);
        while group < reach {
            let tile = KeyTile { team, head, first_row, first_key, group, z };
            let finite = score(
                &queries,
                &q_inverses,
                &mut masses,
                k_halves,
                k_inverses,
                &numbers,
                &span,
                &tile,
                shape,
            );
            if !finite {
                again(q_means, k_means, factors, &mut masses, &numbers, &span, &tile, shape);
            }
            group += comptime!(PLANES * KEYS);
        }
        meet(team);

        let most = to_masses::<Const<4>>(&mut masses, &pair, PAIR, comptime!(shape.rule));
        let found = if comptime!(shape.rule.by_mass) {
            heaviest_by_digits::<Const<4>>(
                &mut masses,
                // Nobody reads the queries any more.
                &mut queries,
                team * comptime!(shape.query_room()) + own * comptime!(PAIR * BINS / WIDE),
                &pair,
                &rule,
                rule.budget,
                most,
                PAIR,
                comptime!(shape.rule),
            )
        } else {
            heaviest::<Const<4>>(
                &mut masses,
                &pair,
                &rule,
                rule.budget,
                most,
                PAIR,
                Search::Count,
                comptime!(shape.rule),
            )
        };
        #[unroll]
        for i in 0..comptime!(PAIR) {
            let row = first + i;
            if row < numbers.rows {
                let line = Line {
                    index: head * numbers.rows + row,
                    words_per_row: numbers.words_per_row,
                    causal: span.causal_blocks(row, block),
                    dense: numbers.dense(&span, row, block),
                };
                write_band::<Const<4>>(
                    words,
                    counts,
                    &mut masses,
                    &line,
                    &pair,
                    &rule,
                    &found,
                    i,
                    band == 0,
                    band + 1 == comptime!(bands.len()),
                    comptime!(shape.rule),
                );
            }
        }
        band += step;
    }
}

/// Puts the plane's queries, their dims of band `z`, into shared memory as fragments take them: of each
/// pair of rows and four dims two dims of the first row, the same of the second, the other two dims;
/// first the upper halves of all rows, then the lower ones.
#[cube]
fn load_queries(
    q_means: &[Vector<f32, Const<4>>],
    factors: &[f32],
    queries: &mut Shared<[Vector<u32, Const<4>>]>,
    q_inverses: &mut Shared<[f32]>,
    numbers: &SelectNumbers,
    head: usize,
    first: usize,
    team: usize,
    z: usize,
    #[comptime] shape: MmaShape,
) {
    let pitch = comptime!(shape.pitch());
    let chunks = comptime!(shape.dim / WIDE);
    let own = UNIT_POS_Y as usize % comptime!(PLANES);
    let base = team * comptime!(shape.query_room());
    let lane = UNIT_POS_X as usize;
    let fragments = queries.with_vector_size_mut::<Const<1>>();
    #[unroll]
    for i in 0..comptime!(PAIR) {
        let line = head * numbers.rows + (first + i).min(numbers.rows - 1);
        let factor = factors[line * 2 + z];
        let mut largest = 0u32;
        let mut c = lane;
        while c < chunks {
            let x = q_means[line * chunks + c];
            let x = within(x, factor, held(c, z, shape));
            largest = largest.max(magnitude(x));
            c += 32usize;
        }
        let scale = scale(plane_max(largest));
        let mut c = lane;
        while c < chunks {
            let x = q_means[line * chunks + c];
            let x = within(x, factor, held(c, z, shape));
            let x = halved(x, scale.factor);
            #[unroll]
            for part in 0..2usize {
                let at = (base + (part * comptime!(PLANES) + own) * pitch + c) * 4;
                #[unroll]
                for pair in 0..2usize {
                    fragments[at + pair * 2 + i] = Vector::new(x.extract(part * 2 + pair));
                }
            }
            c += 32usize;
        }
        if lane == 0 {
            q_inverses[team * comptime!(ROWS) + own * comptime!(PAIR) + i] = scale.inverse;
        }
    }
}

/// Groups of dims that band `z` holds, as bits.
#[cube]
pub(super) fn groups(z: usize, #[comptime] shape: MmaShape) -> u32 {
    select(z == 0, comptime!(shape.groups(0)).runtime(), comptime!(shape.groups(1)).runtime())
}

/// Which of the four dims of chunk `c` band `z` holds, as bits.
#[cube]
pub(super) fn held(c: usize, z: usize, #[comptime] shape: MmaShape) -> u32 {
    let mut word = 0u32;
    #[unroll]
    for w in 0..comptime!(shape.dim.div_ceil(32)) {
        let (high, low) = comptime!((shape.bands.high[w], shape.bands.low[w]));
        let bits = select(z == 0, high.runtime(), low.runtime());
        word = select(c / 8 == w, bits, word);
    }
    (word >> ((c % 8) * 4) as u32) & 15u32
}

/// `x · factor` in the dims that `held` has bits of, 0 in the others.
#[cube]
fn within(x: Vector<f32, Const<4>>, factor: f32, held: u32) -> Vector<f32, Const<4>> {
    let mut out = Vector::<f32, Const<4>>::new(0.0f32);
    #[unroll]
    for e in 0..4usize {
        out.insert(e, select((held >> e as u32) & 1u32 == 1u32, x.extract(e) * factor, 0.0f32));
    }
    out
}

/// Waits for the team: cubes' barrier 0 is everyone's.
#[cube]
fn meet(team: usize) {
    gpu_asm!(
        "bar.sync {id}, {n};",
        id = in(_) team as u32 + 1u32, n = const (PLANES * 32) as u32,
        options(explicit_mem, reads_address_space shared, writes_address_space shared)
    );
}
