//! A fixed number of blocks a row, the best by q̄·k̄ of block means (MInference's block-sparse heads,
//! arXiv 2407.02490).

use serde::{Deserialize, Serialize};

use crate::error::{PrismError, Result};
use crate::select::{Budget, SelectionRule};
use crate::selectors::input::{Head, Rows, Selector};
use crate::selectors::pooled::for_each_row;

/// Options of top-k.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TopK {
    /// Blocks a row keeps, forced ones not counted.
    pub blocks: usize,
}

impl Default for TopK {
    fn default() -> Self {
        Self { blocks: 16 }
    }
}

impl Selector for TopK {
    fn name(&self) -> &'static str {
        "top_k"
    }

    fn validate(&self) -> Result<()> {
        if self.blocks == 0 {
            let (name, allowed) = ("blocks", "at least 1");
            return Err(PrismError::OutOfRange { name, allowed, got: 0.0 });
        }
        Ok(())
    }

    fn select_head(&self, head: &Head, rows: &mut Rows) -> Result<()> {
        let rule = SelectionRule { budget: Budget::TopK(self.blocks), ..rows.rule(None) };
        for_each_row(head, |row, masses| rows.by_masses(row, rule, &[masses]));
        Ok(())
    }
}
