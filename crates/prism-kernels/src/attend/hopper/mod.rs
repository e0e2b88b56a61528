//! Hopper's `wgmma` and tensor memory accelerator (TMA): f16 or bf16 operands, f32 accumulators.
//!
//! A cube stays on its multiprocessor and takes one piece of work after the other: 128 queries of one
//! head. One thread, the [`producer`], walks the selection and has tiles of 128 keys and values copied
//! into a ring in shared memory; two warpgroups, the [`consumer`]s, own 64 queries each. They keep
//! Q, S, P and O in registers; while the second product of one tile runs, the weights of the next are
//! computed.
//!
//! PTX is inline: only CubeCL's C++ compiler takes it (feature `cuda-cpp`). With the environment
//! variable `PRISM_BOUNDED_WAITS` set, waits for copies trap after seconds instead of hanging.

mod ahead;
mod consumer;
mod guard;
mod kernel;
mod producer;
mod registers;
mod softmax;

use cubecl::ir::AddressType;
use cubecl::prelude::*;
use cubecl::zspace::shape;

use self::kernel::attend_hopper;
use super::walk::WalkShape;
use super::{AttendProblem, Attended, RungError, buffers, numbers};
use crate::capabilities::Capabilities;
use crate::hopper::bounded_waits;
use crate::operand::{Element, Operand, buffer};
use crate::span::Spans;
use crate::work::launch;

/// Queries a piece of work, and keys a tile.
pub(super) const TILE: usize = 128;
/// Columns of a box in shared memory: 128 bytes, what the swizzle covers.
const HALF_COLUMNS: usize = 64;
/// Bytes of a box of [`TILE`] rows.
const HALF: usize = TILE * HALF_COLUMNS * 2;
/// One warpgroup that copies, two that compute.
const UNITS: usize = 3 * 128;

/// How the kernel is laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct HopperShape {
    walk: WalkShape,
    dim: usize,
    element: Element,
    /// Tiles of keys, and of values, in shared memory.
    stages: usize,
    /// Whether the consumers take turns: one's products run beside the other's softmax.
    ping_pong: bool,
    /// Whether the scores of a tile are computed beside the softmax of the one before it: see
    /// [`ahead`].
    ahead: bool,
    /// Whether products are scores in log2 units: [`AttendProblem::prescaled`].
    prescaled: bool,
    /// Whether a wait that never ends traps.
    bounded: bool,
}

impl HopperShape {
    /// Boxes a tile: narrower heads are padded with 0 in shared memory.
    fn halves(&self) -> usize {
        self.dim.div_ceil(HALF_COLUMNS)
    }

    /// Bytes of 128 queries, keys or values in shared memory.
    fn tile_bytes(&self) -> usize {
        self.halves() * HALF
    }

    /// Bytes of shared memory: Q, the rings, and what [`kernel::Room`] keeps behind them.
    fn shared_memory(&self) -> usize {
        (1 + 2 * self.stages) * self.tile_bytes() + kernel::CONTROL_BYTES
    }

    fn new(dim: usize, block: usize, element: Element) -> Self {
        let walk = WalkShape {
            block,
            dense: true,
            ordered: false,
            ragged: false,
            lse: false,
            tiles: block / TILE,
        };
        let stages = if dim <= HALF_COLUMNS { 6 } else { 3 };
        Self {
            walk,
            dim,
            element,
            stages,
            ping_pong: true,
            ahead: false,
            prescaled: false,
            bounded: false,
        }
    }
}

/// Whether the rung runs, on contiguous tensors.
pub(super) fn check(
    capabilities: &Capabilities,
    element: Element,
    dim: usize,
    block: usize,
) -> Result<(), RungError> {
    if !capabilities.hopper {
        return Err(RungError::NoHopper);
    }
    if element == Element::F32 {
        return Err(RungError::NoTensorCores(element));
    }
    if ![64, 80, 96, 128].contains(&dim) {
        return Err(RungError::TileDim(dim));
    }
    if block % TILE != 0 {
        return Err(RungError::Block(block));
    }
    let needs = HopperShape::new(dim, TILE, element).shared_memory();
    let has = capabilities.shared_memory;
    if needs > has { Err(RungError::SharedMemory { needs, has }) } else { Ok(()) }
}

