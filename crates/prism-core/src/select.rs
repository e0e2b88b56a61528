//! The selection rule: from block scores to the blocks that a row reads.
//!
//! Per band: softmax over the row's causal blocks, order by (probability descending, index
//! ascending), keep the smallest prefix whose mass reaches the budget, the crossing block
//! included. Probabilities are integer masses ([`crate::masses`]), which makes sums exact, hence the
//! rule independent of the order of summation and the same on every backend. Then the union of
//! the bands, the forced blocks, and the limits.

use std::cmp::Reverse;

use serde::{Deserialize, Serialize};

use crate::bands::Bands;
use crate::error::{PrismError, Result};
use crate::grid::BlockGrid;
pub use crate::masses::{
    EXP2_COEFFICIENTS, MASS_ONE, MAX_ROW_BLOCKS, integer_masses, mass, normaliser, weight,
};
use crate::scores::{self, Calibration, PooledHead};
use crate::second_order::{self, HeadMoments, SubBlocks};
use crate::selection::{WORD_BITS, set_bits};

/// How many blocks a band keeps.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Budget {
    /// The fewest blocks that hold this share of the *estimated* probability, in (0, 1];
    /// 1 keeps every causal block.
    Mass(f64),
    /// This many blocks.
    TopK(usize),
}

/// Which of the heaviest elements of a row, by (mass descending, index ascending).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Prefix {
    /// The fewest whose masses reach a limit, all if they don't.
    Reaching,
    /// The most whose masses stay within a limit.
    Within,
    /// As many as a limit says.
    Count,
}

/// How the masses of a row's blocks choose among them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ByMass {
    /// As the rule's [`Budget`] says, each band for itself.
    Budget,
    /// Others follow the forced blocks until all of them reach a mass, `None` for every block.
    AfterForced(Option<u32>),
    /// Every block from a mass on. A row that would read nothing reads its diagonal block.
    Above(u32),
}

/// What a row reads, given its block scores.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SelectionRule {
    /// What each band keeps.
    pub budget: Budget,
    /// First blocks that every row reads.
    pub sink_blocks: usize,
    /// Last causal blocks that every row reads; 1 is the diagonal.
    pub recent_blocks: usize,
    /// Last query blocks of the prompt that read every causal block: the question usually sits
    /// there.
    pub dense_last_blocks: usize,
    /// Rows are filled up to this many blocks, best first, as far as causality allows.
    pub min_blocks: usize,
    /// Rows are cut to this many blocks, worst first; forced blocks always stay.
    pub max_blocks: Option<usize>,
}

impl Default for SelectionRule {
    fn default() -> Self {
        Self {
            budget: Budget::Mass(0.95),
            sink_blocks: 1,
            recent_blocks: 1,
            dense_last_blocks: 1,
            min_blocks: 1,
            max_blocks: None,
        }
    }
}

impl SelectionRule {
    /// Checks the settings.
    ///
    /// # Errors
    /// A mass outside (0, 1] or NaN; a top-k or maximum of 0; a minimum above the maximum.
    pub fn validate(&self) -> Result<()> {
        let refuse = |name, allowed, got: f64| Err(PrismError::OutOfRange { name, allowed, got });
        match self.budget {
            Budget::Mass(mass) if !(mass > 0.0 && mass <= 1.0) => {
                return refuse("mass", "above 0 and at most 1", mass);
            }
            Budget::TopK(0) => return refuse("top_k", "at least 1", 0.0),
            _ => {}
        }
        match self.max_blocks {
            Some(0) => refuse("max_blocks", "at least 1", 0.0),
            Some(max) if self.min_blocks > max => {
                refuse("min_blocks", "at most max_blocks", self.min_blocks as f64)
            }
            _ => Ok(()),
        }
    }

    /// Integer mass that a prefix must reach; `None` for every block.
    pub fn target(&self) -> Option<u32> {
        match self.budget {
            Budget::Mass(mass) if mass < 1.0 => {
                Some(((mass * f64::from(MASS_ONE)).round() as u32).max(1))
            }
            _ => None,
        }
    }

