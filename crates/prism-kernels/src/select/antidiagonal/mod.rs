//! Masses of blocks by sums along antidiagonals (XAttention, arXiv 2503.16428), on tensor cores.
//!
//! Queries and keys stand in groups of S. The sum along the antidiagonal of the S×S tile of two groups is
//! the product of two vectors of S·head_dim: the queries of one group in reverse and the keys of the other.
//! So the scores are a matrix product of the groups, whose rows are read where they lie ([`products`]).
//! [`sums`] adds up their exponentials by block before they ever reach memory, [`masses`] these to the row's
//! masses. What [`prism_core::selectors::XAttention`] defines, but in f32.

mod masses;
mod products;
mod sums;

use std::ops::Range;

use cubecl::prelude::*;
use cubecl::server::Handle;
use derive_new::new;
use prism_core::BlockGrid;

use crate::capabilities::Capabilities;
use crate::operand::{Element, Operand};

/// Bytes of sums that are there at once, but for those of one head at least.
pub const SCRATCH: usize = 64 << 20;

/// What masses are made from.
#[derive(Debug, Clone, new)]
pub struct AntidiagonalProblem<'a> {
    /// Queries `[batch, q_heads, q_len, head_dim]`.
    pub q: &'a Operand,
    /// Keys `[batch, kv_heads, kv_len, head_dim]`, of the same element type.
    pub k: &'a Operand,
    /// Block grid of every sequence.
    pub grid: &'a BlockGrid,
    /// Rows of the grid.
    pub rows: Range<usize>,
    /// Positions a group.
    pub stride: usize,
    /// Factor on the scores of attention.
    pub scale: f64,
    /// Bytes of sums that are there at once, but for those of one head at least; [`SCRATCH`] unless changed.
    #[new(value = "SCRATCH")]
    pub scratch: usize,
}

impl AntidiagonalProblem<'_> {
    /// Whether the kernels run the problem: they [`take`](takes) it, and 16 bytes divide its rows.
    pub fn runs(&self, capabilities: &Capabilities) -> bool {
        let AntidiagonalProblem { q, k, grid, stride, .. } = *self;
        q.element == k.element
            && takes(capabilities, q.element, q.shape[3], grid.block(), stride)
            && [q, k].iter().all(|x| x.vector_size(16) == sums::WIDE)
    }

    /// Groups a block.
    fn per_block(&self) -> usize {
        self.grid.block() / self.stride
    }

    /// The causal blocks of the last row.
    fn blocks(&self) -> usize {
        self.grid.causal_blocks_of(&self.rows)
    }
}

/// Whether the kernels take heads of a type and width in blocks of a size: f16 or bf16 on tensor cores,
/// head_dim in multiples of 16, groups of at least 4 positions, and 2 to 64 of them a block, a power of
/// two.
pub fn takes(
    capabilities: &Capabilities,
    element: Element,
    dim: usize,
    block: usize,
    stride: usize,
) -> bool {
    capabilities.mma(element)
        && capabilities.copy_async
        && sums::fits(capabilities, dim, block, stride)
}

/// Integer masses `[batch · q_heads, rows, blocks]` u32 of a problem that the kernels
/// [run](AntidiagonalProblem::runs), where `blocks` are those that the last of the rows may read: softmax of
/// the scores of each query group over its causal key groups, summed over the key groups of a block and
/// averaged over the query groups of a row. A score that is NaN counts for nothing. 0 after a row's causal
/// blocks. Below 2³² of them.
pub fn antidiagonal_masses(
    client: &Client,
    capabilities: &Capabilities,
    problem: &AntidiagonalProblem,
) -> Handle {
    let [batch, q_heads, ..] = problem.q.shape;
    let (heads, rows, blocks) = (batch * q_heads, problem.rows.len(), problem.blocks());
    let masses = client.empty((heads * rows * blocks * 4).max(4));
    if heads * rows * blocks == 0 {
        return masses;
    }
    let lines = rows * problem.per_block();
    let at_once = (problem.scratch / (lines * blocks * 4)).clamp(1, heads);
    let sums = client.empty(at_once * lines * blocks * 4);
    for first_head in (0..heads).step_by(at_once) {
        let run = HostRun { first_head, heads: at_once.min(heads - first_head), lines };
        sums::sum(client, capabilities, problem, &run, &sums);
        masses::masses(client, problem, &run, &sums, &masses);
    }
    masses
}

/// Heads whose sums are there at once.
struct HostRun {
    first_head: usize,
    heads: usize,
    /// Query groups a head.
    lines: usize,
}

/// Where the groups of a run lie.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
struct Run {
    q_heads: usize,
    /// Query heads a kv head.
    group: usize,
    first_head: usize,
    heads: usize,
    /// Query groups a head; the first begins a block.
    lines: usize,
    /// Group of the first line.
    first_group: usize,
    /// Blocks a line.
    blocks: usize,
    kv_len: usize,
    /// Position of the first query that sees a key.
    first_position: usize,
    /// Queries before it.
    blind: usize,
}

impl HostRun {
    fn launch(&self, problem: &AntidiagonalProblem) -> RunLaunch {
        let grid = problem.grid;
        RunLaunch::new(
            problem.q.shape[1],
            problem.q.shape[1] / problem.k.shape[1],
            self.first_head,
            self.heads,
            self.lines,
            (grid.first_block() + problem.rows.start) * problem.per_block(),
            problem.blocks(),
            grid.kv_len(),
            grid.first_position(),
            grid.blind_queries(),
        )
    }
}

#[cube]
impl Run {
    /// Whether a line's group holds a query that sees a key.
    fn holds(&self, line: usize, #[comptime] stride: usize) -> bool {
        let start = (self.first_group + line) * stride;
        line < self.lines && start + stride > self.first_position && start < self.kv_len
    }
}
