//! LongNet's dilated attention (arXiv 2307.02486) as a pattern of blocks.

use serde::{Deserialize, Serialize};

use crate::error::{PrismError, Result};
use crate::selectors::input::{Head, Rows, Selector, SelectorInput};

/// Options of dilated attention: pairs of a segment and a stride.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Dilated {
    /// Positions a segment, multiples of the block; one for each stride.
    pub segments: Vec<usize>,
    /// Of each segment every so manieth block is kept; one for each segment.
    pub strides: Vec<usize>,
}

impl Default for Dilated {
    fn default() -> Self {
        Self { segments: vec![2048, 4096, 8192, 16384, 32768], strides: vec![1, 2, 4, 6, 12] }
    }
}

impl Dilated {
    /// Checks the segments against the block.
    ///
    /// # Errors
    /// A segment that isn't a multiple of the block.
    pub fn validate_block(&self, block: usize) -> Result<()> {
        match self.segments.iter().find(|segment| !segment.is_multiple_of(block)) {
            Some(&got) => Err(PrismError::Multiple { name: "segment", multiple: block, got }),
            None => Ok(()),
        }
    }

    /// The segment of a pair that a block lies in.
    pub fn segment(&self, block: usize, pair: usize, v: usize) -> usize {
        v / (self.segments[pair] / block).max(1)
    }

    /// Whether a query head keeps a block of its segment: every `stride`-th, from block
    /// `head % stride` on.
    pub fn keeps(&self, block: usize, pair: usize, v: usize, head: usize) -> bool {
        let (blocks, stride) = ((self.segments[pair] / block).max(1), self.strides[pair]);
        v % blocks % stride == head % stride
    }
}

impl Selector for Dilated {
    fn name(&self) -> &'static str {
        "dilated"
    }

    fn validate(&self) -> Result<()> {
        let (segments, strides) = (&self.segments, &self.strides);
        if segments.is_empty() || segments.len() != strides.len() {
            let reason = format!(
                "dilated: segments and strides must be as many and at least 1, got {} and {}",
                segments.len(),
                strides.len()
            );
            return Err(PrismError::Selector { reason });
        }
        for (name, list) in [("segments", segments), ("strides", strides)] {
            if list.contains(&0) {
                return Err(PrismError::OutOfRange { name, allowed: "at least 1", got: 0.0 });
            }
        }
        Ok(())
    }

    fn validate_for(&self, input: &SelectorInput) -> Result<()> {
        self.validate_block(input.block())
    }

    fn select_head(&self, head: &Head, rows: &mut Rows) -> Result<()> {
        let grid = &head.grid;
        let block = grid.block();
        for row in 0..grid.rows() {
            let causal = grid.causal_blocks(row);
            let u = causal - 1;
            let reads = |&v: &usize| {
                (0..self.segments.len()).any(|pair| {
                    let kept = |v| self.keeps(block, pair, v, head.index);
                    let segment = |v| self.segment(block, pair, v);
                    segment(u) == segment(v) && kept(u) && kept(v)
                })
            };
            rows.by_blocks(row, (0..causal).filter(reads));
        }
        Ok(())
    }
}
