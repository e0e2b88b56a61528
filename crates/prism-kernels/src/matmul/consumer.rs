//! A consumer: 64 rows of each tile. Products, epilogue, store.

use cubecl::prelude::*;

use super::kernel::{Maps, Room};
use super::launch::{
    BOX, BOX_COLUMNS, CONSUMER_ROWS, End, MatmulShape, STAGED, STAGES, W_BYTES, X_BYTES,
};
use super::matrix::Layout;
use super::producer::first_row;
use super::raster::Raster;
use crate::hopper::wgmma::{k_major, mn_major, wait_products};
use crate::hopper::{bulk, cluster, ptx};

/// Begins acc += X · W of a step, or acc = X · W where `step` is 0.
#[cube]
fn multiply_step(x: u32, w: u32, step: u32, #[comptime] shape: MatmulShape) {
    let code = comptime!(shape.multiply());
    if comptime!(shape.w == Layout::ColumnMajor) {
        gpu_asm!(
            "{code}", "// {x} {w} {s}",
            x = in(_) k_major(x), w = in(_) k_major(w), s = in(_) step + 0u32,
            options(explicit_mem, reads_address_space shared, writes_address_space shared)
        );
    } else {
        gpu_asm!(
            "{code}", "// {x} {w} {s}",
            x = in(_) k_major(x), w = in(_) mn_major(w, comptime!(BOX as u32)),
            s = in(_) step + 0u32,
            options(explicit_mem, reads_address_space shared, writes_address_space shared)
        );
    }
}

/// Tells the producers of the cluster that this warp has read a stage.
#[cube]
fn release(empty: u32, lane: u32, #[comptime] shape: MatmulShape) {
    if lane < comptime!(shape.cluster) {
        if comptime!(shape.cluster == 1) {
            ptx::arrive(empty);
        } else {
            cluster::arrive_at(empty, lane);
        }
    }
}

/// Has this consumer's part of the residual copied to where its output will be staged.
#[cube]
fn copy_residual(staged: u32, map: u64, column: u32, row: u32, full: u32) {
    // The output of the tile before lies there.
    bulk::wait_stores_read(0u32);
    ptx::arrive_expecting(full, comptime!((STAGED * BOX) as u32));
    #[unroll]
    for i in 0..comptime!(STAGED as u32) {
        let across = column + i * comptime!(BOX_COLUMNS as u32);
        bulk::copy_tile(staged + i * comptime!(BOX as u32), map, across, row, full);
    }
}

#[cube]
pub(super) fn consume(
    maps: &Maps,
    raster: &Raster,
    steps: u32,
    room: &Room,
    consumer: u32,
    unit: u32,
    #[comptime] shape: MatmulShape,
) {
    let bounded = comptime!(shape.bounded);
    let lane = unit % 32;
    // One thread issues and awaits all of a consumer's bulk copies.
    let leads = unit == 0u32;
    let staged = room.staged + consumer * comptime!((STAGED * BOX) as u32);
    // What `stmatrix` takes from each lane: 8 columns of one row, in the swizzle of that row.
    let own_row =
        staged + (unit / 32 * 16 + lane % 16) * 128 + (((lane / 16) ^ (lane % 8)) << 4u32);
    let residual = room.residual + consumer * 8;
    // Steps after which the stores of the tile before have surely been read.
    let residual_step = (steps - 1).min(2u32);

    let mut stage = 0u32;
    let mut parity = 0u32;
    let mut residual_parity = 0u32;
    let mut place = CUBE_POS_X / comptime!(shape.cluster);
    while place < raster.tiles() {
        let tile = raster.tile(place);
        let row = first_row(tile.row, shape) + consumer * comptime!(CONSUMER_ROWS as u32);
        let columns = comptime!((shape.out_boxes() * BOX_COLUMNS) as u32);
        let column = tile.column * columns;

        let mut before = 0u32;
        for step in 0..steps {
            ptx::wait(room.full + stage * 8, parity, bounded);
            let x = room.x
                + stage * comptime!(X_BYTES as u32)
                + consumer * comptime!(X_BYTES as u32 / 2);
            let w = room.w + stage * comptime!(W_BYTES as u32);
            multiply_step(x, w, step, shape);
            if comptime!(shape.end == End::Residual) {
                if leads && step == residual_step {
                    copy_residual(staged, maps.residual, column, row, residual);
                }
            }
            // The products of a step run while those of the next are issued.
            wait_products(1u32);
            if step > 0 {
                release(room.empty + before * 8, lane, shape);
            }
            before = stage + 0u32;
            stage += 1u32;
            if stage == comptime!(STAGES as u32) {
                stage = 0u32;
                parity ^= 1u32;
            }
        }
        wait_products(0u32);
        release(room.empty + before * 8, lane, shape);

        if comptime!(shape.end == End::Residual) {
            ptx::wait(residual, residual_parity, bounded);
            residual_parity ^= 1u32;
        }
        #[unroll]
        for i in 0..comptime!(shape.out_boxes()) {
            let at = comptime!((i * BOX) as u32);
            if comptime!(shape.end != End::Residual) {
                if leads {
                    bulk::wait_stores_read(comptime!(shape.out_boxes() as u32 - 1));
                }
                ptx::meet(consumer + 1u32, 128u32);
            }
            let code = comptime!(shape.stage_box(i));
            gpu_asm!(
                "{code}", "// {a}", a = in(_) own_row + at,
                options(explicit_mem, reads_address_space shared, writes_address_space shared)
            );
            ptx::publish_to_async();
            ptx::meet(consumer + 1u32, 128u32);
            if leads {
                let across = column + comptime!((i * BOX_COLUMNS) as u32);
                bulk::store_tile(staged + at, maps.out, across, row);
            }
        }
        place += raster.clusters;
    }
    if leads {
        bulk::wait_stores();
    }
}
