//! From a selected row to its bits and its count.

use cubecl::prelude::*;
use prism_core::selection::WORD_BITS;

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
    let width = S::value();
    let mut count = 0u32;
    if comptime!(shape.lanes == 32) {
        // Each lane the bits of a vector, then the lanes that share a word.
        let sharing = comptime!(WORD_BITS / width);
        let mut i = row.lane;
        while i - row.lane < line.words_per_row * sharing {
            let mut word = bits::<S>(scratch, line, row, rule, selected, i, shape)
                << ((i % sharing) * width) as u32;
            let steps = comptime!(sharing.ilog2());
            #[unroll]
            for step in 0..steps {
                word |= plane_shuffle_xor(word, comptime!(1u32 << step));
            }
            let w = i / sharing;
            if i % sharing == 0 && w < line.words_per_row {
                words[first + w] = word;
                count += word.count_ones();
            }
            i += 32usize;
        }
    } else {
        let mut w = row.lane;
        while w < line.words_per_row {
            let mut word = 0u32;
            for i in 0..comptime!(WORD_BITS / width) {
                let bits = bits::<S>(
                    scratch,
                    line,
                    row,
                    rule,
                    selected,
                    w * comptime!(WORD_BITS / width) + i,
                    shape,
                );
                word |= bits << (i * width) as u32;
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

/// Which blocks of vector `i` the row reads, as its lowest bits.
#[cube]
fn bits<S: Size>(
    scratch: &mut [Vector<u32, S>],
    line: &Line,
    row: &Row,
    rule: &Rule,
    selected: &Selected,
    i: usize,
    #[comptime] shape: RuleShape,
) -> u32 {
    let width = S::value();
    let mut bits = 0u32;
    if i * width < line.causal {
        if line.dense {
            bits = comptime!(u32::MAX >> (WORD_BITS - width)).runtime();
        } else {
            let first = scratch[row.start + i];
            let mut second = first;
            if comptime!(shape.bands == 2) {
                second = scratch[row.start + row.stride + i];
            }
            #[unroll]
            for e in 0..width {
                let mut masses = Pair::new(first.extract(e));
                masses.insert(1usize, second.extract(e));
                let reads = selected.reads(masses, row, rule, i * width + e, shape);
                bits |= select(reads, comptime!(1u32 << e), 0u32);
            }
        }
        // Blocks of the last vector that aren't causal.
        let there = (line.causal - i * width).min(width) as u32;
        bits &= u32::MAX >> (comptime!(WORD_BITS as u32) - there);
    }
    bits
}