    /// Selects the blocks of one row of `causal` blocks from the masses of each band; `dense` rows
    /// read them all. Writes bits over `words`.
    pub fn select_row(
        &self,
        masses: &[impl AsRef<[u32]>],
        causal: usize,
        dense: bool,
        words: &mut [u32],
    ) {
        words.fill(0);
        if dense {
            (0..causal).for_each(|v| set(words, v));
            return;
        }
        for band in masses.iter().map(AsRef::as_ref) {
            match self.budget {
                Budget::TopK(k) => ranking(band).take(k).for_each(|v| set(words, v)),
                Budget::Mass(_) => {
                    let target = self.target().map_or(u64::MAX, u64::from);
                    let mut mass = 0u64;
                    for v in ranking(band) {
                        set(words, v);
                        mass += u64::from(band[v]);
                        if mass >= target {
                            break;
                        }
                    }
                }
            }
        }
        let best: Vec<u32> = (0..causal)
            .map(|v| masses.iter().map(|band| band.as_ref()[v]).max().unwrap_or(0))
            .collect();
        self.force_and_limit(&best, causal, words);
    }

    /// [`select_row`](Self::select_row) by one band, but forced blocks count first: others are added
    /// only until all together reach `target`, `None` for every block (XAttention's order).
    pub fn select_row_after_forced(
        &self,
        masses: &[u32],
        target: Option<u32>,
        dense: bool,
        words: &mut [u32],
    ) {
        words.fill(0);
        let causal = masses.len();
        if dense {
            (0..causal).for_each(|v| set(words, v));
            return;
        }
        let target = target.map_or(u64::MAX, u64::from);
        (0..causal).filter(|&v| self.forces(v, causal)).for_each(|v| set(words, v));
        let mut mass: u64 = set_bits(words).map(|v| u64::from(masses[v])).sum();
        for v in ranking(masses) {
            if mass >= target {
                break;
            }
            if !is_set(words, v) {
                set(words, v);
                mass += u64::from(masses[v]);
            }
        }
        self.force_and_limit(masses, causal, words);
    }

    /// Selects the blocks of one row whose mass reaches `target`, however much that is together; the
    /// budget plays no part, and a row that would read nothing reads its diagonal.
    pub fn select_row_above(&self, masses: &[u32], target: u32, dense: bool, words: &mut [u32]) {
        words.fill(0);
        let causal = masses.len();
        (0..causal).filter(|&v| dense || masses[v] >= target).for_each(|v| set(words, v));
        if dense {
            return;
        }
        self.force_and_limit(masses, causal, words);
        if words.iter().all(|&word| word == 0) && causal > 0 {
            set(words, causal - 1);
        }
    }

    /// Selects the given blocks of a row, those that are causal; the budget plays no part. The
    /// nearest blocks count as the best, and a row that would read nothing reads its diagonal.
    pub fn select_row_blocks(
        &self,
        blocks: impl IntoIterator<Item = usize>,
        causal: usize,
        dense: bool,
        words: &mut [u32],
    ) {
        words.fill(0);
        if dense {
            (0..causal).for_each(|v| set(words, v));
            return;
        }
        blocks.into_iter().filter(|&v| v < causal).for_each(|v| set(words, v));
        let nearness: Vec<u32> = (0..causal as u32).collect();
        self.force_and_limit(&nearness, causal, words);
        if words.iter().all(|&word| word == 0) && causal > 0 {
            set(words, causal - 1);
        }
    }

    /// Whether every row of `causal` blocks reads block `v`.
    fn forces(&self, v: usize, causal: usize) -> bool {
        v < self.sink_blocks || v + self.recent_blocks >= causal
    }

