//! The kernel: who does what, and what lies where in shared memory.

use cubecl::prelude::*;
use cubecl_cpp::cuda::ptx::tensor_map_address;
use half::f16;

use super::consumer::consume;
use super::launch::{BOX, MatmulShape, STAGED, STAGES, X_BYTES, shared_memory};
use super::producer::produce;
use super::raster::Raster;
use crate::hopper::{cluster, ptx};

/// Two barriers of 8 bytes a stage, and one for each consumer's residual.
pub(super) const CONTROL_BYTES: usize = 128;

/// Maps of the matrices.
#[derive(CubeType, Clone, Copy)]
pub(super) struct Maps {
    pub x: u64,
    pub w: u64,
    pub residual: u64,
    pub out: u64,
}

/// Addresses in shared memory. A barrier `full` ends its phase when a step has been copied, `empty` when
/// the consumers of the whole cluster have read it.
#[derive(CubeType, Clone, Copy)]
pub(super) struct Room {
    /// Of each stage `[128, 64]`, rows of 128 bytes in TMA's swizzle.
    pub x: u32,
    /// Of each stage `[256, 64]`, columns of W in such rows; of a row-major W `[4, 64, 64]`, rows of W in
    /// four boxes of 64 columns.
    pub w: u32,
    /// Of each consumer, boxes `[4, 64, 64]` of the output, and before that of the residual.
    pub staged: u32,
    pub full: u32,
    pub empty: u32,
    /// Of each consumer; its phase ends when a residual has been copied.
    pub residual: u32,
}

#[cube]
fn room(base: u32) -> Room {
    let control = base + comptime!((shared_memory() - CONTROL_BYTES) as u32);
    Room {
        x: base,
        w: base + comptime!((STAGES * X_BYTES) as u32),
        staged: control - comptime!((2 * STAGED * BOX) as u32),
        full: control,
        empty: control + comptime!(STAGES as u32 * 8),
        residual: control + comptime!(STAGES as u32 * 16),
    }
}

/// A product by single cubes: for X of no more rows than a tile. The maps are of whatever type the shape
/// says; TMA takes it from the map.
#[cube(launch_unchecked, create_dummy_kernel)]
pub(super) fn matmul_alone(
    x: &TensorMap<f16, Tiled>,
    w: &TensorMap<f16, Tiled>,
    residual: &TensorMap<f16, Tiled>,
    out: &TensorMap<f16, Tiled>,
    raster: Raster,
    steps: u32,
    #[comptime] shape: MatmulShape,
) {
    multiply(x, w, residual, out, &raster, steps, shape);
}

/// A product by clusters of two cubes, one below the other.
#[cube(launch_unchecked, create_dummy_kernel, cluster_dim = CubeDim::new_1d(2))]
pub(super) fn matmul_paired(
    x: &TensorMap<f16, Tiled>,
    w: &TensorMap<f16, Tiled>,
    residual: &TensorMap<f16, Tiled>,
    out: &TensorMap<f16, Tiled>,
    raster: Raster,
    steps: u32,
    #[comptime] shape: MatmulShape,
) {
    multiply(x, w, residual, out, &raster, steps, shape);
}

#[cube]
fn multiply(
    x: &TensorMap<f16, Tiled>,
    w: &TensorMap<f16, Tiled>,
    residual: &TensorMap<f16, Tiled>,
    out: &TensorMap<f16, Tiled>,
    raster: &Raster,
    steps: u32,
    #[comptime] shape: MatmulShape,
) {
    let maps = Maps {
        x: tensor_map_address::<f16, Tiled>(x),
        w: tensor_map_address::<f16, Tiled>(w),
        residual: tensor_map_address::<f16, Tiled>(residual),
        out: tensor_map_address::<f16, Tiled>(out),
    };
    ptx::one_cube_a_multiprocessor();
    let registers = comptime!(shape.declare());
    gpu_asm!("{registers}", options(nomem));
    // The swizzle repeats every 1024 bytes.
    let shared = Shared::<[u32]>::new_aligned_slice(comptime!(shared_memory() / 4), 1024usize);
    let room = room(ptx::shared_address(&shared));
    let unit = UNIT_POS;

    if unit == 0 {
        #[unroll]
        for stage in 0..comptime!(STAGES as u32) {
            ptx::barrier_init(room.full + stage * 8, 1u32);
            // A lane of each consumer warp of the cluster.
            ptx::barrier_init(room.empty + stage * 8, comptime!(8 * shape.cluster).runtime());
        }
        ptx::barrier_init(room.residual, 1u32);
        ptx::barrier_init(room.residual + 8u32, 1u32);
        ptx::barriers_ready();
    }
    if comptime!(shape.cluster == 1) {
        sync_cube();
    } else {
        cluster::meet();
    }

    // Of 168 registers a thread the warpgroup that copies needs few: 40 + 2 · 232 = 3 · 168.
    let warpgroup = unit / 128;
    if warpgroup == 0 {
        ptx::shrink_registers(40u32);
        if unit == 0 {
            produce(&maps, raster, steps, &room, shape);
        }
    } else {
        ptx::grow_registers(232u32);
        consume(&maps, raster, steps, &room, warpgroup - 1, unit % 128, shape);
    }
    // While a cube runs, the other may copy to it and arrive at its barriers.
    if comptime!(shape.cluster != 1) {
        cluster::meet();
    }
}
