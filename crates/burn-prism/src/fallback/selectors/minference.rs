//! MInference's vertical-slash heads.

use prism_core::BlockGrid;
use prism_core::selectors::MInference;
use prism_core::selectors::minference::{MIN_VERTICAL, RECENT_SLASH};

use super::last_queries::LastQueries;
use super::lines::{Lines, largest, masses};
use crate::fallback::tensor::{Float, Int};
use crate::ops::PrismBackend;

/// What the heads of some sequences on one grid read.
pub fn lines<B: PrismBackend>(
    q: Float<B>,
    k: Float<B>,
    grid: &BlockGrid,
    scale: f32,
    options: &MInference,
) -> Lines<B> {
    let device = q.device();
    let last = LastQueries::new(q, &k, grid, scale, options.last_queries);
    let (vertical, slash) = options.budget(grid.kv_len());
    let [batch, heads, ..] = last.vertical.dims::<4>();
    let number = |n: usize| Int::full([batch, heads, 1, 1], n as i32, &device);
    let columns = largest(masses(last.vertical), MIN_VERTICAL, number(vertical));
    let distances = largest(masses(last.slash), RECENT_SLASH, number(slash));

    let (blocks, block) = (grid.key_blocks(), grid.block());
    let by_block = |lines: Int<B>| {
        Int::join(vec![lines], 3, [batch, heads, 1, blocks * block], 0, &device)
            .reshape([batch, heads, blocks, block])
    };
    let any = |lines: Int<B>| lines.sum(3).at_most(1).reshape([batch, heads, 1, blocks]);
    let distances = by_block(distances);
    // A distance that isn't a multiple of the block reaches over into the next.
    let mut reached = any(distances.clone());
    if block > 1 && blocks > 1 {
        let over = any(distances.slice(3, 1..block)).slice(3, 0..blocks - 1);
        let none = Int::full([batch, heads, 1, 1], 0, &device);
        let over = Int::join(vec![none, over], 3, [batch, heads, 1, blocks], 0, &device);
        reached = (reached + over).at_most(1);
    }
    Lines {
        columns: any(by_block(columns)),
        distances: reached,
        pairs: None,
        first_block: grid.first_block(),
    }
}
