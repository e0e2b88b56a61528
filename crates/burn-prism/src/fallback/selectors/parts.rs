//! Prism's bands over means of parts of blocks, as [`prism_core::selectors::Prism`] with a `pool_block`.

use std::ops::Range;

use burn::backend::Backend;
use prism_core::bands::Bands;
use prism_core::second_order::SubBlocks;
use prism_core::select::ByMass;
use prism_core::{BlockGrid, Calibration, SelectionRule};

use crate::fallback::choice::{Choice, RowSource};
use crate::fallback::select::Heads;
use crate::fallback::sub_blocks::block_masses;
use crate::fallback::tensor::{Bool, Float};
use crate::ops::SelectParams;

/// The heads of some sequences on one grid.
pub struct Parts<B: Backend> {
    heads: Heads<B>,
    grid: SubBlocks,
}

impl<B: Backend> Parts<B> {
    /// Of means of parts of `pool` positions: queries `[batch, q_heads, query parts, head_dim]`, keys
    /// `[batch, kv_heads, key parts, head_dim]`.
    pub fn new(
        (q, k): (Float<B>, Float<B>),
        grid: &BlockGrid,
        pool: usize,
        bands: &Bands,
        calibration: Calibration,
    ) -> Self {
        let grid = SubBlocks::new(*grid, pool, pool);
        let [batch, heads, ..] = q.dims::<4>();
        let history = Float::full([batch, heads, 4], 0.0, &q.device());
        let params = SelectParams::new(
            vec![*grid.queries(); batch],
            bands.clone(),
            calibration,
            SelectionRule::default(),
            false,
        );
        Self { heads: Heads::new(q, k, history, grid.queries(), &params), grid }
    }
}

impl<B: Backend> RowSource<B> for Parts<B> {
    fn row_elements(&self) -> usize {
        self.grid.queries_per_block() * self.heads.row_elements()
    }

    fn choose(&self, rows: Range<usize>, future: &Bool<B>) -> Choice<B> {
        let band = |z| {
            block_masses(&self.grid, rows.clone(), future, |queries, keys| {
                self.heads.scores(z, queries, keys)
            })
        };
        Choice::Masses((0..self.heads.bands()).map(band).collect(), ByMass::Budget)
    }
}
