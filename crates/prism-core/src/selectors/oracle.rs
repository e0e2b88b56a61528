//! The true masses: exact attention, summed over blocks. It costs what it would save, so it is for
//! study: no estimator does better at its budget.

use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::masses::check_row;
use crate::second_order::{SubBlocks, for_each_row_of};
use crate::selectors::config::check_mass;
use crate::selectors::input::{Head, Rows, Selector, SelectorInput};
use crate::selectors::pooled::dot;

/// Options of the oracle.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Oracle {
    /// Mass that each row keeps, in (0, 1]; the rule's budget unless given.
    pub mass: Option<f64>,
}

impl Selector for Oracle {
    fn name(&self) -> &'static str {
        "oracle"
    }

    fn validate(&self) -> Result<()> {
        check_mass("mass", self.mass)
    }

    fn validate_for(&self, input: &SelectorInput) -> Result<()> {
        check_row(input.shape.kv_len)
    }

    fn select_head(&self, head: &Head, rows: &mut Rows) -> Result<()> {
        let rule = rows.rule(self.mass);
        // Every query and every key is a sub-block of its own.
        let tokens = SubBlocks::new(head.grid, 1, 1);
        let first = head.grid.blind_queries();
        let score = |a: usize, scores: &mut Vec<f32>| {
            let query = head.query(first + a);
            let keys = (0..tokens.causal_keys(a)).map(|j| head.key(j));
            scores.extend(keys.map(|key| dot(query, key) * head.scale as f32));
        };
        for_each_row_of(&tokens, score, |row, masses| rows.by_masses(row, rule, &[masses]));
        Ok(())
    }
}
