//! Which key blocks each query block reads.

use crate::error::{PrismError, Result};
use crate::grid::BlockGrid;

/// Bits in a word of a selection.
pub const WORD_BITS: usize = 32;

/// A block selection for a batch: one bit a key block, plus counts.
///
/// `words` is `[batch, q_heads, rows, ceil(key_blocks / 32)]`, bit `v % 32` of word `v / 32` says
/// that key block `v` is read; `counts` is `[batch, q_heads, rows]`. Rows and key blocks are those
/// of the longest sequence; rows a shorter sequence doesn't have are empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockSelection {
    batch: usize,
    heads: usize,
    rows: usize,
    key_blocks: usize,
    words: Vec<u32>,
    counts: Vec<u32>,
}

impl BlockSelection {
    /// An empty selection of the given shape.
    pub fn empty(batch: usize, heads: usize, rows: usize, key_blocks: usize) -> Self {
        let lines = batch * heads * rows;
        Self {
            batch,
            heads,
            rows,
            key_blocks,
            words: vec![0; lines * key_blocks.div_ceil(WORD_BITS)],
            counts: vec![0; lines],
        }
    }

    /// Every causal block: exact dense attention.
    pub fn dense(grids: &[BlockGrid], heads: usize) -> Self {
        let (rows, key_blocks) = extent(grids);
        let mut selection = Self::empty(grids.len(), heads, rows, key_blocks);
        for (b, grid) in grids.iter().enumerate() {
            for h in 0..heads {
                for row in 0..grid.rows() {
                    selection.set_row(b, h, row, 0..grid.causal_blocks(row));
                }
            }
        }
        selection
    }

    /// From bools `[batch, heads, rows, key_blocks]`.
    ///
    /// # Errors
    /// Another number of bools than the shape holds.
    pub fn from_bools(shape: [usize; 4], bools: impl IntoIterator<Item = bool>) -> Result<Self> {
        let [batch, heads, rows, key_blocks] = shape;
        let mut selection = Self::empty(batch, heads, rows, key_blocks);
        let total = batch * heads * rows * key_blocks;
        let width = selection.words_per_row();
        let mut got = 0;
        for (i, on) in bools.into_iter().enumerate() {
            got = i + 1;
            if on && i < total {
                let (line, v) = (i / key_blocks, i % key_blocks);
                selection.words[line * width + v / WORD_BITS] |= 1 << (v % WORD_BITS);
                selection.counts[line] += 1;
            }
        }
        if got != total {
            let reason = format!("expected {total} bools for shape {shape:?}, got {got}");
            return Err(PrismError::Selection { reason });
        }
        Ok(selection)
    }

    /// From lists of key block indices, one a (batch, head, row) line in that order.
    ///
    /// # Errors
    /// Another number of lists than lines; an index past the end, repeated or out of order.
    pub fn from_indices(shape: [usize; 4], lists: &[Vec<usize>]) -> Result<Self> {
        let [batch, heads, rows, key_blocks] = shape;
        let mut selection = Self::empty(batch, heads, rows, key_blocks);
        if lists.len() != selection.counts.len() {
            let reason =
                format!("expected {} index lists, got {}", selection.counts.len(), lists.len());
            return Err(PrismError::Selection { reason });
        }
        let width = selection.words_per_row();
        for (line, list) in lists.iter().enumerate() {
            for pair in list.windows(2) {
                if pair[1] <= pair[0] {
                    let reason = format!(
                        "indices of line {line} must increase, got {} after {}",
                        pair[1], pair[0]
                    );
                    return Err(PrismError::Selection { reason });
                }
            }
            for &v in list {
                if v >= key_blocks {
                    let reason = format!(
                        "index {v} of line {line} is past the end: there are {key_blocks} key blocks"
                    );
                    return Err(PrismError::Selection { reason });
                }
                selection.words[line * width + v / WORD_BITS] |= 1 << (v % WORD_BITS);
            }
            selection.counts[line] = list.len() as u32;
        }
        Ok(selection)
    }

    /// From words and counts as a kernel writes them.
    ///
    /// # Errors
    /// Lengths that don't fit the shape, bits past the last key block, or counts that differ from
    /// the bits.
    pub fn from_words(shape: [usize; 4], words: Vec<u32>, counts: Vec<u32>) -> Result<Self> {
        let [batch, heads, rows, key_blocks] = shape;
        let lines = batch * heads * rows;
        let width = key_blocks.div_ceil(WORD_BITS);
        if words.len() != lines * width || counts.len() != lines {
            let reason = format!(
                "expected {} words and {lines} counts, got {} and {}",
                lines * width,
                words.len(),
                counts.len()
            );
            return Err(PrismError::Selection { reason });
        }
        let selection = Self { batch, heads, rows, key_blocks, words, counts };
        for (line, &count) in selection.counts.iter().enumerate() {
            let row = &selection.words[line * width..][..width];
            let bits: u32 = row.iter().map(|word| word.count_ones()).sum();
            if bits != count {
                let reason = format!("line {line} has {bits} bits but a count of {count}");
                return Err(PrismError::Selection { reason });
            }
            let tail = key_blocks % WORD_BITS;
            if tail != 0 && row.last().is_some_and(|&word| word >> tail != 0) {
                let reason =
                    format!("line {line} has a bit past the last of {key_blocks} key blocks");
                return Err(PrismError::Selection { reason });
            }
        }
        Ok(selection)
    }

