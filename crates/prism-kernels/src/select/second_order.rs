//! Selection by second-order scores ([`prism_core::second_order`]): a row's query sub-blocks score
//! every key sub-block that they see, and the row's masses are averages over the former of sums
//! over the latter.
//!
//! A worker does a row: a cube of planes, one query sub-block a plane, or a single unit. Scores
//! lie in a slot of memory of its own, which the next row overwrites.

use cubecl::prelude::*;
use cubecl::server::Handle;
use derive_new::new;
use prism_core::selection::extent;
use prism_core::{BlockGrid, SelectionRule};

use super::rule::{Pair, Row, RuleShape, select_row};
use super::sub_blocks::{Place, block_masses};
use super::write::{Line, write_row};
use super::{SelectNumbers, SelectRung, Selection, numbers, transposed, vector_size};
use crate::capabilities::Capabilities;
use crate::operand::buffer;
use crate::span::{Spans, span};
use crate::work::{cube_count, launch};

/// Bytes of scores and masses of all workers.
const SCRATCH: usize = 64 << 20;
/// Query sub-blocks scored at once: each key that is read serves them all.
const AT_ONCE: u32 = 8;

/// What a selection is made from.
#[derive(Debug, Clone, new)]
pub struct SecondOrderProblem<'a> {
    /// Means of query sub-blocks `[batch, q_heads, query sub-blocks, head_dim]` f32, contiguous.
    pub q_means: &'a Handle,
    /// Means of key sub-blocks `[batch, kv_heads, key sub-blocks, head_dim]` f32, contiguous.
    pub k_means: &'a Handle,
    /// Their variances.
    pub k_variances: &'a Handle,
    /// `[q_heads, kv_heads, head_dim]`.
    pub heads: [usize; 3],
    /// Block grid of each sequence.
    pub grids: &'a [BlockGrid],
    /// Positions a query and a key sub-block, which
    /// [`Scoring::validate`](prism_core::Scoring::validate) has checked.
    pub subs: [usize; 2],
    /// The selection rule.
    pub rule: &'a SelectionRule,
    /// Whether this is a chunk of a prompt that goes on.
    pub more_follows: bool,
}

/// Selects on the quickest rung.
pub fn select_by_second_order(
    client: &Client,
    capabilities: &Capabilities,
    problem: &SecondOrderProblem,
) -> Selection {
    let rung = if capabilities.plane.is_some() { SelectRung::Plane } else { SelectRung::Unit };
    select_by_second_order_on(client, capabilities, problem, rung)
}

/// Selects on a given rung: planes, which the device must have, or units. Tensor cores don't take
/// these scores: each key is weighed by the query that asks.
pub fn select_by_second_order_on(
    client: &Client,
    capabilities: &Capabilities,
    problem: &SecondOrderProblem,
    rung: SelectRung,
) -> Selection {
    let [q_heads, kv_heads, dim] = problem.heads;
    let selection = Selection::empty(client, problem.grids, q_heads);
    let (rows, key_blocks) = extent(problem.grids);
    let batch = problem.grids.len();
    let lines = batch * q_heads * rows;
    if lines == 0 {
        return selection;
    }
    let divided =
        |sub: usize| problem.grids.iter().map(|grid| grid.subdivided(sub)).collect::<Vec<_>>();
    let (q_subs, k_subs) =
        (extent(&divided(problem.subs[0])).0, extent(&divided(problem.subs[1])).1);
    let block = problem.grids[0].block();
    let per_row = (block / problem.subs[0]) as u32;
    let plane = capabilities.plane.filter(|_| rung != SelectRung::Unit);
    let (lanes, planes) = match plane {
        Some(lanes) => (lanes, AT_ONCE.min(capabilities.units / lanes).min(per_row).max(1)),
        None => (1, 1),
    };
    // Scores of the sub-blocks that are worked at once, masses of blocks as upper and lower halves.
    let slot = planes as usize * k_subs + 2 * key_blocks;
    let workers = (SCRATCH / (slot * 4)).clamp(1, lines);
    let (cubes, units) = match (plane, capabilities.cores) {
        (Some(lanes), _) => (workers, lanes * planes),
        (None, Some(cores)) => (1, (cores as usize).min(workers) as u32),
        (None, None) => {
            let units = 64.min(capabilities.units as usize).min(workers);
            (workers / units, units as u32)
        }
    };
    let alone = plane.is_none();
    let spans = Spans::new(client, problem.grids);
    let shape = SecondOrderShape {
        block,
        subs: problem.subs,
        dim,
        rule: RuleShape::new(problem.rule, lanes, 1, capabilities.copy_async),
        ragged: spans.ragged(),
        planes: planes as usize,
        units: if alone { 1 } else { units as usize },
        alone,
    };
    let workers = if alone { cubes * units as usize } else { cubes };
    let scratch = client.empty(workers * slot * 4);
    let vector = vector_size(client, dim);
    let k_shape = [batch * kv_heads, k_subs, dim];
    // Planes read neighbouring keys at once, a unit alone reads one after another.
    let keys = |x: &Handle| match alone {
        true => x.clone(),
        false => transposed(client, x, k_shape, vector),
    };
    let (means, variances) = (keys(problem.k_means), keys(problem.k_variances));
    let numbers = numbers(
        problem.rule,
        problem.heads,
        problem.grids,
        problem.more_follows,
        &spans,
        &selection,
    );
    let k_vectors = k_shape.iter().product::<usize>() / vector;
    // SAFETY: workers past the last row do nothing, sub-blocks lie within their buffers, and each
    // worker has its own slot of the scratch.
    unsafe {
        launch!(
            select_second_order,
            client,
            cube_count(client, cubes),
            if alone { CubeDim::new_1d(units) } else { CubeDim::new_2d(lanes, planes) },
            vector,
            buffer(problem.q_means, batch * q_heads * q_subs * dim / vector),
            buffer(&means, k_vectors),
            buffer(&variances, k_vectors),
            buffer(&selection.words, lines * selection.words_per_row),
            buffer(&selection.counts, lines),
            spans.arg(&selection.counts),
            buffer(&scratch, workers * slot),
            numbers,
            q_subs,
            k_subs,
            workers,
            shape,
        );
    }
    selection
}

