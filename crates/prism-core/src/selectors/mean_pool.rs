//! Plain mean pooling: one softmax of q̄·k̄ over the causal blocks of a row.

use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::selectors::config::check_mass;
use crate::selectors::input::{Head, Rows, Selector};
use crate::selectors::pooled::for_each_row;

/// Options of mean pooling.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MeanPool {
    /// Mass that each row keeps, in (0, 1]; the rule's budget unless given.
    pub mass: Option<f64>,
}

impl Selector for MeanPool {
    fn name(&self) -> &'static str {
        "mean_pool"
    }

    fn validate(&self) -> Result<()> {
        check_mass("mass", self.mass)
    }

    fn select_head(&self, head: &Head, rows: &mut Rows) -> Result<()> {
        let rule = rows.rule(self.mass);
        for_each_row(head, |row, masses| rows.by_masses(row, rule, &[masses]));
        Ok(())
    }
}
