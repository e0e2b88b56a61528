//! The producer: has tile after tile of X and W copied, step by step along K.

use cubecl::prelude::*;

use super::kernel::{Maps, Room};
use super::launch::{BOX, BOX_COLUMNS, COLUMNS, MatmulShape, ROWS, STAGES, STEP, W_BYTES, X_BYTES};
use super::matrix::Layout;
use super::raster::Raster;
use crate::hopper::{bulk, ptx};

/// First row of a cube's tile: those of a cluster lie one below the other.
#[cube]
pub(super) fn first_row(tile_row: u32, #[comptime] shape: MatmulShape) -> u32 {
    let cluster = comptime!(shape.cluster);
    (tile_row * cluster + CUBE_POS_X % cluster) * comptime!(ROWS as u32)
}

#[cube]
pub(super) fn produce(
    maps: &Maps,
    raster: &Raster,
    steps: u32,
    room: &Room,
    #[comptime] shape: MatmulShape,
) {
    let cluster = comptime!(shape.cluster);
    // The stage to be filled, and the parity of the phase that must have ended before.
    let mut stage = 0u32;
    let mut parity = 1u32;
    let mut place = CUBE_POS_X / cluster;
    bulk::prefetch_map(maps.x);
    bulk::prefetch_map(maps.w);
    while place < raster.tiles() {
        let tile = raster.tile(place);
        let row = first_row(tile.row, shape);
        let column = tile.column * comptime!(COLUMNS as u32);
        for step in 0..steps {
            let k = step * comptime!(STEP as u32);
            let full = room.full + stage * 8;
            ptx::wait(room.empty + stage * 8, parity, comptime!(shape.bounded));
            // W's too: what the other cube fetches of it is counted here.
            ptx::arrive_expecting(full, comptime!((X_BYTES + W_BYTES) as u32));
            let to = room.x + stage * comptime!(X_BYTES as u32);
            bulk::copy_tile(to, maps.x, k, row, full);
            let to = room.w + stage * comptime!(W_BYTES as u32);
            copy_columns(to, maps.w, column, k, full, shape);
            stage += 1u32;
            if stage == comptime!(STAGES as u32) {
                stage = 0u32;
                parity ^= 1u32;
            }
        }
        place += raster.clusters;
    }
}

/// This cube's share of a step's 256 columns of W, for all of the cluster.
#[cube]
fn copy_columns(to: u32, map: u64, column: u32, k: u32, full: u32, #[comptime] shape: MatmulShape) {
    let share = comptime!(COLUMNS as u32 / shape.cluster);
    let rank = CUBE_POS_X % comptime!(shape.cluster);
    let own = column + rank * share;
    let to = to + rank * comptime!(W_BYTES as u32 / shape.cluster);
    if comptime!(shape.w == Layout::ColumnMajor) {
        copy_shared(to, map, k, own, full, shape);
    } else {
        #[unroll]
        for i in 0..comptime!(share / BOX_COLUMNS as u32) {
            let across = own + i * comptime!(BOX_COLUMNS as u32);
            copy_shared(to + i * comptime!(BOX as u32), map, across, k, full, shape);
        }
    }
}

#[cube]
fn copy_shared(to: u32, map: u64, x: u32, y: u32, full: u32, #[comptime] shape: MatmulShape) {
    if comptime!(shape.cluster == 1) {
        bulk::copy_tile(to, map, x, y, full);
    } else {
        bulk::copy_tile_to_both(to, map, x, y, full);
    }
}
