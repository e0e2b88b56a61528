//! What the [operations](crate::ops) of backends take beside tensors.

use std::ops::Range;

use derive_new::new;
use prism_core::bands::Bands;
use prism_core::second_order::SubBlocks;
use prism_core::select::ByMass;
use prism_core::selectors::Outliers;
use prism_core::{BlockGrid, Calibration, RopeLayout, SelectionRule};

/// How pooled Q and K become a selection.
#[derive(Debug, Clone, new)]
pub struct SelectParams {
    /// Block grid of each sequence.
    pub grids: Vec<BlockGrid>,
    /// Dims of each band.
    pub bands: Bands,
    /// Temperature calibration.
    pub calibration: Calibration,
    /// The selection rule.
    pub rule: SelectionRule,
    /// Whether this is a chunk of a prompt that goes on.
    pub more_follows: bool,
}

/// How pooled sub-blocks become a selection ([`prism_core::second_order`]).
#[derive(Debug, Clone, new)]
pub struct SecondOrderParams {
    /// Block grid of each sequence.
    pub grids: Vec<BlockGrid>,
    /// Positions a query sub-block.
    pub query_sub: usize,
    /// Positions a key sub-block.
    pub key_sub: usize,
    /// The selection rule.
    pub rule: SelectionRule,
    /// Whether this is a chunk of a prompt that goes on.
    pub more_follows: bool,
}

impl SecondOrderParams {
    /// Sub-blocks of a sequence.
    pub fn sub_blocks(&self, sequence: usize) -> SubBlocks {
        SubBlocks::new(self.grids[sequence], self.query_sub, self.key_sub)
    }
}

/// How Q and K become a selection with outlier keys apart ([`prism_core::selectors::outliers`]).
#[derive(Debug, Clone, new)]
pub struct OutliersParams {
    /// Block grid of each sequence.
    pub grids: Vec<BlockGrid>,
    /// Threshold and sub-blocks.
    pub options: Outliers,
    /// Factor on the scores of attention.
    pub scale: f64,
    /// The selection rule; its budget plays no part.
    pub rule: SelectionRule,
    /// Whether this is a chunk of a prompt that goes on.
    pub more_follows: bool,
}

/// How Q and K become masses of blocks by sums along antidiagonals
/// ([`prism_core::selectors::XAttention`]).
#[derive(Debug, Clone, new)]
pub struct AntidiagonalParams {
    /// Block grid of every sequence.
    pub grid: BlockGrid,
    /// Rows of the grid.
    pub rows: Range<usize>,
    /// Positions a group; divides the block. Groups of 1 are single tokens: true masses.
    pub stride: usize,
    /// Factor on the scores of attention.
    pub scale: f64,
}

/// How masses of blocks become a selection ([`prism_core::select`]).
#[derive(Debug, Clone, new)]
pub struct ChooseParams {
    /// Block grid of every sequence.
    pub grid: BlockGrid,
    /// Rows of the grid.
    pub rows: Range<usize>,
    /// Masses of a block: 1, or 2 by the budget alone.
    pub bands: usize,
    /// How masses choose.
    pub by: ByMass,
    /// The selection rule.
    pub rule: SelectionRule,
    /// Whether this is a chunk of a prompt that goes on.
    pub more_follows: bool,
    /// Words a row of the result.
    pub words_per_row: usize,
}

/// How Q and K are rotated and pooled.
#[derive(Debug, Clone, new)]
pub struct RotateParams {
    /// Block grid of each sequence.
    pub grids: Vec<BlockGrid>,
    /// Which dims form a pair.
    pub layout: RopeLayout,
    /// Leading dims of a head that turn; even.
    pub rotary_dim: usize,
    /// Dims of each band.
    pub bands: Bands,
    /// The scale of attention, if Q shall be multiplied by it and by log2 e before it is rounded.
    pub prescale: Option<f64>,
}

/// How attention is computed.
#[derive(Debug, Clone, new)]
pub struct AttendParams {
    /// Block grid of each sequence.
    pub grids: Vec<BlockGrid>,
    /// Factor on the scores of Q as it is: ln 2 where it was prescaled.
    pub scale: f64,
    /// Whether Q was multiplied by the scale and by log2 e, which saves Hopper's kernel an instruction a
    /// score.
    #[new(default)]
    pub prescaled: bool,
}
