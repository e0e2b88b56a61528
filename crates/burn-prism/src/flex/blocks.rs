//! Which key blocks a row of queries reads, as runs of neighbours.

use std::ops::Range;

use prism_core::grid::BlockGrid;
use prism_core::selection::WORD_BITS;

/// Which key blocks are read.
#[derive(Debug, Clone, Copy)]
pub enum Blocks<'a> {
    /// Every causal block.
    Dense,
    /// The blocks whose bit is set: bit `v % 32` of word `v / 32` of a row stands for block `v`.
    Selected {
        /// `[batch, q_heads, rows, words_per_row]`.
        words: &'a [u32],
        /// Words of one row.
        words_per_row: usize,
        /// Rows of one head.
        rows: usize,
    },
}

impl<'a> Blocks<'a> {
    /// Words of one row of the given line (`batch * q_heads + head`); `None` means all blocks.
    fn row(&self, line: usize, row: usize) -> Option<&'a [u32]> {
        match *self {
            Blocks::Dense => None,
            Blocks::Selected { words, words_per_row, rows } => {
                Some(&words[(line * rows + row) * words_per_row..][..words_per_row])
            }
        }
    }

    /// Number of key blocks that a row reads.
    pub(super) fn count(&self, grid: &BlockGrid, line: usize, row: usize) -> usize {
        let causal = grid.causal_blocks(row);
        let Some(words) = self.row(line, row) else {
            return causal;
        };
        let bits = |i: usize| (words[i] & low_bits(causal - i * WORD_BITS)).count_ones() as usize;
        (0..causal.div_ceil(WORD_BITS)).map(bits).sum()
    }

    /// Runs of consecutive key blocks that a row reads, increasing.
    ///
    /// Runs, so that small blocks still make large products and that a full selection takes the
    /// very steps of [`Blocks::Dense`].
    pub(super) fn runs(
        &self,
        grid: &BlockGrid,
        line: usize,
        row: usize,
    ) -> impl Iterator<Item = Range<usize>> + use<'a> {
        let causal = grid.causal_blocks(row);
        let words = self.row(line, row);
        let mut next = 0;
        std::iter::from_fn(move || {
            let Some(words) = words else {
                let run = next..causal;
                next = causal;
                return Some(run).filter(|run| !run.is_empty());
            };
            let start = find(words, next, causal, 0);
            next = find(words, start, causal, u32::MAX);
            Some(start..next).filter(|run| !run.is_empty())
        })
    }
}

/// First block of `from..end` whose bit differs from those of `skip` (0 or all ones), else `end`.
fn find(words: &[u32], from: usize, end: usize, skip: u32) -> usize {
    let mut at = from;
    while at < end {
        let rest = (words[at / WORD_BITS] ^ skip) >> (at % WORD_BITS);
        if rest != 0 {
            return (at + rest.trailing_zeros() as usize).min(end);
        }
        at = (at / WORD_BITS + 1) * WORD_BITS;
    }
    end
}

/// A word with its lowest `count` bits set.
fn low_bits(count: usize) -> u32 {
    if count >= WORD_BITS { u32::MAX } else { (1 << count) - 1 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_join_neighbours_and_stop_at_the_diagonal() {
        let grid = BlockGrid::new(1, 70, 70).unwrap();
        let mut words = vec![0u32; 70 * 3];
        words[69 * 3..].copy_from_slice(&[0x8000_0006, 0xffff_ffff, 0x2f]);
        words[40 * 3..][..3].copy_from_slice(&[u32::MAX; 3]);
        let blocks = Blocks::Selected { words: &words, words_per_row: 3, rows: 70 };
        let runs = |row| blocks.runs(&grid, 0, row).collect::<Vec<_>>();
        assert_eq!(runs(69), [1..3, 31..68, 69..70]);
        assert_eq!(runs(40), Blocks::Dense.runs(&grid, 0, 40).collect::<Vec<_>>());
        assert!(runs(3).is_empty());
        for row in 0..70 {
            assert_eq!(
                blocks.count(&grid, 0, row),
                runs(row).iter().map(Range::len).sum::<usize>()
            );
        }
    }
}
