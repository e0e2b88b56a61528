//! Static windows: StreamingLLM's sinks and recent tokens (arXiv 2309.17453; MInference's A-shape),
//! Longformer's window (arXiv 2004.05150), tri-shape.

use serde::{Deserialize, Serialize};

use crate::error::{PrismError, Result};
use crate::grid::BlockGrid;
use crate::selectors::input::{Head, Rows, Selector};

/// A pattern with its published numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StreamingPattern {
    /// 128 first tokens and a window of 3968 (MInference's A-shape).
    #[default]
    AShape,
    /// A window of 256, the causal half of Longformer's 512; its global tokens are the `sink`.
    Longformer,
    /// The A-shape, and the last 100 queries read everything.
    TriShape,
}

/// Options of the static windows; each overrides the pattern's number.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Streaming {
    /// Where the numbers come from that aren't given.
    pub pattern: StreamingPattern,
    /// First tokens that every query reads.
    pub sink: Option<usize>,
    /// Last tokens that every query reads, itself included; at least 1.
    pub window: Option<usize>,
    /// Last queries that read everything.
    pub last: Option<usize>,
}

impl Streaming {
    /// First tokens, window and dense last queries.
    pub fn tokens(&self) -> (usize, usize, usize) {
        let (sink, window, last) = match self.pattern {
            StreamingPattern::AShape => (128, 3968, 0),
            StreamingPattern::Longformer => (0, 256, 0),
            StreamingPattern::TriShape => (128, 3968, 100),
        };
        (self.sink.unwrap_or(sink), self.window.unwrap_or(window), self.last.unwrap_or(last))
    }

    /// The first key block of a row's window: the first in which a query of the row's block reads a
    /// key; 0 of rows that read everything.
    pub fn window_start(&self, grid: &BlockGrid, row: usize) -> usize {
        let (_, window, last) = self.tokens();
        if grid.queries(row).end + last > grid.q_len() {
            return 0;
        }
        let block = grid.block();
        ((grid.causal_blocks(row) - 1) * block + 1).saturating_sub(window) / block
    }
}

impl Selector for Streaming {
    fn name(&self) -> &'static str {
        "streaming"
    }

    fn validate(&self) -> Result<()> {
        if self.window == Some(0) {
            let (name, allowed) = ("window", "at least 1");
            return Err(PrismError::OutOfRange { name, allowed, got: 0.0 });
        }
        Ok(())
    }

    fn select_head(&self, head: &Head, rows: &mut Rows) -> Result<()> {
        let grid = &head.grid;
        let sinks = self.tokens().0.div_ceil(grid.block());
        for row in 0..grid.rows() {
            let causal = grid.causal_blocks(row);
            let window = self.window_start(grid, row)..causal;
            rows.by_blocks(row, (0..sinks.min(causal)).chain(window));
        }
        Ok(())
    }
}
