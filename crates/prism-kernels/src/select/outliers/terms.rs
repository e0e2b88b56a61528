//! What a key sub-block adds to a block's mass, as a logarithm to base 2, and the factors on its products.

use cubecl::prelude::*;

use crate::fixed::usable;
use crate::special::root;

/// Factors on products of queries and keys.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
pub(super) struct Factors {
    /// Of q·k: the scale times log2 e.
    pub score: f32,
    /// Of Σ q² var: the scale's square times log2 e.
    pub spread: f32,
}

impl FactorsLaunch {
    /// Of attention's scale.
    pub fn of(scale: f64) -> Self {
        let log2_e = std::f64::consts::LOG2_E;
        Self::new((scale * log2_e) as f32, (scale * scale * log2_e) as f32)
    }
}

/// log2 Σ exp of the scores of n keys with mean score log2 e · μ = `mean` and log2 e · σ² = `variance`,
/// n = 2^`log_count`, as [`prism_core::selectors::outliers::log_sum_exp`] has it.
#[cube]
pub(super) fn cloud(mean: f32, variance: f32, log_count: f32, #[comptime] ptx: bool) -> f32 {
    let few = variance < 2.0f32 * log_count;
    let frozen = root(2.0f32 * log_count * variance, ptx);
    usable(mean + select(few, 0.5f32 * variance + log_count, frozen))
}
