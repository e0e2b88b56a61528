//! MInference's vertical-slash heads (arXiv 2407.02490): the columns and diagonals that the last
//! queries read.

use serde::{Deserialize, Serialize};

use crate::error::{PrismError, Result};
use crate::selectors::input::{Head, Rows, Selector};
use crate::selectors::last_queries::{LastQueries, ranking, shares};

/// Fewest columns that are kept, and the first columns, which always are.
pub const MIN_VERTICAL: usize = 30;
/// Fewest diagonals that are kept.
pub const MIN_SLASH: usize = 50;
/// The last diagonals, which always are.
pub const RECENT_SLASH: usize = 100;

/// Options of MInference.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MInference {
    /// Columns that are kept, at least 30; 1000 unless given.
    pub vertical: Option<usize>,
    /// Diagonals that are kept, at least 50; 6096 unless given.
    pub slash: Option<usize>,
    /// In place of both, a share f of the length in (0, 1]: .2 f of it columns, .8 f diagonals.
    pub adaptive: Option<f64>,
    /// Last queries whose attention is looked at.
    pub last_queries: usize,
}

impl Default for MInference {
    fn default() -> Self {
        Self { vertical: None, slash: None, adaptive: None, last_queries: 64 }
    }
}

impl MInference {
    /// Columns and diagonals for a sequence of `len` keys.
    pub fn budget(&self, len: usize) -> (usize, usize) {
        let (vertical, slash) = match self.adaptive {
            Some(share) => {
                let of = |part: f64| (part * share * len as f64) as usize;
                (of(0.2), of(0.8))
            }
            None => (self.vertical.unwrap_or(1000), self.slash.unwrap_or(6096)),
        };
        (vertical.max(MIN_VERTICAL).min(len), slash.max(MIN_SLASH).min(len))
    }
}

impl Selector for MInference {
    fn name(&self) -> &'static str {
        "minference"
    }

    fn validate(&self) -> Result<()> {
        let refuse = |name, allowed, got: f64| Err(PrismError::OutOfRange { name, allowed, got });
        if let Some(got) = self.vertical.filter(|&got| got < MIN_VERTICAL) {
            return refuse("vertical", "at least 30", got as f64);
        }
        if let Some(got) = self.slash.filter(|&got| got < MIN_SLASH) {
            return refuse("slash", "at least 50", got as f64);
        }
        if self.last_queries == 0 {
            return refuse("last_queries", "at least 1", 0.0);
        }
        match self.adaptive {
            Some(got) if !(got > 0.0 && got <= 1.0) => {
                refuse("adaptive", "above 0 and at most 1", got)
            }
            Some(_) if self.vertical.is_some() || self.slash.is_some() => {
                let reason = "minference: adaptive sets vertical and slash, which were given too";
                Err(PrismError::Selector { reason: reason.into() })
            }
            _ => Ok(()),
        }
    }

    fn select_head(&self, head: &Head, rows: &mut Rows) -> Result<()> {
        let grid = &head.grid;
        let block = grid.block();
        let (vertical, slash) = self.budget(grid.kv_len());
        let last = LastQueries::new(head, self.last_queries);
        let (verticals, slashes) =
            (shares(&last.vertical, last.queries, 1), shares(&last.slash, last.queries, 1));
        let mut columns = vec![false; grid.key_blocks()];
        for &j in ranking(&verticals, MIN_VERTICAL).iter().take(vertical) {
            columns[j / block] = true;
        }
        let mut distances = vec![false; grid.key_blocks() + 1];
        for &o in ranking(&slashes, RECENT_SLASH).iter().take(slash) {
            // Queries of a block meet keys of this distance in one block or in two.
            distances[o / block] = true;
            if !o.is_multiple_of(block) {
                distances[o / block + 1] = true;
            }
        }
        for row in 0..grid.rows() {
            let causal = grid.causal_blocks(row);
            let reads = |&v: &usize| columns[v] || distances[causal - 1 - v];
            rows.by_blocks(row, (0..causal).filter(reads));
        }
        Ok(())
    }
}
