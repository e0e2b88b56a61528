//! Probabilities and integer masses of blocks.
//!
//! In floats, where the native implementations use fixed point ([`prism_core::masses`]): Burn's ints
//! have no 64-bit products on every backend. A mass is off by up to about 1e-6 of it, hence only
//! blocks that close to the edge of the budget may come out otherwise than there.

use burn::backend::Backend;
use prism_core::masses::MASS_ONE;

use super::tensor::{Bool, Float, Int};

/// Scores `[batch, q_heads, rows, blocks]`, without repeating the keys of a group of heads.
pub fn scores<B: Backend>(q: Float<B>, k: Float<B>) -> Float<B> {
    let [batch, heads, rows, dims] = q.dims();
    let [_, kv_heads, _, blocks] = k.dims();
    q.reshape([batch, kv_heads, heads / kv_heads * rows, dims])
        .matmul(k)
        .reshape([batch, heads, rows, blocks])
}

/// Softmax of scores; 0 where `future`, and for rows without any usable score. A NaN has no
/// probability and an infinite score counts as the largest finite number.
pub fn probabilities<B: Backend>(scores: Float<B>, future: &Bool<B>) -> Float<B> {
    let unusable = scores.is_nan() | future.clone();
    let scores = scores.fill(&unusable, f32::NEG_INFINITY).at_most(f32::MAX);
    let max = scores.clone().max(3);
    let max = max.clone().fill(&max.eq(f32::NEG_INFINITY), 0.0);
    let weights = (scores - max).exp();
    let total = weights.clone().sum(3).at_least(1.0);
    weights / total
}

/// Probabilities as integer masses; −1 where `future`.
pub fn masses<B: Backend>(probabilities: Float<B>, future: &Bool<B>) -> Int<B> {
    (probabilities * MASS_ONE as f32).round().fill(future, -1)
}
