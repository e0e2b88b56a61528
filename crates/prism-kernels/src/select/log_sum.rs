//! Sums of exponentials, as logarithms to base 2 all along.

use cubecl::prelude::*;

use crate::attend::softmax::nothing;
use crate::special::log2;

/// What is subtracted before exponentials: never −∞, since −∞ − −∞ is NaN.
#[cube]
pub(crate) fn reference(largest: f32) -> f32 {
    largest.max(comptime!(f32::MIN))
}

/// The logarithm of a sum from its largest term and the sum relative to [`reference`].
#[cube]
pub(crate) fn log_sum(largest: f32, sum: f32, #[comptime] ptx: bool) -> f32 {
    select(sum == 0.0f32, nothing(), reference(largest) + log2(sum, ptx))
}
