//! From a selected row to its bits and its count.

use cubecl::prelude::*;

use super::rule::{Pair, Row, Rule, RuleShape, Selected, sum};

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
pub(crate) fn write_row<S: Size>(
    words: &mut [u32],
    counts: &mut [u32],
    scratch: &mut [Vector<u32, S>],
    line: &Line,
    row: &Row,
    rule: &Rule,
    selected: &Selected,
    #[comptime] shape: RuleShape,
) {
    let first = line.index * line.words_per_row;
    let mut count = 0u32;
    if comptime!(shape.lanes == 32) {
        let held = line.causal.div_ceil(32usize);
        let mut w = held + row.lane;
        while w < line.words_per_row {
            words[first + w] = 0u32;
            w += 32usize;
        }
        for w in 0..held {
            let reads = reads::<S>(scratch, line, row, rule, selected, w * 32 + row.lane, shape);
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
                let reads = reads::<S>(scratch, line, row, rule, selected, w * 32 + i, shape);
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
fn reads<S: Size>(
    scratch: &mut [Vector<u32, S>],
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
        let scratch = scratch.with_vector_size::<Const<1>>();
        let width = S::value();
        let mut masses = Pair::new(0u32);
        #[unroll]
        for z in 0..comptime!(shape.bands as usize) {
            let place = (row.start + z * row.stride) * width + v;
            masses.insert(z, scratch[place].extract(0usize));
        }
        reads = selected.reads(masses, row, rule, v, shape);
    }
    reads
}
