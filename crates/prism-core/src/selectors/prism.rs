//! Prism (arXiv 2602.08426): means of blocks within spectral bands ([`crate::scores`]).
//!
//! The paper pools the blocks that it selects. Means of smaller blocks lose less to rotation: each band's
//! softmax then runs over those, and a block has the mass of its key parts, averaged over its query parts,
//! as in [`crate::second_order`]. That is for study: it scores (block / pool_block)² times as many pairs.

use serde::{Deserialize, Serialize};

use crate::bands::{BandRule, Bands};
use crate::error::{PrismError, Result};
use crate::masses::{check_row, integer_masses};
use crate::scores::{self, BandEnergy, Calibration, PooledHead};
use crate::second_order::{SubBlocks, for_each_row_of};
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
    /// Over which blocks the temperature calibration runs; in chunks, over those of the chunk's
    /// queries alone where `pool_block` is set.
    pub calibration: Calibration,
    /// Positions that a mean is taken of, 16 to 128 and dividing the block; the block unless given.
    /// Bands that follow from the RoPE follow from this, too.
    pub pool_block: Option<usize>,
}

impl Prism {
    /// How dims are shared out between the bands.
    pub fn bands(&self) -> BandRule {
        match (self.high_dims, self.low_dims) {
            (Some(high), Some(low)) => BandRule::Dims { high, low },
            _ => BandRule::Auto,
        }
    }

    /// Checks the parts against the size of the blocks.
    pub(super) fn validate_block(&self, block: usize) -> Result<()> {
        self.pool_block.map_or(Ok(()), |pool| scores::check_sub_block("pool_block", pool, block))
    }

    /// Rows by masses of parts of blocks.
    fn select_by_parts(&self, pool: usize, head: &Head, rows: &mut Rows) -> Result<()> {
        let grid = SubBlocks::new(head.grid, pool, pool);
        let bands = Bands::new(self.bands(), head.rope, head.head_dim, pool)?;
        let (q, k) = (query_means(head, grid.queries()), key_means(head, grid.keys()));
        let pooled = PooledHead { q: &q, k: &k, history: BandEnergy::default() };
        // Of each band, of each query part.
        let mut parts: Vec<Vec<Vec<f32>>> = vec![Vec::new(); bands.iter().count()];
        scores::for_each_row(pooled, grid.queries(), &bands, self.calibration, |_, scores| {
            parts.iter_mut().zip(scores).for_each(|(part, scores)| part.push(scores.clone()));
        });
        let mut masses = vec![vec![Vec::new(); parts.len()]; head.grid.rows()];
        for (z, part) in parts.iter().enumerate() {
            let score = |a: usize, scores: &mut Vec<f32>| scores.extend(&part[a]);
            for_each_row_of(&grid, score, |row, band| masses[row][z] = band.to_vec());
        }
        let rule = rows.rule(self.mass);
        masses.iter().enumerate().for_each(|(row, masses)| rows.by_masses(row, rule, masses));
        Ok(())
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
        self.validate_block(input.block())?;
        check_row(input.shape.kv_len.div_ceil(self.pool_block.unwrap_or(input.block())))
    }

    fn select_head(&self, head: &Head, rows: &mut Rows) -> Result<()> {
        let grid = &head.grid;
        if let Some(pool) = self.pool_block {
            return self.select_by_parts(pool, head, rows);
        }
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
