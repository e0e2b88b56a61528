//! Copies by the tensor memory accelerator (TMA), between tensors and swizzled tiles in shared memory.
//!
//! Operands are expressions, never `let mut` variables, which CubeCL would hand over by address.

use cubecl::prelude::*;

/// Fetches a tensor map ahead of its first copy.
#[cube]
pub(crate) fn prefetch_map(map: u64) {
    gpu_asm!("prefetch.tensormap [{m}];", m = in(_) map, options(nomem));
}

/// Copies a box of 128 rows by 64 columns from (`column`, `row`, `head`, `batch`) of a tensor map,
/// 0 where that is out of bounds.
#[cube]
pub(crate) fn copy_box(
    to: u32,
    map: u64,
    #[comptime] column: u32,
    row: u32,
    head: u32,
    batch: u32,
    barrier: u32,
) {
    gpu_asm!(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [{to}], [{map}, {{{x}, {row}, {head}, {batch}}}], [{b}];",
        to = in(_) to, map = in(_) map, x = const column, row = in(_) row, head = in(_) head,
        batch = in(_) batch, b = in(_) barrier,
        options(explicit_mem, reads_address_space shared, writes_address_space shared)
    );
}

/// Copies a box from (`column`, `row`) of the map of a matrix, 0 where that is out of bounds.
#[cube]
pub(crate) fn copy_tile(to: u32, map: u64, column: u32, row: u32, barrier: u32) {
    gpu_asm!(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [{to}], [{map}, {{{x}, {y}}}], [{b}];",
        to = in(_) to, map = in(_) map, x = in(_) column, y = in(_) row, b = in(_) barrier,
        options(explicit_mem, reads_address_space shared, writes_address_space shared)
    );
}

/// [`copy_tile`] into both cubes of a cluster of two, to the same address, and the bytes counted by the
/// barrier of each.
#[cube]
pub(crate) fn copy_tile_to_both(to: u32, map: u64, column: u32, row: u32, barrier: u32) {
    gpu_asm!(
        "{{ .reg .b16 both; mov.b16 both, 3; cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [{to}], [{map}, {{{x}, {y}}}], [{b}], both; }}",
        to = in(_) to, map = in(_) map, x = in(_) column, y = in(_) row, b = in(_) barrier,
        options(explicit_mem, reads_address_space shared, writes_address_space shared)
    );
}

/// Copies a box to (`column`, `row`) of the map of a matrix; what is out of bounds is left out.
#[cube]
pub(crate) fn store_tile(from: u32, map: u64, column: u32, row: u32) {
    gpu_asm!(
        "cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [{map}, {{{x}, {y}}}], [{from}];",
        "cp.async.bulk.commit_group;",
        from = in(_) from, map = in(_) map, x = in(_) column, y = in(_) row,
        options(explicit_mem, reads_address_space shared, writes_address_space shared)
    );
}

/// Waits until at most `pending` of this thread's stores are still to be read from shared memory.
#[cube]
pub(crate) fn wait_stores_read(#[comptime] pending: u32) {
    gpu_asm!(
        "cp.async.bulk.wait_group.read {n};", n = const pending,
        options(explicit_mem, reads_address_space shared, writes_address_space shared)
    );
}

/// Waits until all of this thread's stores are made.
#[cube]
pub(crate) fn wait_stores() {
    gpu_asm!(
        "cp.async.bulk.wait_group 0;",
        options(explicit_mem, reads_address_space shared, writes_address_space shared)
    );
}