/// What the kernel is compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct SecondOrderShape {
    pub block: usize,
    /// Positions a query and a key sub-block.
    pub subs: [usize; 2],
    pub dim: usize,
    pub rule: RuleShape,
    pub ragged: bool,
    /// Query sub-blocks worked at once.
    pub planes: usize,
    /// Units a worker.
    pub units: usize,
    /// Whether a worker is a single unit.
    pub alone: bool,
}

#[cube(launch_unchecked, create_dummy_kernel)]
fn select_second_order<N: Size>(
    q_means: &[Vector<f32, N>],
    k_means: &[Vector<f32, N>],
    k_variances: &[Vector<f32, N>],
    words: &mut [u32],
    counts: &mut [u32],
    lengths: &[u32],
    scratch: &mut [u32],
    numbers: SelectNumbers,
    q_subs: usize,
    k_subs: usize,
    workers: usize,
    #[comptime] shape: SecondOrderShape,
) {
    let planes = comptime!(shape.planes);
    let mut worker = CUBE_POS;
    let mut unit = UNIT_POS as usize;
    if comptime!(shape.alone) {
        worker = ABSOLUTE_POS;
        unit = 0usize;
    }
    if worker >= workers {
        terminate!();
    }
    let start = worker * (planes * k_subs + 2 * numbers.key_blocks);
    let mut index = worker;
    while index < numbers.lines {
        let head = index / numbers.rows;
        let row = index % numbers.rows;
        let batch = head / numbers.q_heads;
        let span = span(lengths, batch, numbers.q_len, numbers.kv_len, comptime!(shape.ragged));
        let block = comptime!(shape.block);
        let causal = span.causal_blocks(row, block);
        let dense = numbers.dense(&span, row, block);
        let line = Line { index, words_per_row: numbers.words_per_row, causal, dense };
        let searched = select(dense, 0usize, causal);
        let at = Place {
            scores: start,
            masses: start + planes * k_subs,
            head,
            kv_head: head / numbers.group,
            unit,
            causal: searched,
        };
        if searched > 0 {
            block_masses::<N>(
                q_means,
                k_means,
                k_variances,
                scratch,
                &numbers,
                &span,
                &at,
                row,
                q_subs,
                k_subs,
                shape,
            );
        }
        // One plane searches the row and writes it; the others find nothing to search.
        let first = unit < comptime!(shape.rule.lanes as usize);
        let place = Row {
            start: at.masses,
            stride: numbers.key_blocks,
            causal: select(first, searched, 0usize),
            lane: unit,
        };
        let rule = numbers.rule();
        let masses = scratch.as_vectorized_mut();
        let most = Pair::new(1u32 << 30u32);
        let selected = select_row::<Const<1>>(masses, &place, &rule, most, comptime!(shape.rule));
        if comptime!(!shape.alone) {
            sync_cube();
        }
        if first {
            write_row::<Const<1>>(
                words,
                counts,
                masses,
                &line,
                &place,
                &rule,
                &selected,
                comptime!(shape.rule),
            );
        }
        index += workers;
    }
}
