//! The absolute block grid: where queries and keys of one sequence fall.
//!
//! Query `i` of a sequence sits at position `kv_len − q_len + i` (bottom-right causal). Key block
//! `v` covers positions `[vB, (v+1)B)`, and query blocks live on the *same* grid: a chunk that
//! starts mid-block has a partial first block, row `r` of a selection is query block
//! `first_block() + r`, it may read key blocks `v ≤ first_block() + r`, and only the last of
//! those needs the token mask. Queries before position 0 (`q_len > kv_len`) see no key and belong
//! to no block.

use std::ops::Range;

use crate::error::{PrismError, Result};

/// Smallest block size.
pub const MIN_BLOCK: usize = 1;
/// Largest block size.
pub const MAX_BLOCK: usize = 1 << 20;

/// Which side of the attention blocks are taken from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// Query blocks: the rows of a selection, the first of which may start mid-block.
    Queries,
    /// Key blocks.
    Keys,
}

/// Block grid of one sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BlockGrid {
    block: usize,
    q_len: usize,
    kv_len: usize,
}

impl BlockGrid {
    /// Grid of blocks of `block` positions for `q_len` queries that end where `kv_len` keys end.
    ///
    /// # Errors
    /// A block size outside `MIN_BLOCK..=MAX_BLOCK`.
    pub fn new(block: usize, q_len: usize, kv_len: usize) -> Result<Self> {
        if !(MIN_BLOCK..=MAX_BLOCK).contains(&block) {
            return Err(PrismError::BlockSize { min: MIN_BLOCK, max: MAX_BLOCK, got: block });
        }
        Ok(Self { block, q_len, kv_len })
    }

    /// The same sequence in sub-blocks of `sub` positions (at least 1, at most a block).
    pub fn subdivided(&self, sub: usize) -> Self {
        Self { block: sub.clamp(1, self.block), ..*self }
    }

    /// Positions a block.
    pub fn block(&self) -> usize {
        self.block
    }

    /// Queries of the sequence.
    pub fn q_len(&self) -> usize {
        self.q_len
    }

    /// Keys of the sequence.
    pub fn kv_len(&self) -> usize {
        self.kv_len
    }

    /// Leading queries before position 0, which see no key (`q_len > kv_len`).
    pub fn blind_queries(&self) -> usize {
        self.q_len.saturating_sub(self.kv_len)
    }

    /// Position of the first query that sees a key.
    pub fn first_position(&self) -> usize {
        self.kv_len.saturating_sub(self.q_len)
    }

    /// Absolute index of the first query block, that of row 0.
    pub fn first_block(&self) -> usize {
        self.first_position() / self.block
    }

    /// Query blocks, the rows of a selection.
    pub fn rows(&self) -> usize {
        if self.first_position() == self.kv_len {
            return 0;
        }
        self.key_blocks() - self.first_block()
    }

    /// Key blocks.
    pub fn key_blocks(&self) -> usize {
        self.kv_len.div_ceil(self.block)
    }

    /// Key blocks that row `row` may read: blocks `0..causal_blocks(row)`.
    pub fn causal_blocks(&self, row: usize) -> usize {
        (self.first_block() + row + 1).min(self.key_blocks())
    }

    /// Key blocks that the last of some rows may read; 0 for no rows.
    pub fn causal_blocks_of(&self, rows: &Range<usize>) -> usize {
        rows.end.checked_sub(1).map_or(0, |row| self.causal_blocks(row))
    }

    /// Causal (row, key block) pairs of the whole grid.
    pub fn causal_pairs(&self) -> usize {
        (0..self.rows()).map(|row| self.causal_blocks(row)).sum()
    }

    /// Keys of block `v`, as indices into the sequence.
    pub fn keys(&self, v: usize) -> Range<usize> {
        (v * self.block).min(self.kv_len)..((v + 1) * self.block).min(self.kv_len)
    }

    /// Queries of row `row`, as indices into the sequence's queries.
    pub fn queries(&self, row: usize) -> Range<usize> {
        let block = self.first_block() + row;
        let to_query = |position: usize| {
            position.clamp(self.first_position(), self.kv_len) + self.blind_queries()
                - self.first_position()
        };
        to_query(block * self.block)..to_query((block + 1) * self.block)
    }

    /// Number of keys that query `i` (an index into the sequence's queries) may read.
    pub fn visible_keys(&self, i: usize) -> usize {
        (self.kv_len + i + 1).saturating_sub(self.q_len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_seeing_query_is_in_exactly_one_row(
            block in 1usize..40, q_len in 0usize..200, kv_len in 0usize..200,
        ) {
            let grid = BlockGrid::new(block, q_len, kv_len).unwrap();
            let mut next = grid.blind_queries().min(q_len);
            for row in 0..grid.rows() {
                let queries = grid.queries(row);
                prop_assert_eq!(queries.start, next);
                prop_assert!(!queries.is_empty());
                next = queries.end;
                for i in queries {
                    let position = grid.visible_keys(i) - 1;
                    prop_assert_eq!(position / block, grid.first_block() + row);
                    prop_assert_eq!(grid.causal_blocks(row), position / block + 1);
                }
            }
            prop_assert_eq!(next, q_len);
        }
    }

    #[test]
    fn a_chunk_that_starts_mid_block_has_a_partial_first_block() {
        let grid = BlockGrid::new(128, 100, 300).unwrap();
        assert_eq!(grid.first_block(), 1);
        assert_eq!(grid.rows(), 2);
        assert_eq!(grid.queries(0), 0..56);
        assert_eq!(grid.queries(1), 56..100);
        assert_eq!(grid.keys(2), 256..300);
    }
}
