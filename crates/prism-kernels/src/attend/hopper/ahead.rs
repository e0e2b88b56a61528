//! A row's tiles where registers hold the scores of two: the products of the next tile's scores run
//! beside the softmax of the current one, and so does the product with the values before it.
//!
//! With narrow heads products are short: a consumer that waits for its scores leaves the tensor cores,
//! and then the unit of the exponentials, idle.

use cubecl::prelude::*;

use super::HopperShape;
use super::consumer::{ACROSS, accumulate, alone, release, release_if};
use super::guard::clean_values;
use super::kernel::Room;
use super::producer::{Item, told};
use super::registers::of;
use crate::hopper::ptx;
use crate::hopper::wgmma::{k_major, mn_major, wait_products};

/// A place in the rings: its stage, and in the lowest bit the parity of the phase that fills it.
#[cube]
pub(super) fn at(stage: u32, parity: u32) -> u32 {
    (stage << 1u32) | parity
}

#[cube]
pub(super) fn stage(place: u32) -> u32 {
    place >> 1u32
}

#[cube]
pub(super) fn parity(place: u32) -> u32 {
    place & 1u32
}

/// The place after this one.
#[cube]
fn after(place: u32, #[comptime] shape: HopperShape) -> u32 {
    let end = comptime!(2 * (shape.stages as u32 - 1));
    select(place >= end, (place & 1u32) ^ 1u32, place + 2u32)
}

/// The place after this one, or, where there is no tile, this one.
#[cube]
fn following(place: u32, ended: u32, #[comptime] shape: HopperShape) -> u32 {
    select(ended == 1u32, place, after(place, shape))
}

/// What a thread knows while it walks a row.
#[derive(CubeType, Clone, Copy)]
pub(super) struct Thread {
    pub consumer: u32,
    pub unit: u32,
    pub lane: u32,
    pub scale: f32,
}

/// Descriptor of this consumer's 64 queries.
#[cube]
fn queries(room: &Room, thread: &Thread) -> u64 {
    k_major(room.q + thread.consumer * comptime!(64 * 128u32))
}

/// Begins the scores of the tile at `place`, with Q from shared memory, since registers are short;
/// whether it is the row's last.
#[cube]
fn begin(
    room: &Room,
    place: u32,
    thread: &Thread,
    #[comptime] set: u32,
    #[comptime] shape: HopperShape,
) -> u32 {
    let tile_bytes = comptime!(shape.tile_bytes() as u32);
    ptx::wait(room.full_k + stage(place) * 8, parity(place), comptime!(shape.bounded));
    let last = told(room.last + stage(place) * 4, thread.lane);
    let (keys, queries) = (k_major(room.k + stage(place) * tile_bytes), queries(room, thread));
    let code = comptime!(of(shape.score("%0", "%1"), set));
    gpu_asm!(
        "{code}", "// {k} {q}", k = in(_) keys, q = in(_) queries,
        options(explicit_mem, reads_address_space shared, writes_address_space shared)
    );
    last
}

/// Begins the product of rounded weights with the values at `place`.
#[cube]
fn add(room: &Room, place: u32, #[comptime] shape: HopperShape) {
    let tile_bytes = comptime!(shape.tile_bytes() as u32);
    ptx::wait(room.full_v + stage(place) * 8, parity(place), comptime!(shape.bounded));
    accumulate(mn_major(room.v + stage(place) * tile_bytes, ACROSS), shape);
}

/// From scores to weights for the tile at `place`, whose keys may be read again; the scores of
/// another have been begun since the product with the values at `before`.
#[cube]
fn weigh(
    room: &Room,
    place: u32,
    before: u32,
    counts: bool,
    thread: &Thread,
    #[comptime] set: u32,
    #[comptime] shape: HopperShape,
) {
    let tile_bytes = comptime!(shape.tile_bytes() as u32);
    let keys = k_major(room.k + stage(place) * tile_bytes);
    let code = comptime!(of(shape.softmax(), set));
    gpu_asm!(
        "{code}", "// {s} {b} {k} {q} {c}",
        s = in(_) thread.scale, b = in(_) alone(thread.consumer), k = in(_) keys,
        q = in(_) queries(room, thread), c = in(_) select(counts, 1.0f32, 0.0f32),
        options(explicit_mem, reads_address_space shared, writes_address_space shared)
    );
    release_if(counts, room.empty_k + stage(place) * 8, thread.lane);
    wait_products(1u32);
    release_if(counts, room.empty_v + stage(before) * 8, thread.lane);
    let code = comptime!(of(shape.round_if(), set));
    gpu_asm!("{code}", "// {c}", c = in(_) select(counts, u32::MAX, 0u32), options(nomem));
}

/// Walks the tiles of a row from `first` on; the place after them, and whether values were cleaned.
///
/// Tiles are taken in pairs, so that each set of registers keeps its name, and the pair has no branch, at
/// which the assembler would end its pipeline. Of an odd number the last is taken twice, and doesn't
/// count the second time.
#[cube]
pub(super) fn walk(
    room: &Room,
    item: &Item,
    first: u32,
    sees: i32,
    thread: &Thread,
    #[comptime] shape: HopperShape,
) -> (u32, u32) {
    let lane = thread.lane;
    let tile_bytes = comptime!(shape.tile_bytes() as u32);
    let mut spoilt = 0u32;
    let mut ended = begin(room, first, thread, 0u32, shape);
    if item.diagonal {
        ptx::wait(room.full_v + stage(first) * 8, parity(first), comptime!(shape.bounded));
        spoilt = clean_values(
            room.v + stage(first) * tile_bytes,
            room.spoilt,
            thread.consumer,
            thread.unit,
            shape,
        );
    }
    wait_products(0u32);
    if item.diagonal {
        let code = comptime!(shape.mask());
        gpu_asm!("{code}", "// {s}", s = in(_) sees, options(nomem));
    }
    let mut place = first + 0u32;
    let mut next = following(first, ended, shape);
    let mut last = begin(room, next, thread, 1u32, shape);
    release(room.empty_k + stage(first) * 8, lane);
    let code = comptime!(shape.first_softmax());
    gpu_asm!("{code}", "// {s}", s = in(_) thread.scale, options(nomem));
    let code = comptime!(shape.round_weights());
    gpu_asm!("{code}", options(nomem));
    add(room, first, shape);
    wait_products(1u32);
    while ended == 0u32 {
        let before = place + 0u32;
        place = next + 0u32;
        next = following(place, last, shape);
        let second_ends = begin(room, next, thread, 0u32, shape);
        weigh(room, place, before, true, thread, 1u32, shape);
        add(room, place, shape);
        wait_products(1u32);

        let before = place + 0u32;
        let counts = last == 0u32;
        ended = last | second_ends;
        place = next + 0u32;
        next = following(place, ended, shape);
        last = begin(room, next, thread, 1u32, shape);
        weigh(room, place, before, counts, thread, 0u32, shape);
        add(room, place, shape);
        wait_products(1u32);
    }
    wait_products(0u32);
    release(room.empty_v + stage(place) * 8, lane);
    release(room.empty_q, lane);
    (after(place, shape), spoilt)
}
