//! The shortest key of each key sub-block.

use cubecl::prelude::*;
use cubecl::server::Handle;
use prism_core::BlockGrid;
use prism_core::selection::extent;

use crate::capabilities::Capabilities;
use crate::operand::{Operand, buffer};
use crate::span::{Spans, span};
use crate::work::{cube_count, launch, widest};

/// Sub-blocks a cube of planes.
const PLANES: u32 = 4;

/// The shortest keys of sub-blocks.
pub(super) struct Shortest {
    /// `[batch, heads, blocks, head_dim]` f32; 0 for sub-blocks that a shorter sequence lacks.
    pub keys: Handle,
    /// Their positions, `[batch, heads, blocks]` u32.
    pub positions: Handle,
}

/// The key of each block of `grids` with the least square, the first of several. A plane a block, or a
/// unit where there are no planes.
pub(super) fn shortest(
    client: &Client,
    capabilities: &Capabilities,
    k: &Operand,
    grids: &[BlockGrid],
) -> Shortest {
    let [batch, heads, _, dim] = k.shape;
    let blocks = extent(grids).1;
    let lines = batch * heads * blocks;
    let found = Shortest {
        keys: client.empty((lines * dim * 4).max(4)),
        positions: client.empty((lines * 4).max(4)),
    };
    let Some(block) = grids.first().map(BlockGrid::block).filter(|_| lines > 0) else {
        return found;
    };
    let spans = Spans::new(client, grids);
    let lanes = capabilities.plane.unwrap_or(1);
    let (per_cube, cube) = match (capabilities.plane, capabilities.cores) {
        (Some(lanes), _) => {
            let planes = PLANES.min(capabilities.units / lanes).max(1);
            (planes, CubeDim::new_2d(lanes, planes))
        }
        (None, cores) => {
            let units = cores.unwrap_or(128.min(capabilities.units));
            (units, CubeDim::new_2d(1, units))
        }
    };
    let shape = ShortestShape {
        block,
        dim,
        lanes: lanes as usize,
        ragged: spans.ragged(),
        dense: k.strides[3] == 1,
    };
    // SAFETY: units past the last line return; each line stays within its block, whose rows lie in
    // the tensor, and writes its own key and position.
    unsafe {
        launch!(
            shortest_kernel,
            client,
            cube_count(client, lines.div_ceil(per_cube as usize)),
            cube,
            k.address_type(),
            widest(client, k.vector_size(16)),
            k.arg(),
            buffer(&found.keys, lines * dim),
            buffer(&found.positions, lines),
            spans.arg(&found.positions),
            spans.uniform.0,
            spans.uniform.1,
            heads,
            blocks,
            lines,
            shape,
            k.element.elem_type(),
        );
    }
    found
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct ShortestShape {
    block: usize,
    dim: usize,
    /// Units that work a block together.
    lanes: usize,
    ragged: bool,
    /// Whether the last dim has no gaps.
    dense: bool,
}

#[cube(launch_unchecked, create_dummy_kernel, address_type = "dynamic")]
fn shortest_kernel<E: Float, N: Size>(
    k: &Tensor<Vector<E, N>>,
    keys: &mut [f32],
    positions: &mut [u32],
    lengths: &[u32],
    q_len: usize,
    kv_len: usize,
    heads: usize,
    blocks: usize,
    lines: usize,
    #[comptime] shape: ShortestShape,
    #[define(E)] _element: ElemType,
) {
    let line = CUBE_POS * CUBE_DIM_Y as usize + UNIT_POS_Y as usize;
    if line >= lines {
        terminate!();
    }
    let lane = UNIT_POS_X as usize;
    let lanes = comptime!(shape.lanes);
    let block = comptime!(shape.block);
    let width = N::value();
    let chunks = comptime!(shape.dim / width);
    let head = line / blocks;
    let span = span(lengths, head / heads, q_len, kv_len, comptime!(shape.ragged));
    let start = ((line % blocks) * block).min(span.kv_len);
    let end = (start + block).min(span.kv_len);
    let base = ((head / heads) * k.stride(0) + (head % heads) * k.stride(1)) / width;
    let step = k.stride(2) / width;
    let mut column = 1usize;
    if comptime!(!shape.dense) {
        column = k.stride(3);
    }
    let mut least = comptime!(f32::MAX).runtime();
    let mut shortest = start;
    let mut row = start + lane;
    while row < end {
        let mut squares = Vector::<f32, N>::new(0.0f32);
        for c in 0..chunks {
            let x = Vector::<f32, N>::cast_from(k[base + row * step + c * column]);
            squares += x * x;
        }
        let mut square = 0.0f32;
        #[unroll]
        for e in 0..width {
            square += squares.extract(e);
        }
        if square < least {
            least = square;
            shortest = row;
        }
        row += lanes;
    }
    if comptime!(lanes > 1) {
        let all = plane_min(least);
        let own = select(least == all, shortest as u32, u32::MAX);
        shortest = plane_min(own) as usize;
    }
    if lane == 0 {
        positions[line] = shortest as u32;
    }
    let mut c = lane;
    while c < chunks {
        let mut x = Vector::<f32, N>::new(0.0f32);
        if start < end {
            x = Vector::cast_from(k[base + shortest * step + c * column]);
        }
        let place = line * comptime!(shape.dim) + c * width;
        #[unroll]
        for e in 0..width {
            keys[place + e] = x.extract(e);
        }
        c += lanes;
    }
}
