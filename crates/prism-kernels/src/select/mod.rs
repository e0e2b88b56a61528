//! Selection: which key blocks each query block reads, from pooled vectors alone (paper §3.3).
//!
//! Scores, softmax and the rule run in one launch; probabilities never leave the multiprocessor.
//! [`plane`] gives a plane to each row and shares the keys among a tile of rows; [`unit`] gives a
//! unit to each row. Both score with [`score`]'s bands and select with [`rule`].

mod plane;
mod rule;
mod unit;

use cubecl::prelude::*;
use cubecl::server::Handle;
use derive_new::new;
use prism_core::selection::{WORD_BITS, extent};
use prism_core::{BlockGrid, Budget, SelectionRule};

use crate::band_mask::BandMask;
use crate::capabilities::Capabilities;
use crate::operand::buffer;
use crate::span::{Span, Spans};
use crate::work::widest;
use rule::{Rule, RuleShape};

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

/// How rows are worked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SelectRung {
    /// A unit a row: any runtime.
    Unit,
    /// A plane a row, the keys shared by a tile of rows.
    Plane,
}

impl SelectRung {
    /// The quickest that a device runs.
    pub fn best(capabilities: &Capabilities) -> Self {
        if capabilities.plane.is_some() { Self::Plane } else { Self::Unit }
    }
}

/// Selects on the quickest rung.
pub fn select_blocks(
    client: &Client,
    capabilities: &Capabilities,
    problem: &SelectProblem,
) -> Selection {
    select_blocks_on(client, capabilities, problem, SelectRung::best(capabilities))
}

/// Selects on a given rung, which the device must be able to run.
pub fn select_blocks_on(
    client: &Client,
    capabilities: &Capabilities,
    problem: &SelectProblem,
    rung: SelectRung,
) -> Selection {
    let [q_heads, _, _] = problem.heads;
    let (rows, key_blocks) = extent(problem.grids);
    let words_per_row = key_blocks.div_ceil(WORD_BITS);
    let lines = problem.grids.len() * q_heads * rows;
    let selection = Selection {
        words: client.empty((lines * words_per_row * 4).max(4)),
        counts: client.empty((lines * 4).max(4)),
        rows,
        words_per_row,
    };
    if lines > 0 {
        match (rung, capabilities.plane) {
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

fn numbers(problem: &SelectProblem, spans: &Spans, selection: &Selection) -> SelectNumbersLaunch {
    let [q_heads, kv_heads, _] = problem.heads;
    let rule = problem.rule;
    let cap = |n: usize| n.min(1 << 24);
    let budget = match rule.budget {
        Budget::Mass(_) => rule.target().unwrap_or(u32::MAX),
        Budget::TopK(k) => cap(k) as u32,
    };
    let dense_last = if problem.more_follows { 0 } else { cap(rule.dense_last_blocks) };
    SelectNumbersLaunch::new(
        spans.uniform.0,
        spans.uniform.1,
        q_heads,
        q_heads / kv_heads,
        selection.rows,
        extent(problem.grids).1,
        selection.words_per_row,
        problem.grids.len() * q_heads * selection.rows,
        budget,
        cap(rule.sink_blocks),
        cap(rule.recent_blocks),
        dense_last,
        cap(rule.min_blocks) as u32,
        cap(rule.max_blocks.unwrap_or(1 << 24)) as u32,
    )
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

    /// Causal blocks of a row; 0 where a shorter sequence lacks it.
    fn causal(&self, span: &Span, row: usize, #[comptime] block: usize) -> usize {
        let causal = (span.first_block(block) + row + 1).min(span.key_blocks(block));
        select(row < span.rows(block), causal, 0usize)
    }

    /// Whether a row reads every causal block.
    fn dense(&self, span: &Span, row: usize, #[comptime] block: usize) -> bool {
        row + self.dense_last >= span.rows(block)
    }
}