    /// Adds the forced blocks; fills the row to the minimum and cuts it to the maximum, by weight.
    fn force_and_limit(&self, weights: &[u32], causal: usize, words: &mut [u32]) {
        (0..self.sink_blocks.min(causal)).for_each(|v| set(words, v));
        (causal.saturating_sub(self.recent_blocks)..causal).for_each(|v| set(words, v));
        let selected = words.iter().map(|w| w.count_ones() as usize).sum::<usize>();
        if selected < self.min_blocks {
            let free: Vec<usize> = ranking(weights).filter(|&v| !is_set(words, v)).collect();
            free.into_iter().take(self.min_blocks - selected).for_each(|v| set(words, v));
        }
        if let Some(max) = self.max_blocks.filter(|&max| selected > max) {
            let chosen: Vec<usize> =
                ranking(weights).filter(|&v| is_set(words, v) && !self.forces(v, causal)).collect();
            for &v in chosen.iter().rev().take(selected - max) {
                words[v / WORD_BITS] &= !(1 << (v % WORD_BITS));
            }
        }
    }

    /// Selects the blocks of every row of one head and writes its bits, `[rows, words_per_row]`.
    ///
    /// `more_follows` says that this is a chunk of a prompt that goes on, so that its last blocks
    /// are not the prompt's.
    pub fn select_head(
        &self,
        head: PooledHead,
        grid: &BlockGrid,
        bands: &Bands,
        calibration: Calibration,
        more_follows: bool,
        (words, words_per_row): (&mut [u32], usize),
    ) {
        let dense_from = self.dense_from(grid, more_follows);
        let mut masses: Vec<Vec<u32>> = Vec::new();
        scores::for_each_row(head, grid, bands, calibration, |row, scores| {
            masses.resize(scores.len(), Vec::new());
            for (scores, masses) in scores.iter().zip(&mut masses) {
                integer_masses(scores, masses);
            }
            let words = &mut words[row * words_per_row..][..words_per_row];
            self.select_row(&masses, grid.causal_blocks(row), row >= dense_from, words);
        });
    }

    /// [`select_head`](Self::select_head) by second-order scores.
    pub fn select_head_second_order(
        &self,
        head: HeadMoments,
        grid: &SubBlocks,
        more_follows: bool,
        (words, words_per_row): (&mut [u32], usize),
    ) {
        let dense_from = self.dense_from(grid.blocks(), more_follows);
        second_order::for_each_row(head, grid, |row, masses| {
            let words = &mut words[row * words_per_row..][..words_per_row];
            self.select_row(&[masses], masses.len(), row >= dense_from, words);
        });
    }

    /// First row that reads every causal block.
    pub(crate) fn dense_from(&self, grid: &BlockGrid, more_follows: bool) -> usize {
        let dense = if more_follows { 0 } else { self.dense_last_blocks };
        grid.rows().saturating_sub(dense)
    }
}

/// Block indices by (mass descending, index ascending).
fn ranking(masses: &[u32]) -> impl Iterator<Item = usize> + use<> {
    let mut order: Vec<(Reverse<u32>, usize)> =
        masses.iter().enumerate().map(|(v, &mass)| (Reverse(mass), v)).collect();
    order.sort_unstable();
    order.into_iter().map(|(_, v)| v)
}

fn set(words: &mut [u32], v: usize) {
    words[v / WORD_BITS] |= 1 << (v % WORD_BITS);
}

