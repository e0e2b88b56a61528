//! Running softmax of a row.

use cubecl::prelude::*;

/// −∞.
#[cube]
pub(crate) fn nothing() -> f32 {
    f32::reinterpret(0xff80_0000u32)
}

/// The maximum as a reference to subtract: 0 as long as nothing was seen, since −∞ − −∞ is NaN.
#[cube]
pub(crate) fn reference(max: f32) -> f32 {
    select(max == nothing(), 0.0f32, max)
}

/// 1 / Σ, or 0 for a row without keys. A NaN sum stays NaN.
#[cube]
pub(crate) fn inverse(sum: f32) -> f32 {
    select(sum == 0.0f32, 0.0f32, 1.0f32 / sum)
}

/// Log-sum-exp from the maximum and the sum of exponentials relative to it.
#[cube]
pub(crate) fn log_sum_exp(max: f32, sum: f32) -> f32 {
    select(sum == 0.0f32, nothing(), reference(max) + sum.ln())
}
