//! Where the queries and keys of one sequence sit on the absolute grid, on the device: the same
//! arithmetic as [`prism_core::BlockGrid`].

use cubecl::prelude::*;
use prism_core::BlockGrid;

/// Lengths of the sequences of a batch, on the host and, if they differ, on the device.
#[derive(Debug, Clone)]
pub struct Spans {
    /// `(q_len, kv_len)` of the longest sequence, or of every one.
    pub(crate) uniform: (usize, usize),
    /// `[batch, 2]` u32 if the sequences differ.
    pub(crate) lengths: Option<cubecl::server::Handle>,
    pub(crate) batch: usize,
}

impl Spans {
    /// Brings the lengths of `grids`, one a sequence, to the device.
    pub fn new(client: &Client, grids: &[BlockGrid]) -> Self {
        let lengths = |grid: &BlockGrid| (grid.q_len(), grid.kv_len());
        let first = grids.first().map_or((0, 0), lengths);
        let uniform = grids.iter().all(|grid| lengths(grid) == first);
        let buffer = (!uniform).then(|| {
            let flat: Vec<u32> =
                grids.iter().flat_map(|grid| [grid.q_len() as u32, grid.kv_len() as u32]).collect();
            client.create_from_slice(u32::as_bytes(&flat))
        });
        Self { uniform: first, lengths: buffer, batch: grids.len() }
    }

    /// The lengths as a kernel argument; `unused` stands in where there is no buffer.
    pub(crate) fn arg(&self, unused: &cubecl::server::Handle) -> BufferArg {
        match &self.lengths {
            Some(handle) => crate::operand::buffer(handle, 2 * self.batch),
            None => crate::operand::buffer(unused, 1),
        }
    }

    pub(crate) fn ragged(&self) -> bool {
        self.lengths.is_some()
    }
}

/// One sequence.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Span {
    /// Keys.
    pub kv_len: usize,
    /// Queries that see a key.
    pub seeing: usize,
    /// Leading queries that see none.
    pub blind: usize,
}

#[cube]
pub(crate) fn span(
    lengths: &[u32],
    batch: usize,
    q_len: usize,
    kv_len: usize,
    #[comptime] ragged: bool,
) -> Span {
    let mut queries = q_len;
    let mut keys = kv_len;
    if comptime!(ragged) {
        queries = usize::cast_from(lengths[batch * 2]);
        keys = usize::cast_from(lengths[batch * 2 + 1]);
    }
    let seeing = queries.min(keys);
    Span { kv_len: keys, seeing, blind: queries - seeing }
}

#[cube]
impl Span {
    /// Position of the first query that sees a key.
    pub fn first_position(&self) -> usize {
        self.kv_len - self.seeing
    }

    /// Query block of row 0.
    pub fn first_block(&self, #[comptime] block: usize) -> usize {
        self.first_position() / block
    }

    /// Key blocks.
    pub fn key_blocks(&self, #[comptime] block: usize) -> usize {
        self.kv_len.div_ceil(block)
    }

    /// Rows of the selection: query blocks that hold a seeing query.
    pub fn rows(&self, #[comptime] block: usize) -> usize {
        select(self.seeing == 0, 0usize, self.key_blocks(block) - self.first_block(block))
    }

    /// Causal blocks of a row; 0 where this sequence lacks it.
    pub fn causal_blocks(&self, row: usize, #[comptime] block: usize) -> usize {
        let causal = (self.first_block(block) + row + 1).min(self.key_blocks(block));
        select(row < self.rows(block), causal, 0usize)
    }
}
