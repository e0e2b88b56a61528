//! Selection: which key blocks each query block reads, from pooled vectors alone (paper §3.3).
//!
//! Scores, softmax and the rule run in one launch. The paper's scores: [`mma`] takes them on tensor
//! cores; [`plane`] gives a plane to each row and shares the keys among a tile of rows; [`unit`]
//! gives a unit to each row.
//! [`second_order`] scores in another way. These select with [`rule`] and [`write`] the result;
//! [`outliers`] has scores and a rule of its own; [`from_masses`] is the rule
//! alone, on masses such as [`antidiagonal`]'s, and [`prefix`] its search for rows of any length,
//! such as those of [`lines`].

pub mod antidiagonal;
mod digits;
mod from_masses;
mod halves;
mod lines;
mod log_sum;
mod mma;
pub mod outliers;
mod plane;
mod prefix;
mod rule;
mod scores;
mod search;
mod second_order;
mod sub_blocks;
mod unit;
mod write;

use cubecl::prelude::*;
use cubecl::server::Handle;
use derive_new::new;
use prism_core::selection::{WORD_BITS, extent};
use prism_core::{BlockGrid, Budget, SelectionRule};

use crate::band_mask::BandMask;
use crate::capabilities::Capabilities;
use crate::operand::buffer;
use crate::pool::in_band;
use crate::span::{Span, Spans};
use crate::work::{cube_count, launch, widest};
pub use from_masses::{MassesProblem, select_from_masses};
pub use lines::{Lines, line_sums};
pub use prefix::{finds_prefixes, heaviest_prefix};
use rule::{Rule, RuleShape};
pub use second_order::{SecondOrderProblem, select_by_second_order, select_by_second_order_on};

/// What a selection is made from.
#[derive(Debug, Clone, new)]
pub struct SelectProblem<'a> {
    /// Query block means `[batch, q_heads, rows, head_dim]` f32, contiguous.
    pub q_means: &'a Handle,
    /// Key block means `[batch, kv_heads, key_blocks, head_dim]` f32, contiguous.
    pub k_means: &'a Handle,
    /// Factors on the scores, `[batch, q_heads, rows, 2]` f32, of [`calibrate`](crate::calibrate).
    pub factors: &'a Handle,
    /// `[q_heads, kv_heads, head_dim]`.
    pub heads: [usize; 3],
    /// Block grid of each sequence.
    pub grids: &'a [BlockGrid],
    /// Dims of each band.
    pub bands: &'a BandMask,
    /// The selection rule.
    pub rule: &'a SelectionRule,
    /// Whether this is a chunk of a prompt that goes on.
    pub more_follows: bool,
}

/// A selection on a device, as [`BlockSelection`](prism_core::BlockSelection) describes it.
#[derive(Debug, Clone)]
pub struct Selection {
    /// `[batch, q_heads, rows, words_per_row]` u32.
    pub words: Handle,
    /// `[batch, q_heads, rows]` u32.
    pub counts: Handle,
    /// Query blocks of the longest sequence.
    pub rows: usize,
    /// Words of a row.
    pub words_per_row: usize,
}

impl Selection {
    /// Room for the selection of `q_heads` heads a sequence, which a kernel fills.
    fn empty(client: &Client, grids: &[BlockGrid], q_heads: usize) -> Self {
        let (rows, key_blocks) = extent(grids);
        let words_per_row = key_blocks.div_ceil(WORD_BITS);
        Self::room(client, grids.len() * q_heads * rows, rows, words_per_row)
    }

    /// Likewise of `lines` rows of all heads, `rows` of each.
    fn room(client: &Client, lines: usize, rows: usize, words_per_row: usize) -> Self {
        Self {
            words: client.empty((lines * words_per_row * 4).max(4)),
            counts: client.empty((lines * 4).max(4)),
            rows,
            words_per_row,
        }
    }
}