    /// Checks the invariants that attention relies on: the shape is that of the grids, every row
    /// that has queries reads at least one block, and no row reads past its diagonal.
    ///
    /// # Errors
    /// The first invariant that is broken, with batch, head and row.
    pub fn validate(&self, grids: &[BlockGrid], heads: usize) -> Result<()> {
        let (rows, key_blocks) = extent(grids);
        let expected = [grids.len(), heads, rows, key_blocks];
        if self.shape() != expected {
            let reason = format!(
                "expected shape [batch, heads, rows, key_blocks] = {expected:?}, got {:?}",
                self.shape()
            );
            return Err(PrismError::Selection { reason });
        }
        for (b, grid) in grids.iter().enumerate() {
            for h in 0..heads {
                for row in 0..rows {
                    let count = self.count(b, h, row);
                    let at = format!("batch {b}, head {h}, row {row}");
                    if row >= grid.rows() {
                        if count != 0 {
                            let reason = format!("{at} has no queries but reads {count} blocks");
                            return Err(PrismError::Selection { reason });
                        }
                        continue;
                    }
                    let causal = grid.causal_blocks(row);
                    match self.blocks(b, h, row).last() {
                        None => {
                            let reason = format!("{at} reads no block");
                            return Err(PrismError::Selection { reason });
                        }
                        Some(v) if v >= causal => {
                            let reason = format!(
                                "{at} reads key block {v}, but only blocks below {causal} are causal"
                            );
                            return Err(PrismError::Selection { reason });
                        }
                        Some(_) => {}
                    }
                }
            }
        }
        Ok(())
    }

    /// `[batch, heads, rows, key_blocks]`.
    pub fn shape(&self) -> [usize; 4] {
        [self.batch, self.heads, self.rows, self.key_blocks]
    }

    /// Words of one row.
    pub fn words_per_row(&self) -> usize {
        self.key_blocks.div_ceil(WORD_BITS)
    }

    /// All words, `[batch, heads, rows, words_per_row]`.
    pub fn words(&self) -> &[u32] {
        &self.words
    }

    /// All counts, `[batch, heads, rows]`.
    pub fn counts(&self) -> &[u32] {
        &self.counts
    }

    fn line(&self, b: usize, h: usize, row: usize) -> usize {
        (b * self.heads + h) * self.rows + row
    }

    /// Words of one row.
    pub fn row_words(&self, b: usize, h: usize, row: usize) -> &[u32] {
        &self.words[self.line(b, h, row) * self.words_per_row()..][..self.words_per_row()]
    }

    /// Blocks that one row reads.
    pub fn count(&self, b: usize, h: usize, row: usize) -> usize {
        self.counts[self.line(b, h, row)] as usize
    }

    /// Whether a row reads key block `v`.
    pub fn contains(&self, b: usize, h: usize, row: usize, v: usize) -> bool {
        self.row_words(b, h, row)[v / WORD_BITS] >> (v % WORD_BITS) & 1 == 1
    }

    /// Key blocks that one row reads, increasing.
    pub fn blocks(&self, b: usize, h: usize, row: usize) -> impl Iterator<Item = usize> + '_ {
        set_bits(self.row_words(b, h, row))
    }

    /// Replaces one row by the given key blocks.
    pub fn set_row(
        &mut self,
        b: usize,
        h: usize,
        row: usize,
        blocks: impl IntoIterator<Item = usize>,
    ) {
        let (line, width) = (self.line(b, h, row), self.words_per_row());
        let words = &mut self.words[line * width..][..width];
        words.fill(0);
        for v in blocks {
            words[v / WORD_BITS] |= 1 << (v % WORD_BITS);
        }
        self.counts[line] = words.iter().map(|word| word.count_ones()).sum();
    }

    /// Bools `[batch, heads, rows, key_blocks]`.
    pub fn to_bools(&self) -> Vec<bool> {
        let width = self.words_per_row();
        (0..self.counts.len() * self.key_blocks)
            .map(|i| {
                let (line, v) = (i / self.key_blocks, i % self.key_blocks);
                self.words[line * width + v / WORD_BITS] >> (v % WORD_BITS) & 1 == 1
            })
            .collect()
    }

    /// Selected over causal (row, key block) pairs of the whole batch; 1 when there are none.
    pub fn density(&self, grids: &[BlockGrid]) -> f64 {
        let causal: usize = grids.iter().map(|grid| grid.causal_pairs() * self.heads).sum();
        ratio(self.counts.iter().map(|&count| count as usize).sum(), causal)
    }

    /// [`density`](Self::density) of each (batch, head), batch-major.
    pub fn density_by_head(&self, grids: &[BlockGrid]) -> Vec<f64> {
        let heads =
            grids.iter().flat_map(|grid| std::iter::repeat_n(grid.causal_pairs(), self.heads));
        if self.rows == 0 {
            return heads.map(|_| 1.0).collect();
        }
        self.counts
            .chunks(self.rows)
            .zip(heads)
            .map(|(counts, causal)| ratio(counts.iter().map(|&c| c as usize).sum(), causal))
            .collect()
    }
}

fn ratio(selected: usize, causal: usize) -> f64 {
    if causal == 0 { 1.0 } else { selected as f64 / causal as f64 }
}

/// Rows and key blocks of the longest sequence.
pub fn extent(grids: &[BlockGrid]) -> (usize, usize) {
    let rows = grids.iter().map(BlockGrid::rows).max().unwrap_or(0);
    let key_blocks = grids.iter().map(BlockGrid::key_blocks).max().unwrap_or(0);
    (rows, key_blocks)
}

/// Indices of the set bits of a row of words, increasing.
pub fn set_bits(words: &[u32]) -> impl Iterator<Item = usize> + '_ {
    words.iter().enumerate().flat_map(|(i, &word)| {
        std::iter::successors(Some(word), |&rest| Some(rest & rest.wrapping_sub(1)))
            .take_while(|&rest| rest != 0)
            .map(move |rest| i * WORD_BITS + rest.trailing_zeros() as usize)
    })
}