fn is_set(words: &[u32], v: usize) -> bool {
    words[v / WORD_BITS] >> (v % WORD_BITS) & 1 == 1
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn rule(budget: Budget) -> SelectionRule {
        let rule = SelectionRule { budget, sink_blocks: 0, recent_blocks: 0, ..Default::default() };
        SelectionRule { dense_last_blocks: 0, ..rule }
    }

    fn select(rule: SelectionRule, masses: &[u32]) -> Vec<usize> {
        let mut words = vec![0; masses.len().div_ceil(WORD_BITS)];
        rule.select_row(&[masses.to_vec()], masses.len(), false, &mut words);
        set_bits(&words).collect()
    }

    proptest! {
        /// The set is the one any order of summation gives: the k heaviest, ties to the lower
        /// index, k the smallest whose sum reaches the target.
        #[test]
        fn keeps_the_smallest_prefix_that_reaches_the_mass(
            scores in prop::collection::vec(-8.0f32..8.0, 1..200), mass in 0.01f64..1.0,
        ) {
            let mut masses = Vec::new();
            integer_masses(&scores, &mut masses);
            let rule = rule(Budget::Mass(mass));
            let chosen = select(rule, &masses);
            let sum = |set: &[usize]| set.iter().map(|&v| u64::from(masses[v])).sum::<u64>();
            let target = u64::from(rule.target().unwrap());
            let lightest = *chosen.iter().max_by_key(|&&v| (Reverse(masses[v]), v)).unwrap();
            prop_assert!(sum(&chosen) >= target || chosen.len() == masses.len());
            prop_assert!(sum(&chosen) - u64::from(masses[lightest]) < target);
            for v in 0..masses.len() {
                let heavier = (Reverse(masses[v]), v) <= (Reverse(masses[lightest]), lightest);
                prop_assert_eq!(chosen.contains(&v), heavier);
            }
        }

        #[test]
        fn forced_blocks_and_limits_hold(
            scores in prop::collection::vec(-8.0f32..8.0, 1..100), mass in 0.1f64..1.0,
            sink in 0usize..4, recent in 0usize..4, min in 1usize..20, extra in 0usize..20,
        ) {
            let rule = SelectionRule {
                budget: Budget::Mass(mass), sink_blocks: sink, recent_blocks: recent,
                dense_last_blocks: 0, min_blocks: min, max_blocks: Some(min + extra),
            };
            let n = scores.len();
            let mut masses = Vec::new();
            integer_masses(&scores, &mut masses);
            let chosen = select(rule, &masses);
            let forced: Vec<usize> = (0..n).filter(|&v| v < sink || v + recent >= n).collect();
            prop_assert!(forced.iter().all(|v| chosen.contains(v)));
            prop_assert!(chosen.len() >= min.min(n));
            prop_assert!(chosen.len() <= (min + extra).max(forced.len()));
        }
    }

    #[test]
    fn mass_one_keeps_every_block() {
        assert_eq!(select(rule(Budget::Mass(1.0)), &[MASS_ONE, 0, 0]), [0, 1, 2]);
    }

    #[test]
    fn ties_go_to_the_lower_index() {
        assert_eq!(select(rule(Budget::TopK(2)), &[5, 9, 5, 5]), [0, 1]);
        assert_eq!(select(rule(Budget::Mass(0.5)), &[MASS_ONE / 4; 4]), [0, 1]);
    }

    #[test]
    fn a_row_without_usable_scores_keeps_every_block() {
        let mut masses = Vec::new();
        integer_masses(&[f32::NAN; 3], &mut masses);
        assert_eq!(select(rule(Budget::Mass(0.5)), &masses), [0, 1, 2]);
    }

    #[test]
    fn a_maximum_binds_where_everything_is_kept_after_forced_blocks() {
        let rule = SelectionRule { max_blocks: Some(2), ..rule(Budget::Mass(0.5)) };
        let mut words = [0];
        rule.select_row_after_forced(&[5, 9, 7, 8], None, false, &mut words);
        assert_eq!(words, [0b1010]);
    }

    #[test]
    fn bad_settings_are_refused() {
        for mass in [0.0, -1.0, 1.5, f64::NAN] {
            assert!(rule(Budget::Mass(mass)).validate().is_err(), "{mass}");
        }
        assert!(rule(Budget::TopK(0)).validate().is_err());
        let limits = SelectionRule { min_blocks: 3, max_blocks: Some(2), ..Default::default() };
        assert!(limits.validate().is_err());
        let limits = SelectionRule { max_blocks: Some(0), ..Default::default() };
        assert!(limits.validate().is_err());
    }
}
