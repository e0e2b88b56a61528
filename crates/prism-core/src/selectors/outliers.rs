//! Sub-blocks with their outlier keys scored apart, and one threshold for all rows.
//!
//! Ours; `docs/selection-quality.md` says what made each part. Keys of a sub-block are a Gaussian cloud as in
//! [`crate::second_order`], but for two things. The shortest of them is also scored by itself: tokens that draw
//! attention from everywhere have short keys, which no mean shows. And of n keys the log of the mean
//! exponential grows as half the variance σ² of their scores only while the draws that make it up exist,
//! σ² < 2 ln n; from there on the largest draw decides, σ√(2 ln n) − ln n.
//!
//! A block's mass is the largest that a query sub-block of the row gives it, so that few queries can ask for
//! it; and whatever reaches the threshold is read, in whichever row and head: a share of every row would
//! spend as much on rows whose attention is flat.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::masses::{MASS_ONE, check_row, integer_masses};
use crate::scores::Scoring;
use crate::second_order::SubBlocks;
use crate::selectors::config::check_mass;
use crate::selectors::input::{Head, Rows, Selector, SelectorInput};
use crate::selectors::pooled::{dot_wide, key_moments, query_means};

/// Options of outlier-aware scoring.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Outliers {
    /// Mass from which a block is read, in (0, 1].
    pub threshold: f64,
    /// Positions a query sub-block; 32, at most the block, unless given.
    pub query_sub: Option<usize>,
    /// Positions a key sub-block; 32, at most the block, unless given.
    pub key_sub: Option<usize>,
}

impl Default for Outliers {
    fn default() -> Self {
        Self { threshold: 0.015, query_sub: None, key_sub: None }
    }
}

impl Outliers {
    /// Positions a query sub-block and a key sub-block of blocks of `block`.
    pub fn subs(&self, block: usize) -> [usize; 2] {
        [self.query_sub, self.key_sub].map(|sub| sub.unwrap_or(block.min(32)))
    }

    /// Checks the sub-blocks against the block.
    ///
    /// # Errors
    /// Sub-blocks that don't divide it.
    pub fn validate_block(&self, block: usize) -> Result<()> {
        let [query_sub, key_sub] = self.subs(block);
        Scoring::SecondOrder { query_sub, key_sub }.validate(block)
    }

    /// The threshold as an integer mass.
    pub fn target(&self) -> u32 {
        ((self.threshold * f64::from(MASS_ONE)).round() as u32).max(1)
    }
}

impl Selector for Outliers {
    fn name(&self) -> &'static str {
        "outliers"
    }

    fn validate(&self) -> Result<()> {
        check_mass("threshold", Some(self.threshold))
    }

    fn validate_for(&self, input: &SelectorInput) -> Result<()> {
        self.validate_block(input.block())?;
        let [_, key_sub] = self.subs(input.block());
        check_row(2 * input.shape.kv_len.div_ceil(key_sub))
    }

    fn select_head(&self, head: &Head, rows: &mut Rows) -> Result<()> {
        let [query_sub, key_sub] = self.subs(head.grid.block());
        let (grid, d) = (SubBlocks::new(head.grid, query_sub, key_sub), head.head_dim);
        let q_means = query_means(head, grid.queries());
        let (k_means, k_variances) = key_moments(head, grid.keys());
        let keys = |t| grid.keys().keys(t);
        let outliers: Vec<usize> =
            (0..grid.keys().key_blocks()).map(|t| shortest(head, keys(t))).collect();
        let (mut scores, mut masses, mut best) = (Vec::new(), Vec::new(), Vec::new());
        for row in 0..head.grid.rows() {
            best.clear();
            best.resize(head.grid.causal_blocks(row), 0u32);
            for a in grid.of_row(row) {
                let visible = head.grid.visible_keys(grid.queries().queries(a).end - 1);
                let q = &q_means[a * d..][..d];
                let causal = grid.causal_keys(a);
                scores.clear();
                scores.extend((0..causal).map(|t| {
                    let at = t * d..(t + 1) * d;
                    let variance = variance(q, &k_variances[at.clone()], head.scale);
                    let mean = dot_wide(q, &k_means[at]) * head.scale;
                    (mean + log_sum_exp(variance, keys(t).len())) as f32
                }));
                scores.extend(outliers[..causal].iter().map(|&j| match j < visible {
                    true => (dot_wide(q, head.key(j)) * head.scale) as f32,
                    false => f32::NEG_INFINITY,
                }));
                integer_masses(&scores, &mut masses);
                let (clouds, alone) = masses.split_at(causal);
                let blocks = |masses: &'_ [u32]| -> Vec<u32> {
                    masses.chunks(grid.keys_per_block()).map(|block| block.iter().sum()).collect()
                };
                let sums = blocks(clouds).into_iter().zip(blocks(alone));
                best.iter_mut().zip(sums).for_each(|(best, (a, b))| *best = (*best).max(a + b));
            }
            rows.by_threshold(row, self.target(), &best);
        }
        Ok(())
    }
}

/// The key with the least square, the first of several.
fn shortest(head: &Head, keys: Range<usize>) -> usize {
    let square = |j: usize| dot_wide(head.key(j), head.key(j));
    let shorter = |best, j| if square(j) < square(best) { j } else { best };
    keys.clone().fold(keys.start, shorter)
}

/// Variance of the scores of keys that have this variance in each dim.
fn variance(q: &[f32], k_variances: &[f32], scale: f64) -> f64 {
    let terms = q.iter().zip(k_variances).map(|(&q, &k)| f64::from(q).powi(2) * f64::from(k));
    scale.powi(2) * terms.sum::<f64>()
}

/// Log of the sum of the exponentials of n draws of a variance about 0, as it typically is.
pub fn log_sum_exp(variance: f64, n: usize) -> f64 {
    let ln_n = (n as f64).ln();
    if variance < 2.0 * ln_n { variance / 2.0 + ln_n } else { (2.0 * ln_n * variance).sqrt() }
}
