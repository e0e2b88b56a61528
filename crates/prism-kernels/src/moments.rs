//! Means and variances of the key blocks of one tensor, for second-order scores
//! ([`prism_core::second_order`]).

use cubecl::prelude::*;
use cubecl::server::Handle;
use prism_core::BlockGrid;
use prism_core::selection::extent;

use crate::capabilities::Capabilities;
use crate::operand::{Operand, buffer};
use crate::span::{Spans, span};
use crate::work::{cube_count, launch, widest};

/// Means and variances of blocks.
#[derive(Debug, Clone)]
pub struct Moments {
    /// `[batch, heads, blocks, head_dim]` f32, over the tokens actually present; 0 for blocks that
    /// a shorter sequence lacks.
    pub means: Handle,
    /// Likewise, of each dim by itself (population).
    pub variances: Handle,
    /// Blocks of the longest sequence.
    pub blocks: usize,
}

/// Pools the key blocks of `k`. The second pass over a block, for its variance, finds it in cache.
pub fn pool_moments(
    client: &Client,
    capabilities: &Capabilities,
    k: &Operand,
    grids: &[BlockGrid],
) -> Moments {
    let [batch, heads, _, dim] = k.shape;
    let blocks = extent(grids).1;
    let lines = batch * heads * blocks;
    let moments = Moments {
        means: client.empty((lines * dim * 4).max(4)),
        variances: client.empty((lines * dim * 4).max(4)),
        blocks,
    };
    let Some(block) = grids.first().map(BlockGrid::block).filter(|_| lines > 0) else {
        return moments;
    };
    let spans = Spans::new(client, grids);
    let bytes = if capabilities.cores.is_some() { 64 } else { 16 };
    let vector = widest(client, k.vector_size(bytes));
    let lanes = dim / vector;
    let units = capabilities.cores.unwrap_or(128.min(capabilities.units));
    let shape = MomentsShape { block, dim, ragged: spans.ragged(), dense: k.strides[3] == 1 };
    // SAFETY: units past the last line return; each line stays within its block, whose rows lie in
    // the tensor, and each unit writes its own dims of its own line.
    unsafe {
        launch!(
            moments_kernel,
            client,
            cube_count(client, (lines * lanes).div_ceil(units as usize)),
            CubeDim::new_1d(units),
            k.address_type(),
            vector,
            k.arg(),
            buffer(&moments.means, lines * dim),
            buffer(&moments.variances, lines * dim),
            spans.arg(&moments.means),
            spans.uniform.0,
            spans.uniform.1,
            heads,
            blocks,
            lines * lanes,
            shape,
            k.element.elem_type(),
        );
    }
    moments
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct MomentsShape {
    block: usize,
    dim: usize,
    ragged: bool,
    /// Whether the last dim has no gaps.
    dense: bool,
}

/// A unit a vector of dims of a block.
#[cube(launch_unchecked, create_dummy_kernel, address_type = "dynamic")]
fn moments_kernel<E: Float, N: Size>(
    k: &Tensor<Vector<E, N>>,
    means: &mut [f32],
    variances: &mut [f32],
    lengths: &[u32],
    q_len: usize,
    kv_len: usize,
    heads: usize,
    blocks: usize,
    work: usize,
    #[comptime] shape: MomentsShape,
    #[define(E)] _element: ElemType,
) {
    let i = ABSOLUTE_POS;
    if i >= work {
        terminate!();
    }
    let width = N::value();
    let block = comptime!(shape.block);
    let lanes = comptime!(shape.dim / width);
    let line = i / lanes;
    let lane = i % lanes;
    let head = line / blocks;
    let span = span(lengths, head / heads, q_len, kv_len, comptime!(shape.ragged));
    let start = ((line % blocks) * block).min(span.kv_len);
    let end = (start + block).min(span.kv_len);
    let mut column = lane;
    if comptime!(!shape.dense) {
        column = lane * k.stride(3);
    }
    let base = (head / heads) * k.stride(0) + (head % heads) * k.stride(1);
    let base = base / width + column;
    let step = k.stride(2) / width;
    let share = Vector::<f32, N>::new(1.0 / f32::cast_from((end - start).max(1)));
    let mut sum = Vector::<f32, N>::new(0.0);
    for row in start..end {
        sum += Vector::cast_from(k[base + row * step]);
    }
    let mean = sum * share;
    let mut squares = Vector::<f32, N>::new(0.0);
    for row in start..end {
        let off = Vector::<f32, N>::cast_from(k[base + row * step]) - mean;
        squares += off * off;
    }
    let variance = squares * share;
    let place = line * comptime!(shape.dim) + lane * width;
    #[unroll]
    for e in 0..width {
        means[place + e] = mean.extract(e);
        variances[place + e] = variance.extract(e);
    }
}