/// What a problem needs beyond [`check`].
pub(super) fn check_problem(problem: &AttendProblem) -> Result<(), RungError> {
    let operands = [("q", problem.q), ("k", problem.k), ("v", problem.v)];
    let unmappable = operands.into_iter().find(|(_, x)| !mappable(x));
    unmappable.map_or(Ok(()), |(name, _)| Err(RungError::Layout(name)))
}

/// Whether TMA can read a tensor: rows without gaps, steps and start in multiples of 16 bytes.
fn mappable(x: &Operand) -> bool {
    let size = x.element.size();
    let steps = |stride: usize| stride > 0 && stride * size % 16 == 0 && stride * size < 1 << 40;
    x.strides[3] == 1
        && x.handle.offset_start.unwrap_or(0) % 16 == 0
        && x.shape.iter().zip(x.strides).take(3).all(|(&n, stride)| n == 1 || steps(stride))
}

/// A tensor as TMA sees it, in boxes of 128 positions by 64 dims.
fn map(x: &Operand) -> TensorMapArg<Tiled> {
    let mut strides = x.strides;
    for i in 0..3 {
        if x.shape[i] == 1 {
            // Never stepped over, and yet TMA wants a multiple of 16 bytes.
            strides[i] = x.shape[3];
        }
    }
    let view = Operand { strides, ..x.clone() };
    let tile_size = shape![1, 1, TILE, HALF_COLUMNS];
    TensorMapArg::new(TiledArgs { tile_size }, view.arg(), x.element.elem_type())
        .with_swizzle(TensorMapSwizzle::B128)
        .with_prefetch(TensorMapPrefetch::B256)
}

/// Launches on a device and a problem that passed [`check`] and [`check_problem`].
pub(super) fn launch(
    client: &Client,
    capabilities: &Capabilities,
    problem: &AttendProblem,
    attended: &Attended,
) {
    let [batch, heads, q_len, dim] = problem.q.shape;
    let Some(block) = problem.grids.first().map(|grid| grid.block()) else { return };
    let spans = Spans::new(client, problem.grids);
    let mut shape = HopperShape::new(dim, block, problem.q.element);
    shape.walk.dense = problem.selection.is_none();
    shape.walk.ordered = problem.order.is_some();
    shape.walk.ragged = spans.ragged();
    shape.walk.lse = problem.lse;
    // Taking turns pays where rows are short, unless heads are narrow.
    shape.ping_pong = dim > HALF_COLUMNS && problem.selection.is_some();
    shape.prescaled = problem.prescaled;
    // Pre-scaled queries spare more work than this hides.
    shape.ahead = dim <= HALF_COLUMNS && !problem.prescaled;
    shape.bounded = bounded_waits();

    let lines = batch * heads * prism_core::selection::extent(problem.grids).0;
    let items = lines * shape.walk.tiles;
    let cubes = capabilities.multiprocessors.unwrap_or(1).min(items.min(u32::MAX as usize) as u32);
    let eights = batch * heads * q_len * dim / 8;
    let words_per_row = problem.selection.map_or(0, |selection| selection.words_per_row);
    let address = AddressType::from_len(eights.max(lines * words_per_row));
    // What has been taken of the work.
    let taken = client.create_from_slice(u32::as_bytes(&[0]));
    let [words, order, lengths, lse] = buffers(problem, &spans, attended);
    // SAFETY: every query of an item lies in its sequence, boxes are cut at the ends of the tensors,
    // and items past the end are not taken.
    unsafe {
        launch!(
            attend_hopper,
            client,
            CubeCount::Static(cubes, 1, 1),
            CubeDim::new_1d(UNITS as u32),
            address,
            map(problem.q),
            map(problem.k),
            map(problem.v),
            buffer(&attended.out, eights),
            lse,
            words,
            order,
            lengths,
            buffer(&taken, 1),
            numbers(problem, &spans, items),
            shape,
        );
    }
}
