//! Prism (arXiv 2602.08426): means of whole blocks within spectral bands ([`crate::scores`]).

use serde::{Deserialize, Serialize};

use crate::bands::{BandRule, Bands};
use crate::error::{PrismError, Result};
use crate::masses::integer_masses;
use crate::scores::{self, BandEnergy, Calibration, PooledHead};
use crate::selectors::config::check_mass;
use crate::selectors::input::{Head, Rows, Selector, SelectorInput};
use crate::selectors::pooled::{key_means, query_means};

/// Prism's own options.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Prism {
    /// Mass that each band of a row keeps, in (0, 1]; the rule's budget unless given.
    pub mass: Option<f64>,
    /// Dims of the high band, with `low_dims`; from the RoPE unless given.
    pub high_dims: Option<usize>,
    /// Dims of the low band, with `high_dims`.
    pub low_dims: Option<usize>,
    /// Over which blocks the temperature calibration runs.
    pub calibration: Calibration,
}

impl Prism {
    /// How dims are shared out between the bands.
    pub fn bands(&self) -> BandRule {
        match (self.high_dims, self.low_dims) {
            (Some(high), Some(low)) => BandRule::Dims { high, low },
            _ => BandRule::Auto,
        }
    }
}

impl Selector for Prism {
    fn name(&self) -> &'static str {
        "prism"
    }

    fn validate(&self) -> Result<()> {
        check_mass("mass", self.mass)?;
        if self.high_dims.is_some() != self.low_dims.is_some() {
            let reason = format!(
                "high_dims and low_dims go together, got {:?} and {:?}",
                self.high_dims, self.low_dims
            );
            return Err(PrismError::Bands { reason });
        }
        Ok(())
    }

    fn validate_for(&self, input: &SelectorInput) -> Result<()> {
        if input.rope.is_none() && self.bands() != BandRule::Auto {
            let reason =
                format!("without a RoPE there is one band of all dims, got {:?}", self.bands());
            return Err(PrismError::Bands { reason });
        }
        Ok(())
    }

    fn select_head(&self, head: &Head, rows: &mut Rows) -> Result<()> {
        let grid = &head.grid;
        let bands = Bands::new(self.bands(), head.rope, head.head_dim, grid.block())?;
        let (q, k) = (query_means(head, grid), key_means(head, grid));
        let pooled = PooledHead { q: &q, k: &k, history: BandEnergy::default() };
        let rule = rows.rule(self.mass);
        let mut masses = vec![Vec::new(); 2];
        scores::for_each_row(pooled, grid, &bands, self.calibration, |row, scores| {
            masses.resize(scores.len(), Vec::new());
            for (scores, masses) in scores.iter().zip(&mut masses) {
                integer_masses(scores, masses);
            }
            rows.by_masses(row, rule, &masses);
        });
        Ok(())
    }
}
