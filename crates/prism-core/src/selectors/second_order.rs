//! Means of sub-blocks and the variance of their keys ([`crate::second_order`]).

use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::masses::check_row;
use crate::scores::Scoring;
use crate::second_order::{HeadMoments, SubBlocks, for_each_row};
use crate::selectors::config::check_mass;
use crate::selectors::input::{Head, Rows, Selector, SelectorInput};
use crate::selectors::pooled::{key_moments, query_means};

/// Options of second-order scoring.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SecondOrder {
    /// Mass that each row keeps, in (0, 1]; the rule's budget unless given.
    pub mass: Option<f64>,
    /// Positions a query sub-block; 32, at most the block, unless given.
    pub query_sub: Option<usize>,
    /// Positions a key sub-block; 16, at most the block, unless given.
    pub key_sub: Option<usize>,
}

impl SecondOrder {
    /// The scoring for blocks of `block`.
    pub fn scoring(&self, block: usize) -> Scoring {
        Scoring::SecondOrder {
            query_sub: self.query_sub.unwrap_or(block.min(32)),
            key_sub: self.key_sub.unwrap_or(block.min(16)),
        }
    }
}

impl Selector for SecondOrder {
    fn name(&self) -> &'static str {
        "second_order"
    }

    fn validate(&self) -> Result<()> {
        check_mass("mass", self.mass)
    }

    fn validate_for(&self, input: &SelectorInput) -> Result<()> {
        let scoring = self.scoring(input.block());
        scoring.validate(input.block())?;
        check_row(scoring.row_blocks(input.block(), input.shape.kv_len))
    }

    fn select_head(&self, head: &Head, rows: &mut Rows) -> Result<()> {
        let Scoring::SecondOrder { query_sub, key_sub } = self.scoring(head.grid.block()) else {
            return Ok(());
        };
        let (grid, d) = (SubBlocks::new(head.grid, query_sub, key_sub), head.head_dim);
        let q_means = query_means(head, grid.queries());
        let (k_means, k_variances) = key_moments(head, grid.keys());
        let moments = HeadMoments {
            q_means: &q_means,
            k_means: &k_means,
            k_variances: &k_variances,
            head_dim: d,
        };
        let rule = rows.rule(self.mass);
        for_each_row(moments, &grid, |row, masses| rows.by_masses(row, rule, &[masses]));
        Ok(())
    }
}
