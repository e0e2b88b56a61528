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

use super::rule::{Pair, Row, RuleShape, score_bits, select_row, to_masses};
use super::write::{Line, write_row};
use super::{SelectNumbers, SelectRung, Selection, numbers, transposed, vector_size};
use crate::capabilities::Capabilities;
use crate::operand::buffer;
use crate::span::{Span, Spans, span};
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

/// Selects on a given rung, which the device must be able to run.
pub fn select_by_second_order(
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
    let plane = capabilities.plane.filter(|_| rung == SelectRung::Plane);
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
struct SecondOrderShape {
    block: usize,
    /// Positions a query and a key sub-block.
    subs: [usize; 2],
    dim: usize,
    rule: RuleShape,
    ragged: bool,
    /// Query sub-blocks worked at once.
    planes: usize,
    /// Units a worker.
    units: usize,
    /// Whether a worker is a single unit.
    alone: bool,
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
        let bits = Pair::new(31u32);
        let selected = select_row(scratch, &place, &rule, bits, comptime!(shape.rule));
        if comptime!(!shape.alone) {
            sync_cube();
        }
        if first {
            write_row(
                words,
                counts,
                scratch,
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

/// Where a worker keeps what, and what it works on.
#[derive(CubeType, Clone, Copy)]
struct Place {
    /// Scores of the query sub-blocks worked at once, then their masses.
    scores: usize,
    /// Upper halves of the blocks' sums, then lower halves.
    masses: usize,
    /// Query head and kv head among those of all sequences.
    head: usize,
    kv_head: usize,
    /// Index among the worker's units.
    unit: usize,
    /// Blocks that the row sees.
    causal: usize,
}

/// Masses of the causal blocks of a row, at `at.masses`.
#[cube]
fn block_masses<N: Size>(
    q_means: &[Vector<f32, N>],
    k_means: &[Vector<f32, N>],
    k_variances: &[Vector<f32, N>],
    scratch: &mut [u32],
    numbers: &SelectNumbers,
    span: &Span,
    at: &Place,
    row: usize,
    q_subs: usize,
    k_subs: usize,
    #[comptime] shape: SecondOrderShape,
) {
    let (q_sub, k_sub) = comptime!((shape.subs[0], shape.subs[1]));
    let planes = comptime!(shape.planes);
    let units = comptime!(shape.units);
    let per_row = comptime!(shape.block / shape.subs[0]);
    let per_block = comptime!(shape.block / shape.subs[1]);
    // Query sub-blocks of the row, on the grid of sub-blocks.
    let first =
        (span.first_position() / q_sub).max((span.first_block(shape.block) + row) * per_row);
    let end =
        ((span.first_block(shape.block) + row + 1) * per_row).min(span.kv_len.div_ceil(q_sub));

    let mut v = at.unit;
    while v < at.causal {
        scratch[at.masses + v] = 0u32;
        scratch[at.masses + numbers.key_blocks + v] = 0u32;
        v += units;
    }
    let mut sub = first;
    while sub < end {
        let count = (end - sub).min(planes);
        let reach = (((sub + count) * q_sub).min(span.kv_len)).div_ceil(k_sub);
        let q_line = at.head * q_subs + sub - span.first_position() / q_sub;
        score::<N>(q_means, k_means, k_variances, scratch, at, q_line, count, reach, k_subs, shape);
        if comptime!(!shape.alone) {
            sync_cube();
        }
        // Each plane its own sub-block.
        let mut own = 0usize;
        let mut lane = at.unit;
        if comptime!(!shape.alone) {
            own = at.unit / comptime!(shape.rule.lanes as usize);
            lane = at.unit % comptime!(shape.rule.lanes as usize);
        }
        let seen = (((sub + own + 1) * q_sub).min(span.kv_len)).div_ceil(k_sub);
        let scores = Row {
            start: at.scores + own * k_subs,
            stride: k_subs,
            causal: select(own < count, seen, 0usize),
            lane,
        };
        let _ = to_masses(scratch, &scores, 1usize, comptime!(shape.rule));
        if comptime!(!shape.alone) {
            sync_cube();
        }
        let mut v = at.unit;
        while v < at.causal {
            let mut high = scratch[at.masses + v];
            let mut low = scratch[at.masses + numbers.key_blocks + v];
            for i in 0..count {
                let seen = (((sub + i + 1) * q_sub).min(span.kv_len)).div_ceil(k_sub);
                let begin = (v * per_block).min(seen);
                let stop = (begin + per_block).min(seen);
                for j in begin..stop {
                    let mass = scratch[at.scores + i * k_subs + j];
                    high += mass >> 16u32;
                    low += mass & 0xffffu32;
                }
                high += low >> 16u32;
                low &= 0xffffu32;
            }
            scratch[at.masses + v] = high;
            scratch[at.masses + numbers.key_blocks + v] = low;
            v += units;
        }
        if comptime!(!shape.alone) {
            sync_cube();
        }
        sub += planes;
    }
    // The average, rounded down: a long division in two steps, where 64-bit integers may lack.
    let count = (end - first).max(1) as u32;
    let mut v = at.unit;
    while v < at.causal {
        let high = scratch[at.masses + v];
        let low = scratch[at.masses + numbers.key_blocks + v];
        let rest = ((high % count) << 16u32) | low;
        scratch[at.masses + v] = ((high / count) << 16u32) + rest / count;
        v += units;
    }
    if comptime!(!shape.alone) {
        sync_cube();
    }
}

/// Scores of `count` query sub-blocks from `q_line` on, over `reach` key sub-blocks: both terms as
/// one dot product of the query with k̄ + ½ q var.
#[cube]
fn score<N: Size>(
    q_means: &[Vector<f32, N>],
    k_means: &[Vector<f32, N>],
    k_variances: &[Vector<f32, N>],
    scratch: &mut [u32],
    at: &Place,
    q_line: usize,
    count: usize,
    reach: usize,
    k_subs: usize,
    #[comptime] shape: SecondOrderShape,
) {
    let planes = comptime!(shape.planes);
    let width = N::value();
    let chunks = comptime!(shape.dim / width);
    let scale = comptime!(1.0 / (shape.dim as f32).sqrt());
    let mut v = at.unit;
    while v < reach {
        let mut dots = Array::<f32>::new(planes);
        #[unroll]
        for i in 0..planes {
            dots[i] = 0.0f32;
        }
        for c in 0..chunks {
            let mut key = (at.kv_head * chunks + c) * k_subs + v;
            if comptime!(shape.alone) {
                key = (at.kv_head * k_subs + v) * chunks + c;
            }
            let mean = k_means[key];
            let variance = k_variances[key];
            #[unroll]
            for i in 0..planes {
                let line = q_line + i.min(count - 1);
                let q = q_means[line * chunks + c] * Vector::new(scale);
                #[unroll]
                for e in 0..width {
                    let x = q.extract(e);
                    let key = fma(x * 0.5f32, variance.extract(e), mean.extract(e));
                    dots[i] = fma(x, key, dots[i]);
                }
            }
        }
        #[unroll]
        for i in 0..planes {
            if i < count {
                scratch[at.scores + i * k_subs + v] = score_bits(dots[i]);
            }
        }
        v += comptime!(shape.units);
    }
}
