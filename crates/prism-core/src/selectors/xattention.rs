//! XAttention (arXiv 2503.16428): sums along the antidiagonals of S×S tiles.

use serde::{Deserialize, Serialize};

use crate::error::{PrismError, Result};
use crate::masses::check_row;
use crate::second_order::{SubBlocks, for_each_row_of};
use crate::selectors::config::check_mass;
use crate::selectors::input::{Head, Rows, Selector, SelectorInput};
use crate::selectors::pooled::dot;

/// Options of XAttention.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct XAttention {
    /// Positions a group: 4, 8 or 16; divides the block.
    pub stride: usize,
    /// Mass that each row keeps, in (0, 1]: the authors' τ.
    pub threshold: f64,
}

impl Default for XAttention {
    fn default() -> Self {
        Self { stride: 8, threshold: 0.9 }
    }
}

impl XAttention {
    /// Checks the stride against the block.
    ///
    /// # Errors
    /// A block that isn't a multiple of the stride.
    pub fn validate_block(&self, block: usize) -> Result<()> {
        if !block.is_multiple_of(self.stride) {
            let (name, multiple) = ("block", self.stride);
            return Err(PrismError::Multiple { name, multiple, got: block });
        }
        Ok(())
    }
}

impl Selector for XAttention {
    fn name(&self) -> &'static str {
        "xattention"
    }

    fn validate(&self) -> Result<()> {
        if ![4, 8, 16].contains(&self.stride) {
            let (name, allowed, got) = ("stride", "4, 8 or 16", self.stride as f64);
            return Err(PrismError::OutOfRange { name, allowed, got });
        }
        check_mass("threshold", Some(self.threshold))
    }

    fn validate_for(&self, input: &SelectorInput) -> Result<()> {
        self.validate_block(input.block())?;
        check_row(input.shape.kv_len.div_ceil(self.stride))
    }

    fn select_head(&self, head: &Head, rows: &mut Rows) -> Result<()> {
        let (stride, d) = (self.stride, head.head_dim);
        let grid = &head.grid;
        let groups = SubBlocks::new(*grid, stride, stride);
        // A group is one vector, its queries in reverse: tiles are then dot products. Positions
        // without a query or key hold zeros.
        let width = stride * d;
        let first = groups.queries().first_block() * stride;
        let mut q = vec![0.0; groups.queries().rows() * width];
        for i in grid.blind_queries()..grid.q_len() {
            let (group, at) = {
                let offset = grid.visible_keys(i) - 1 - first;
                (offset / stride, stride - 1 - offset % stride)
            };
            q[group * width + at * d..][..d].copy_from_slice(head.query(i));
        }
        let mut k = head.k.to_vec();
        k.resize(groups.keys().key_blocks() * width, 0.0);
        let scale = head.scale as f32 / stride as f32;
        let score = |a: usize, scores: &mut Vec<f32>| {
            let keys = k.chunks_exact(width).take(groups.causal_keys(a));
            scores.extend(keys.map(|k| dot(&q[a * width..][..width], k) * scale));
        };
        for_each_row_of(&groups, score, |row, masses| {
            rows.by_masses_after_forced(row, self.threshold, masses);
        });
        Ok(())
    }
}
