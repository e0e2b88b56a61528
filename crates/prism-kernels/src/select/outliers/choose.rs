//! From sums to bits: a block is read where its mass reaches the threshold for any query sub-block of
//! the row.

use cubecl::prelude::*;
use cubecl::server::Handle;
use prism_core::masses::MASS_ONE;
use prism_core::selection::WORD_BITS;

use super::{HostRun, Launch, OutliersShape, Run};
use crate::attend::softmax::nothing;
use crate::operand::buffer;
use crate::select::SelectNumbers;
use crate::select::log_sum::{log_sum, reference};
use crate::select::rule::Row;
use crate::select::search::forced;
use crate::span::span;
use crate::special::exp2;
use crate::work::{cube_count, launch};

/// Lines a cube of planes.
const PLANES: u32 = 4;

/// Chooses the blocks of the rows of a run.
pub(super) fn choose(launch: &Launch, run: &HostRun, shape: OutliersShape) {
    let Launch { client, capabilities, parts, selection, .. } = launch;
    let (lanes, per_cube) = capabilities.lines(PLANES);
    let cube = CubeDim::new_2d(lanes, per_cube);
    let count = |lines: usize| cube_count(client, lines.div_ceil(per_cube as usize));
    let (lines, rows) = (run.lines(shape), run.heads * run.rows);
    let sums = || buffer(&launch.sums, lines * parts.sizes.key_blocks);
    let share = f64::from(launch.problem.target) / f64::from(MASS_ONE);
    let thresholds: Handle = client.empty(lines * 4);
    let all_rows = parts.sizes.q_heads * selection.rows;
    // SAFETY: planes past the last line or row return, and each reads and writes its own.
    unsafe {
        launch!(
            outlier_thresholds,
            client,
            count(lines),
            cube,
            sums(),
            buffer(&thresholds, lines),
            launch.spans.arg(&selection.counts),
            launch.numbers(),
            launch.run(run),
            share.log2() as f32,
            lanes as usize,
            shape,
        );
        launch!(
            outlier_choice,
            client,
            count(rows),
            cube,
            sums(),
            buffer(&thresholds, lines),
            buffer(&selection.words, all_rows * selection.words_per_row),
            buffer(&selection.counts, all_rows),
            launch.spans.arg(&thresholds),
            launch.numbers(),
            launch.run(run),
            lanes as usize,
            shape,
        );
    }
}

/// The sum from which query sub-blocks ask for a block, +∞ where no block has one. A plane each, or a
/// unit.
#[cube(launch_unchecked, create_dummy_kernel)]
fn outlier_thresholds(
    sums: &[f32],
    thresholds: &mut [f32],
    lengths: &[u32],
    numbers: SelectNumbers,
    run: Run,
    share: f32,
    #[comptime] lanes: usize,
    #[comptime] shape: OutliersShape,
) {
    let lines = run.rows * comptime!(shape.per_row());
    let line = CUBE_POS * CUBE_DIM_Y as usize + UNIT_POS_Y as usize;
    if line >= run.heads * lines {
        terminate!();
    }
    let lane = UNIT_POS_X as usize;
    let head = run.first_head + line / lines;
    let batch = head / numbers.q_heads;
    let span = span(lengths, batch, numbers.q_len, numbers.kv_len, comptime!(shape.ragged));
    let query = run.query(&span, head, line % lines, shape);
    let blocks = query.visible.div_ceil(comptime!(shape.block));
    let start = line * numbers.key_blocks;
    let mut largest = nothing();
    let mut v = lane;
    while v < blocks {
        largest = largest.max(sums[start + v]);
        v += lanes;
    }
    if comptime!(lanes > 1) {
        largest = plane_max(largest);
    }
    let base = reference(largest);
    let mut total = 0.0f32;
    let mut v = lane;
    while v < blocks {
        total += exp2(sums[start + v] - base, false);
        v += lanes;
    }
    if comptime!(lanes > 1) {
        total = plane_sum(total);
    }
    if lane == 0 {
        let threshold = log_sum(largest, total, false) + share;
        thresholds[line] = select(total == 0.0f32, f32::reinterpret(0x7f80_0000u32), threshold);
    }
}

