//! From global memory to tiles in shared memory, 16 bytes at a time, asynchronously where the device
//! does that.

use cubecl::frontend::barrier::copy_async;
use cubecl::prelude::*;

/// Elements of 16 bytes.
pub(super) const WIDE: usize = 8;

/// `count` rows of `chunks` 16-byte vectors into a tile of `rows`, the rest of which becomes 0.
#[cube]
pub(super) fn fill<E: Float, N: Size>(
    x: &Tensor<Vector<E, N>>,
    tile: &mut Shared<[Vector<E, N>]>,
    offset: usize,
    base: usize,
    stride: usize,
    count: usize,
    unit: usize,
    #[comptime] units: usize,
    #[comptime] rows: usize,
    #[comptime] chunks: usize,
    #[comptime] asynchronous: bool,
) {
    let pitch = comptime!(chunks + 1);
    // A unit keeps its column: what differs from step to step is then a constant.
    let across = comptime!(chunks.next_power_of_two());
    let apart = comptime!(units / across);
    let column = unit % across;
    let first = unit / across;
    if comptime!(across == chunks) || column < chunks {
        #[unroll]
        for step in 0..comptime!(rows.div_ceil(apart)) {
            let row = first + step * apart;
            if comptime!((step + 1) * apart <= rows) || row < rows {
                let to = offset + row * pitch + column;
                if row < count {
                    let from = base + row * stride + column;
                    if comptime!(asynchronous) {
                        let size = comptime!(WIDE as u32);
                        copy_async(&x[from..from + 1], &mut tile[to..to + 1], size);
                    } else {
                        tile[to] = x[from];
                    }
                } else {
                    tile[to] = Vector::new(E::from_int(0));
                }
            }
        }
    }
}

#[cube]
pub(super) fn commit_copies() {
    gpu_asm!(
        "cp.async.commit_group;",
        options(explicit_mem, reads_address_space shared, writes_address_space shared)
    );
}

#[cube]
pub(super) fn wait_copies() {
    gpu_asm!(
        "cp.async.wait_all;",
        options(explicit_mem, reads_address_space shared, writes_address_space shared)
    );
}
