//! FlexPrefill (arXiv 2502.20766): each head by what its last queries read, or by block means where
//! these tell the same.

use std::cmp::Reverse;

use serde::{Deserialize, Serialize};

use crate::error::{PrismError, Result};
use crate::grid::BlockGrid;
use crate::masses::{MASS_ONE, usable};
use crate::selectors::config::check_mass;
use crate::selectors::input::{Head, Rows, Selector};
use crate::selectors::last_queries::{LastQueries, ranking, shares};
use crate::selectors::pooled::{dot_wide, for_each_row, key_means, means};

/// Options of FlexPrefill.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FlexPrefill {
    /// Mass that columns, diagonals or block pairs keep, in (0, 1].
    pub gamma: f64,
    /// A head goes by block means where √JSD of what these say from what its last queries read is
    /// below this, 0 to 1; 0 for never.
    pub tau: f64,
    /// Fewest columns and diagonals, in tokens.
    pub min_budget: usize,
    /// Most columns and diagonals, in tokens.
    pub max_budget: Option<usize>,
}

impl Default for FlexPrefill {
    fn default() -> Self {
        Self { gamma: 0.95, tau: 0.1, min_budget: 1024, max_budget: None }
    }
}

/// How a head chooses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HeadPattern {
    /// Everything: too short to gain.
    Dense,
    /// Columns and diagonals that the last queries read.
    VerticalSlash,
    /// Block means.
    QueryAware,
}

impl FlexPrefill {
    /// Pattern of a head.
    pub fn pattern(&self, head: &Head) -> HeadPattern {
        match self.is_short(&head.grid) {
            true => HeadPattern::Dense,
            false => self.pattern_by(head, &LastQueries::new(head, head.grid.block())),
        }
    }

    /// Whether there are too few keys to gain.
    pub fn is_short(&self, grid: &BlockGrid) -> bool {
        let block = grid.block();
        grid.kv_len() <= (2 * block).max(self.min_budget.div_ceil(block) * block)
    }

    fn pattern_by(&self, head: &Head, last: &LastQueries) -> HeadPattern {
        if self.distance(head, last) < self.tau {
            HeadPattern::QueryAware
        } else {
            HeadPattern::VerticalSlash
        }
    }

    /// √JSD of what block means and what the last queries say of the key blocks. A NaN has no
    /// probability in either.
    fn distance(&self, head: &Head, last: &LastQueries) -> f64 {
        let (grid, d) = (&head.grid, head.head_dim);
        let count = last.queries as f64;
        let by_block = last.vertical.chunks(grid.block());
        let truth = by_block.map(|values| values.iter().sum::<f64>() / count);
        let queries = grid.q_len() - last.queries..grid.q_len();
        let q = means(head.q, d, std::iter::once(queries));
        let k = key_means(head, grid);
        let score = |k| f64::from(usable((dot_wide(&q, k) * head.scale) as f32));
        let scores: Vec<f64> = k.chunks_exact(d).map(score).collect();
        let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max).max(f64::from(f32::MIN));
        let total: f64 = scores.iter().map(|score| (score - max).exp()).sum();
        let estimate = scores.iter().map(|score| (score - max).exp() / total.max(1.0));
        // 0 · ln 0 is 0.
        let term = |p: f64, m: f64| if p == 0.0 { 0.0 } else { p * (p / m).ln() };
        let divergence: f64 = estimate
            .zip(truth)
            .map(|(p, q)| 0.5 * (term(p, 0.5 * (p + q)) + term(q, 0.5 * (p + q))))
            .sum();
        divergence.max(0.0).sqrt()
    }

    /// Blocks in which as many tokens fit as it takes to reach γ, as the authors count them.
    fn budget(&self, shares: &[u32], grid: &BlockGrid) -> usize {
        let block = grid.block();
        let target = self.target();
        let mut mass = 0u64;
        let before = |&i: &usize| {
            let before = mass;
            mass += u64::from(shares[i]);
            before < target
        };
        let tokens = ranking(shares, 0).into_iter().take_while(before).count();
        let (least, most) = self.limits(grid);
        (tokens / block + 1).max(least).min(most)
    }

    /// γ as an integer mass.
    pub fn target(&self) -> u64 {
        (self.gamma * f64::from(MASS_ONE)).round() as u64
    }

    /// Fewest and most columns and diagonals, in blocks.
    pub fn limits(&self, grid: &BlockGrid) -> (usize, usize) {
        let (block, all) = (grid.block(), grid.key_blocks());
        let most = self.max_budget.map_or(all, |max| max.div_ceil(block));
        (self.min_budget.div_ceil(block).max(1), most.min(all))
    }

    /// The best pairs (row, key block) by block means, all rows together: as many as hold at most γ.
    fn pairs(&self, head: &Head) -> Vec<Vec<usize>> {
        let mut pairs: Vec<(Reverse<u32>, usize, usize)> = Vec::new();
        for_each_row(head, |row, masses| {
            pairs.extend(masses.iter().enumerate().map(|(v, &mass)| (Reverse(mass), row, v)));
        });
        pairs.sort_unstable();
        let rows = head.grid.rows();
        let limit = self.gamma * rows as f64 * f64::from(MASS_ONE);
        let (mut mass, mut chosen) = (0u64, vec![Vec::new(); rows]);
        for (Reverse(weight), row, v) in pairs {
            mass += u64::from(weight);
            if mass as f64 > limit {
                break;
            }
            chosen[row].push(v);
        }
        chosen
    }
}

impl Selector for FlexPrefill {
    fn name(&self) -> &'static str {
        "flexprefill"
    }

    fn validate(&self) -> Result<()> {
        let refuse = |name, allowed, got: f64| Err(PrismError::OutOfRange { name, allowed, got });
        check_mass("gamma", Some(self.gamma))?;
        if !(0.0..=1.0).contains(&self.tau) {
            return refuse("tau", "between 0 and 1", self.tau);
        }
        match self.max_budget {
            Some(max) if max < self.min_budget.max(1) => {
                refuse("max_budget", "at least min_budget and 1", max as f64)
            }
            _ => Ok(()),
        }
    }

    fn select_head(&self, head: &Head, rows: &mut Rows) -> Result<()> {
        let grid = &head.grid;
        let block = grid.block();
        if self.is_short(grid) {
            (0..grid.rows()).for_each(|row| rows.by_blocks(row, 0..grid.causal_blocks(row)));
            return Ok(());
        }
        let last = LastQueries::new(head, block);
        let query_aware = self.pattern_by(head, &last) == HeadPattern::QueryAware;
        let choose = |sums: &[f64]| {
            let blocks = match query_aware {
                true => self.limits(grid).0,
                false => self.budget(&shares(sums, last.queries, 1), grid),
            };
            let mut chosen = vec![false; grid.key_blocks()];
            let ranked = ranking(&shares(sums, last.queries, block), 1);
            ranked.into_iter().take(blocks).for_each(|i| chosen[i] = true);
            chosen
        };
        let (columns, distances) = (choose(&last.vertical), choose(&last.slash));
        let pairs = if query_aware { self.pairs(head) } else { vec![Vec::new(); grid.rows()] };
        for (row, pairs) in pairs.into_iter().enumerate() {
            let causal = grid.causal_blocks(row);
            let reads = |&v: &usize| columns[v] || distances[causal - 1 - v];
            rows.by_blocks(row, (0..causal).filter(reads).chain(pairs));
        }
        Ok(())
    }
}
