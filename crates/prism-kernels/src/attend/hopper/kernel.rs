//! The kernel: who does what, and what lies where in shared memory.

use cubecl::prelude::*;
use cubecl_cpp::cuda::ptx::tensor_map_address;
use half::f16;

use super::super::AttendNumbers;
use super::HopperShape;
use super::consumer::consume;
use super::producer::produce;
use crate::hopper::ptx;

/// Bytes behind the tiles: [`FLAGS`], [`SPOILT`] and 128 dims.
pub(super) const CONTROL_BYTES: usize = SPOILT + 128 * 4;
/// After at most 26 barriers of 8 bytes: the piece of work, and of each stage whether it is a row's
/// last.
const FLAGS: usize = 256;
const SPOILT: usize = FLAGS + 64;

/// Addresses in shared memory. A barrier `full_*` ends its phase when a copy has arrived, `empty_*` when
/// the consumers have read it.
#[derive(CubeType, Clone, Copy)]
pub(super) struct Room {
    /// Tiles `[halves, 128, 64]`, rows of 128 bytes in TMA's swizzle; K and V of each stage.
    pub q: u32,
    pub k: u32,
    pub v: u32,
    pub full_q: u32,
    pub empty_q: u32,
    pub full_k: u32,
    pub empty_k: u32,
    pub full_v: u32,
    pub empty_v: u32,
    /// The piece of work whose queries are in `q`: see [`Item`](super::producer::Item).
    pub item: u32,
    /// Of each stage, whether it is the last of its row.
    pub last: u32,
    /// Of each dim, the first bad value of the row's diagonal tile.
    pub spoilt: u32,
}

#[cube]
fn room(base: u32, #[comptime] shape: HopperShape) -> Room {
    let tile = comptime!(shape.tile_bytes() as u32);
    let ring = comptime!(shape.stages as u32 * 8);
    let control = base + comptime!(((1 + 2 * shape.stages) * shape.tile_bytes()) as u32);
    Room {
        q: base,
        k: base + tile,
        v: base + comptime!(tile * (1 + shape.stages as u32)),
        full_q: control,
        empty_q: control + 8u32,
        full_k: control + 16u32,
        empty_k: control + comptime!(16 + ring),
        full_v: control + comptime!(16 + 2 * ring),
        empty_v: control + comptime!(16 + 3 * ring),
        item: control + comptime!(FLAGS as u32),
        last: control + comptime!(FLAGS as u32 + 16),
        spoilt: control + comptime!(SPOILT as u32),
    }
}

/// `out` in eights of elements; `taken`: pieces of work that cubes have taken, 0 at launch.
///
/// The maps are of whatever type the shape says; TMA takes it from the map.
#[cube(launch_unchecked, create_dummy_kernel, address_type = "dynamic")]
pub(super) fn attend_hopper(
    q: &TensorMap<f16, Tiled>,
    k: &TensorMap<f16, Tiled>,
    v: &TensorMap<f16, Tiled>,
    out: &mut [Vector<u32, Const<4>>],
    lse: &mut [f32],
    words: &[u32],
    order: &[u32],
    lengths: &[u32],
    taken: &mut [Atomic<u32>],
    numbers: AttendNumbers,
    #[comptime] shape: HopperShape,
) {
    ptx::one_cube_a_multiprocessor();
    let registers = comptime!(shape.declare());
    gpu_asm!("{registers}", options(nomem));
    // The swizzle repeats every 1024 bytes.
    let shared =
        Shared::<[u32]>::new_aligned_slice(comptime!(shape.shared_memory() / 4), 1024usize);
    let room = room(ptx::shared_address(&shared), shape);
    let unit = UNIT_POS;

    if unit == 0 {
        ptx::barrier_init(room.full_q, 1u32);
        ptx::barrier_init(room.empty_q, 8u32);
        #[unroll]
        for stage in 0..comptime!(shape.stages as u32) {
            ptx::barrier_init(room.full_k + stage * 8, 1u32);
            ptx::barrier_init(room.full_v + stage * 8, 1u32);
            // A lane of each consumer warp.
            ptx::barrier_init(room.empty_k + stage * 8, 8u32);
            ptx::barrier_init(room.empty_v + stage * 8, 8u32);
        }
        ptx::barriers_ready();
    }
    sync_cube();

    // Of 168 registers a thread the warpgroup that copies needs few: 40 + 2 · 232 = 3 · 168.
    let warpgroup = unit / 128;
    if warpgroup == 0 {
        ptx::shrink_registers(40u32);
        if unit == 0 {
            produce(
                tensor_map_address::<f16, Tiled>(q),
                tensor_map_address::<f16, Tiled>(k),
                tensor_map_address::<f16, Tiled>(v),
                words,
                order,
                lengths,
                taken,
                &numbers,
                &room,
                shape,
            );
        }
    } else {
        ptx::grow_registers(232u32);
        consume(out, lse, &numbers, &room, warpgroup - 1, unit % 128, shape);
    }
}
