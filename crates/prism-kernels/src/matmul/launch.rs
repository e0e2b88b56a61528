//! How the kernel is laid out, what TMA is told of the matrices, and the launch.

use cubecl::prelude::*;
use cubecl::zspace::shape;

use super::kernel::{CONTROL_BYTES, matmul_alone, matmul_paired};
use super::matrix::{Layout, Matrix};
use super::raster::Raster;
use super::{Epilogue, MatmulError, MatmulProblem};
use crate::capabilities::Capabilities;
use crate::hopper::bounded_waits;
use crate::operand::Element;
use crate::work::launch;

/// Rows and columns of a tile of the output, and how far a step goes along K.
pub(super) const ROWS: usize = 128;
pub(super) const COLUMNS: usize = 256;
pub(super) const STEP: usize = 64;
/// Rows of a warpgroup, and of the boxes in which the output is stored.
pub(super) const CONSUMER_ROWS: usize = ROWS / 2;
/// Columns of a box in shared memory: 128 bytes, what the swizzle covers.
pub(super) const BOX_COLUMNS: usize = 64;
/// Bytes of a box of 64 rows.
pub(super) const BOX: usize = 64 * BOX_COLUMNS * 2;
/// Bytes of a step's X and W in shared memory.
pub(super) const X_BYTES: usize = ROWS * STEP * 2;
pub(super) const W_BYTES: usize = COLUMNS * STEP * 2;
/// Boxes in which a consumer leaves its part of the output for TMA.
pub(super) const STAGED: usize = COLUMNS / BOX_COLUMNS;
/// Steps of X and W in shared memory. A fourth would take half of what is staged, and gains nothing.
pub(super) const STAGES: usize = 3;
/// One warpgroup that copies, two that multiply.
const UNITS: usize = 3 * 128;

/// What the kernel is compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct MatmulShape {
    pub element: Element,
    /// Memory order of W.
    pub w: Layout,
    pub end: End,
    /// Cubes, one below the other, that share W.
    pub cluster: u32,
    /// Whether a wait that never ends traps.
    pub bounded: bool,
}

/// [`Epilogue`] without its operands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum End {
    Plain,
    Residual,
    SwiGlu,
}

impl MatmulShape {
    fn new(problem: &MatmulProblem) -> Self {
        Self {
            element: problem.x.element,
            w: problem.w.layout().unwrap_or(Layout::RowMajor),
            end: match problem.epilogue {
                Epilogue::Plain => End::Plain,
                Epilogue::Residual(_) => End::Residual,
                Epilogue::SwiGlu => End::SwiGlu,
            },
            // The second cube would have no rows.
            cluster: if problem.x.shape[0] <= ROWS { 1 } else { 2 },
            bounded: bounded_waits(),
        }
    }

    /// Boxes in which a consumer stores its part of the output.
    pub(super) fn out_boxes(&self) -> usize {
        if self.end == End::SwiGlu { STAGED / 2 } else { STAGED }
    }
}

/// Bytes of shared memory: the ring, what is staged, and the barriers.
pub(super) fn shared_memory() -> usize {
    STAGES * (X_BYTES + W_BYTES) + 2 * STAGED * BOX + CONTROL_BYTES
}

/// What a device must have.
pub(super) fn check(capabilities: &Capabilities) -> Result<(), MatmulError> {
    if !capabilities.hopper {
        return Err(MatmulError::NoHopper);
    }
    let (needs, has) = (shared_memory(), capabilities.shared_memory);
    if needs > has { Err(MatmulError::SharedMemory { needs, has }) } else { Ok(()) }
}

/// A matrix as TMA sees it, line by line, in boxes of `lines` by 64 elements.
fn map(matrix: &Matrix, lines: usize) -> TensorMapArg<Tiled> {
    let (count, length, stride) = matrix.lines();
    // Never stepped over where there is one line, and yet TMA wants a multiple of 16 bytes.
    let stride = if count == 1 { length } else { stride };
    // SAFETY: TMA stays within the shape, whose elements the owner of the handle vouches to be in the
    // buffer.
    let lines_of_memory = unsafe {
        TensorArg::from_raw_parts(matrix.handle.clone(), [stride, 1].into(), [count, length].into())
    };
    let tile_size = shape![lines, BOX_COLUMNS];
    TensorMapArg::new(TiledArgs { tile_size }, lines_of_memory, matrix.element.elem_type())
        .with_swizzle(TensorMapSwizzle::B128)
        .with_prefetch(TensorMapPrefetch::B256)
}

/// Launches on a device and a problem that passed [`check`](super::check()), into an output that did.
pub(super) fn launch(
    client: &Client,
    capabilities: &Capabilities,
    problem: &MatmulProblem,
    out: &Matrix,
) {
    let shape = MatmulShape::new(problem);
    let ([m, k], [_, n]) = (problem.x.shape, problem.w.shape);
    let multiprocessors = capabilities.multiprocessors.unwrap_or(1);
    let raster = Raster::new([m, n], [ROWS, COLUMNS], shape.cluster, multiprocessors);
    let cubes = CubeCount::Static(raster.clusters * shape.cluster, 1, 1);
    let units = CubeDim::new_1d(UNITS as u32);
    let x = map(problem.x, ROWS);
    let w = match shape.w {
        Layout::RowMajor => map(problem.w, STEP),
        Layout::ColumnMajor => map(problem.w, COLUMNS / shape.cluster as usize),
    };
    let residual = match problem.epilogue {
        Epilogue::Residual(residual) => map(residual, CONSUMER_ROWS),
        _ => map(out, CONSUMER_ROWS),
    };
    let (to, steps) = (map(out, CONSUMER_ROWS), k.div_ceil(STEP) as u32);
    // SAFETY: TMA cuts boxes at the ends of the matrices, and nothing else touches global memory. Two
    // cubes of a cluster are as many as the launch asks for.
    unsafe {
        if shape.cluster == 1 {
            launch!(
                matmul_alone,
                client,
                cubes,
                units,
                x,
                w,
                residual,
                to,
                raster.arg(),
                steps,
                shape
            );
        } else {
            launch!(
                matmul_paired,
                client,
                cubes,
                units,
                x,
                w,
                residual,
                to,
                raster.arg(),
                steps,
                shape
            );
        }
    }
}
