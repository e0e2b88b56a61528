//! From a selected row to its bits and its count.

use cubecl::prelude::*;

use super::rule::{Row, Rule, RuleShape, Selected, sum};

/// A row of the output, and what it may hold.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Line {
    /// Index among the rows of all heads.
    pub index: usize,
    pub words_per_row: usize,
    /// Causal blocks.
    pub causal: usize,
    /// Whether it reads all of them.
    pub dense: bool,
}

/// Writes the words and the count of one row by the units that work it, of which `row` is one.
#[cube]
pub(crate) fn write_row(
    words: &mut [u32],
    counts: &mut [u32],
    scratch: &mut [u32],
    line: &Line,
    row: &Row,
    rule: &Rule,
    selected: &Selected,
    #[comptime] shape: RuleShape,
) {
    let first = line.index * line.words_per_row;
    let mut count = 0u32;
    if comptime!(shape.lanes == 32) {
        for w in 0..line.words_per_row {
            let reads = reads(scratch, line, row, rule, selected, w * 32 + row.lane, shape);
            let word = plane_ballot(reads).extract(0usize);
            if row.lane == 0 {
                words[first + w] = word;
                count += word.count_ones();
            }
        }
    } else {
        let mut w = row.lane;
        while w < line.words_per_row {
            let mut word = 0u32;
            for i in 0..32usize {
                let reads = reads(scratch, line, row, rule, selected, w * 32 + i, shape);
                word |= select(reads, 1u32, 0u32) << i as u32;
            }
            words[first + w] = word;
            count += word.count_ones();
            w += comptime!(shape.lanes as usize);
        }
    }
    let count = sum(count, shape);
    if row.lane == 0 {
        counts[line.index] = count;
    }
}

/// Whether the row reads block `v`.
#[cube]
fn reads(
    scratch: &mut [u32],
    line: &Line,
    row: &Row,
    rule: &Rule,
    selected: &Selected,
    v: usize,
    #[comptime] shape: RuleShape,
) -> bool {
    let mut reads = line.dense;
    if v >= line.causal {
        reads = false;
    } else if !line.dense {
        reads = selected.reads(scratch, row, rule, v, shape);
    }
    reads
}