/// How rows are worked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SelectRung {
    /// A unit a row: any runtime.
    Unit,
    /// A plane a row, the keys shared by a tile of rows.
    Plane,
    /// The same with scores on tensor cores. Takes head_dim in multiples of 16, and rows that shared
    /// memory holds, which on an H200 are half a million tokens at blocks of 128.
    Mma,
}

impl std::fmt::Display for SelectRung {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Unit => "unit",
            Self::Plane => "plane",
            Self::Mma => "mma",
        })
    }
}

impl SelectRung {
    /// Every rung, the quickest first.
    pub const LADDER: [Self; 3] = [Self::Mma, Self::Plane, Self::Unit];

    /// Whether the rung can run the problem.
    pub fn runs(self, capabilities: &Capabilities, problem: &SelectProblem) -> bool {
        match self {
            Self::Unit => true,
            Self::Plane => capabilities.plane.is_some(),
            Self::Mma => mma::runs(capabilities, problem),
        }
    }

    /// The quickest that can run the problem.
    pub fn best(capabilities: &Capabilities, problem: &SelectProblem) -> Self {
        let runs = |rung: &Self| rung.runs(capabilities, problem);
        Self::LADDER.into_iter().find(runs).unwrap_or(Self::Unit)
    }
}

/// Selects on the quickest rung.
pub fn select_blocks(
    client: &Client,
    capabilities: &Capabilities,
    problem: &SelectProblem,
) -> Selection {
    select_blocks_on(client, capabilities, problem, SelectRung::best(capabilities, problem))
}

/// Selects on a given rung, which must [run](SelectRung::runs) the problem.
pub fn select_blocks_on(
    client: &Client,
    capabilities: &Capabilities,
    problem: &SelectProblem,
    rung: SelectRung,
) -> Selection {
    let selection = Selection::empty(client, problem.grids, problem.heads[0]);
    if problem.grids.len() * problem.heads[0] * selection.rows > 0 {
        match (rung, capabilities.plane) {
            (SelectRung::Mma, _) => mma::launch(client, capabilities, problem, &selection),
            (SelectRung::Plane, Some(lanes)) => {
                plane::launch(client, capabilities, problem, &selection, lanes);
            }
            _ => unit::launch(client, capabilities, problem, &selection),
        }
    }
    selection
}

/// What both kernels are compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct SelectShape {
    block: usize,
    dim: usize,
    bands: BandMask,
    rule: RuleShape,
    ragged: bool,
    /// Rows a cube (planes) or units in all (units).
    rows: usize,
    /// Units a cube.
    units: u32,
    /// Whether the masses lie in shared memory.
    shared: bool,
    /// Blocks that a row has room for.
    room: usize,
}

/// Numbers that both kernels take.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
pub(crate) struct SelectNumbers {
    q_len: usize,
    kv_len: usize,
    q_heads: usize,
    group: usize,
    rows: usize,
    key_blocks: usize,
    words_per_row: usize,
    /// Rows of all heads.
    lines: usize,
    budget: u32,
    sinks: usize,
    recents: usize,
    dense_last: usize,
    min_blocks: u32,
    max_blocks: u32,
}

fn numbers(
    rule: &SelectionRule,
    [q_heads, kv_heads, _]: [usize; 3],
    grids: &[BlockGrid],
    more_follows: bool,
    spans: &Spans,
    selection: &Selection,
) -> SelectNumbersLaunch {
    let cap = |n: usize| n.min(1 << 24);
    let budget = match rule.budget {
        Budget::Mass(_) => rule.target().unwrap_or(u32::MAX),
        Budget::TopK(k) => cap(k) as u32,
    };
    let dense_last = if more_follows { 0 } else { cap(rule.dense_last_blocks) };
    SelectNumbersLaunch::new(
        spans.uniform.0,
        spans.uniform.1,
        q_heads,
        q_heads / kv_heads,
        selection.rows,
        extent(grids).1,
        selection.words_per_row,
        grids.len() * q_heads * selection.rows,
        budget,
        cap(rule.sink_blocks),
        cap(rule.recent_blocks),
        dense_last,
        cap(rule.min_blocks) as u32,
        cap(rule.max_blocks.unwrap_or(1 << 24)) as u32,
    )
}

