//! Reformer's locality-sensitive hashing (arXiv 2001.04451), of block means: a row reads the blocks
//! that share a bucket with it.

use serde::{Deserialize, Serialize};

use crate::error::{PrismError, Result};
use crate::selectors::input::{Head, Rows, Selector};
use crate::selectors::pooled::{dot_wide, key_means, query_means};

/// Options of hashing.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Lsh {
    /// Buckets of a round; even.
    pub buckets: usize,
    /// Rounds, each with directions of its own; sharing a bucket in one is enough.
    pub rounds: usize,
    /// What the directions are drawn from.
    pub seed: u64,
}

impl Default for Lsh {
    fn default() -> Self {
        Self { buckets: 16, rounds: 4, seed: 0 }
    }
}

/// Most buckets of a round, and most rounds.
pub const MAX_BUCKETS: usize = 1024;

impl Lsh {
    /// Random directions R, `[rounds, buckets / 2, head_dim]`: normal, the same for all heads.
    ///
    /// SplitMix64 and Box–Muller, written out so that a seed means the same for ever.
    pub fn directions(&self, head_dim: usize) -> Vec<f32> {
        let mut state = self.seed;
        let mut uniform = || {
            state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
            let mut z = state;
            z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
            ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
        };
        let count = self.rounds * self.buckets / 2 * head_dim;
        (0..count)
            .map(|_| {
                let (radius, turn) = (1.0 - uniform(), uniform());
                ((-2.0 * radius.ln()).sqrt() * (std::f64::consts::TAU * turn).cos()) as f32
            })
            .collect()
    }

    /// Bucket of a vector in each round: the largest of [xR; −xR], the first of equal ones.
    fn hash(&self, x: &[f32], directions: &[f32]) -> Vec<usize> {
        let half = self.buckets / 2;
        directions
            .chunks_exact(half * x.len())
            .map(|round| {
                let along: Vec<f64> = round.chunks_exact(x.len()).map(|r| dot_wide(x, r)).collect();
                let both = along.iter().copied().chain(along.iter().map(|x| -x));
                let first = (0, f64::NEG_INFINITY);
                let largest = both.enumerate().fold(
                    first,
                    |best, (i, x)| {
                        if x > best.1 { (i, x) } else { best }
                    },
                );
                largest.0
            })
            .collect()
    }
}

impl Selector for Lsh {
    fn name(&self) -> &'static str {
        "lsh"
    }

    fn validate(&self) -> Result<()> {
        let refuse =
            |name, allowed, got| Err(PrismError::OutOfRange { name, allowed, got: got as f64 });
        if !(2..=MAX_BUCKETS).contains(&self.buckets) || !self.buckets.is_multiple_of(2) {
            return refuse("buckets", "even and between 2 and 1024", self.buckets);
        }
        if !(1..=MAX_BUCKETS).contains(&self.rounds) {
            return refuse("rounds", "between 1 and 1024", self.rounds);
        }
        Ok(())
    }

    fn select_head(&self, head: &Head, rows: &mut Rows) -> Result<()> {
        let (grid, d) = (&head.grid, head.head_dim);
        let directions = self.directions(d);
        let hash = |x: Vec<f32>| -> Vec<Vec<usize>> {
            x.chunks_exact(d).map(|x| self.hash(x, &directions)).collect()
        };
        let (q, k) = (hash(query_means(head, grid)), hash(key_means(head, grid)));
        for (row, q) in q.iter().enumerate() {
            let shares = |&v: &usize| q.iter().zip(&k[v]).any(|(q, k)| q == k);
            rows.by_blocks(row, (0..grid.causal_blocks(row)).filter(shares));
        }
        Ok(())
    }
}