/// The words and counts of rows. A plane each, or a unit.
#[cube(launch_unchecked, create_dummy_kernel)]
fn outlier_choice(
    sums: &[f32],
    thresholds: &[f32],
    words: &mut [u32],
    counts: &mut [u32],
    lengths: &[u32],
    numbers: SelectNumbers,
    run: Run,
    #[comptime] lanes: usize,
    #[comptime] shape: OutliersShape,
) {
    let at = CUBE_POS * CUBE_DIM_Y as usize + UNIT_POS_Y as usize;
    if at >= run.heads * run.rows {
        terminate!();
    }
    let lane = UNIT_POS_X as usize;
    let bits = comptime!(WORD_BITS);
    let block = comptime!(shape.block);
    let head = run.first_head + at / run.rows;
    let row = run.first_row + at % run.rows;
    let batch = head / numbers.q_heads;
    let span = span(lengths, batch, numbers.q_len, numbers.kv_len, comptime!(shape.ragged));
    let causal = span.causal_blocks(row, block);
    let dense = numbers.dense(&span, row, block);
    let place = Row { start: 0usize, stride: 0usize, causal, lane };
    let index = head * numbers.rows + row;
    let first = index * numbers.words_per_row;
    // Its first query sub-block.
    let line = at * comptime!(shape.per_row());
    let mut count = 0u32;
    if comptime!(lanes == bits) {
        // A lane a bit of every word.
        for w in 0..numbers.words_per_row {
            let v = w * bits + lane;
            let mut reads = false;
            if v < causal {
                reads = dense
                    || forced(&numbers.rule(), &place, v)
                    || asked(sums, thresholds, line, v, &numbers, shape);
            }
            let word = plane_ballot(reads).extract(0usize);
            if lane == w % bits {
                words[first + w] = word;
                count += word.count_ones();
            }
        }
    } else {
        let mut w = lane;
        while w < numbers.words_per_row {
            let mut word = 0u32;
            let end = ((w + 1) * bits).min(causal);
            let mut v = w * bits;
            while v < end {
                let reads = dense
                    || forced(&numbers.rule(), &place, v)
                    || asked(sums, thresholds, line, v, &numbers, shape);
                word |= select(reads, 1u32, 0u32) << (v % bits) as u32;
                v += 1usize;
            }
            words[first + w] = word;
            count += word.count_ones();
            w += lanes;
        }
    }
    if comptime!(lanes > 1) {
        count = plane_sum(count);
    }
    // A row that would read nothing is filled with its heaviest block, or without a minimum with its
    // diagonal. The lane that wrote the word writes it anew.
    if count == 0u32 && causal > 0 {
        count = 1u32;
        let mut v = causal - 1;
        if numbers.min_blocks > 0u32 {
            v = heaviest(sums, thresholds, line, &place, &numbers, lanes, shape);
        }
        if (v / bits) % lanes == lane {
            words[first + v / bits] = 1u32 << (v % bits) as u32;
        }
    }
    if lane == 0 {
        counts[index] = count;
    }
}

/// Whether any query sub-block of a row asks for block `v`.
#[cube]
fn asked(
    sums: &[f32],
    thresholds: &[f32],
    line: usize,
    v: usize,
    numbers: &SelectNumbers,
    #[comptime] shape: OutliersShape,
) -> bool {
    excess(sums, thresholds, line, v, numbers, shape) >= 0.0f32
}

/// How far the mass of block `v` is above the threshold, as a logarithm: the most over the query
/// sub-blocks of the row whose first is `line`.
#[cube]
fn excess(
    sums: &[f32],
    thresholds: &[f32],
    line: usize,
    v: usize,
    numbers: &SelectNumbers,
    #[comptime] shape: OutliersShape,
) -> f32 {
    let mut most = nothing();
    for i in 0..comptime!(shape.per_row()) {
        let threshold = thresholds[line + i];
        // Of a sub-block that isn't there nothing was written.
        let there = u32::reinterpret(threshold) != 0x7f80_0000u32;
        let excess = sums[(line + i) * numbers.key_blocks + v] - threshold;
        most = most.max(select(there, excess, nothing()));
    }
    most
}

/// The heaviest causal block of a row, the first of several.
#[cube]
fn heaviest(
    sums: &[f32],
    thresholds: &[f32],
    line: usize,
    row: &Row,
    numbers: &SelectNumbers,
    #[comptime] lanes: usize,
    #[comptime] shape: OutliersShape,
) -> usize {
    let mut most = nothing();
    let mut heaviest = 0u32;
    let mut v = row.lane;
    while v < row.causal {
        let excess = excess(sums, thresholds, line, v, numbers, shape);
        if excess > most {
            most = excess;
            heaviest = v as u32;
        }
        v += lanes;
    }
    if comptime!(lanes > 1) {
        let all = plane_max(most);
        heaviest = plane_min(select(most == all, heaviest, u32::MAX));
    }
    heaviest as usize
}