impl SelectProblem<'_> {
    fn numbers(&self, spans: &Spans, selection: &Selection) -> SelectNumbersLaunch {
        numbers(self.rule, self.heads, self.grids, self.more_follows, spans, selection)
    }
}

/// The buffers of a launch: pooled Q and K in vectors of `vector`, factors, words, counts, lengths.
fn buffers(
    problem: &SelectProblem,
    spans: &Spans,
    selection: &Selection,
    vector: usize,
) -> [BufferArg; 6] {
    let [q_heads, kv_heads, dim] = problem.heads;
    let batch = problem.grids.len();
    let lines = batch * q_heads * selection.rows;
    [
        buffer(problem.q_means, lines * dim / vector),
        buffer(problem.k_means, batch * kv_heads * extent(problem.grids).1 * dim / vector),
        buffer(problem.factors, lines * 2),
        buffer(&selection.words, lines * selection.words_per_row),
        buffer(&selection.counts, lines),
        spans.arg(&selection.counts),
    ]
}

fn vector_size(client: &Client, dim: usize) -> usize {
    let size = if dim % 4 == 0 {
        4
    } else if dim % 2 == 0 {
        2
    } else {
        1
    };
    widest(client, size)
}

#[cube]
impl SelectNumbers {
    fn rule(&self) -> Rule {
        Rule {
            budget: self.budget,
            sinks: self.sinks,
            recents: self.recents,
            min_blocks: self.min_blocks,
            max_blocks: self.max_blocks,
        }
    }

    /// Whether a row reads every causal block.
    fn dense(&self, span: &Span, row: usize, #[comptime] block: usize) -> bool {
        row + self.dense_last >= span.rows(block)
    }
}

/// Rows `[heads, blocks, head_dim]` as `[heads, head_dim / vector, blocks]` vectors, so that units
/// that score neighbouring keys read neighbouring vectors.
fn transposed(
    client: &Client,
    rows: &Handle,
    [heads, blocks, dim]: [usize; 3],
    vector: usize,
) -> Handle {
    let vectors = heads * blocks * dim / vector;
    let out = client.empty(vectors * vector * 4);
    let units = 64u32.min(client.properties().hardware.max_units_per_cube);
    // SAFETY: units past the last vector return.
    unsafe {
        launch!(
            transpose_kernel,
            client,
            cube_count(client, vectors.div_ceil(units as usize)),
            CubeDim::new_1d(units),
            vector,
            buffer(rows, vectors),
            buffer(&out, vectors),
            vectors,
            blocks,
            dim / vector,
        );
    }
    out
}

#[cube(launch_unchecked, create_dummy_kernel)]
fn transpose_kernel<N: Size>(
    rows: &[Vector<f32, N>],
    out: &mut [Vector<f32, N>],
    vectors: usize,
    blocks: usize,
    chunks: usize,
) {
    let i = ABSOLUTE_POS;
    if i >= vectors {
        terminate!();
    }
    let v = i % blocks;
    let c = (i / blocks) % chunks;
    let head = i / (blocks * chunks);
    out[i] = rows[(head * blocks + v) * chunks + c];
}

/// `x · factor` within band `z`, 0 outside, where the vector begins at dim `first`.
#[cube]
fn masked<N: Size>(
    x: Vector<f32, N>,
    factor: f32,
    first: usize,
    #[comptime] bands: BandMask,
    #[comptime] z: usize,
) -> Vector<f32, N> {
    let mut out = Vector::<f32, N>::new(0.0f32);
    let width = N::value();
    #[unroll]
    for i in 0..width {
        out.insert(i, select(in_band(first + i, bands, z), x.extract(i) * factor, 0.0f32));
    }
    out
}
