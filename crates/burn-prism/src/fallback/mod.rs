//! The operations in Burn tensor ops, for any backend: what runs where no kernel does, and what
//! gradients flow through.
//!
//! Nothing is read back to the host, so lazy backends stay lazy. Sequences with the same grid are
//! computed as one batch; padding is sliced away rather than masked, since it may be NaN.

mod attend;
mod by_mass;
mod choice;
mod linear;
mod pool;
mod rotate;
mod rule;
mod second_order;
mod select;
pub mod selectors;
mod softmax;
mod sub_blocks;
mod tensor;

use std::ops::Range;

use prism_core::BlockGrid;

pub use attend::attend;
pub use by_mass::{choose, heaviest_prefix};
pub use linear::{linear, linear_residual, swiglu};
pub use pool::{pool, pool_moments};
pub use rotate::{rotate, rotate_and_pool, turn};
pub use second_order::select_second_order;
pub use select::{select, select_blocks};
pub use selectors::{antidiagonal_masses, line_sums};

/// About how many elements a temporary may have: what bounds the memory.
const TILE: usize = 1 << 22;

/// Runs of consecutive sequences on the same grid.
fn runs(grids: &[BlockGrid]) -> impl Iterator<Item = (Range<usize>, &BlockGrid)> {
    let mut next = 0;
    grids.chunk_by(|a, b| a == b).map(move |run| {
        let start = next;
        next += run.len();
        (start..next, &run[0])
    })
}

/// `0..len` in steps of `step`.
fn steps(len: usize, step: usize) -> impl Iterator<Item = Range<usize>> {
    (0..len).step_by(step).map(move |start| start..(start + step).min(len))
}
