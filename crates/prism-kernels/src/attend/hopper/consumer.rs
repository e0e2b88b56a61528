//! A consumer: 64 queries of each piece of work. Scores, softmax, accumulation, store.

use cubecl::prelude::*;

use super::super::AttendNumbers;
use super::super::softmax::nothing;
use super::ahead::{self, Thread};
use super::guard::clean_values;
use super::kernel::Room;
use super::producer::{received, told};
use super::{HALF, HopperShape};
use crate::hopper::ptx;
use crate::hopper::wgmma::{k_major, mn_major, wait_products};

/// Both consumers.
const CONSUMERS: u32 = 256;

/// Named barriers, beside 0 of the cube: 1 and 2 tell a consumer that it is its turn, 3 and 4 are of
/// one consumer alone; [`guard`](super::guard) has 5.
#[cube]
fn turn(consumer: u32) -> u32 {
    consumer + 1u32
}

#[cube]
pub(super) fn alone(consumer: u32) -> u32 {
    consumer + 3u32
}

/// Bytes from 64 dims of the values to the next.
pub(super) const ACROSS: u32 = HALF as u32;

/// Begins S = Q Kᵀ.
#[cube]
fn score(keys: u64, #[comptime] shape: HopperShape) {
    let code = comptime!(shape.score("%0", ""));
    gpu_asm!(
        "{code}", "// {k}", k = in(_) keys,
        options(explicit_mem, reads_address_space shared, writes_address_space shared)
    );
}

/// Begins O += P V.
#[cube]
pub(super) fn accumulate(values: u64, #[comptime] shape: HopperShape) {
    let code = comptime!(shape.accumulate());
    gpu_asm!(
        "{code}", "// {v}", v = in(_) values,
        options(explicit_mem, reads_address_space shared, writes_address_space shared)
    );
}

/// Tells the producer that this warp, all lanes of it, has read what `empty` stands for.
#[cube]
pub(super) fn release(empty: u32, lane: u32) {
    ptx::meet_warp();
    if lane == 0u32 {
        ptx::arrive(empty + 0u32);
    }
}

/// [`release`] on a condition that holds for the warp.
#[cube]
pub(super) fn release_if(holds: bool, empty: u32, lane: u32) {
    ptx::meet_warp();
    if holds && lane == 0u32 {
        ptx::arrive(empty + 0u32);
    }
}

#[cube]
pub(super) fn consume(
    out: &mut [Vector<u32, Const<4>>],
    lse: &mut [f32],
    numbers: &AttendNumbers,
    room: &Room,
    consumer: u32,
    unit: u32,
    #[comptime] shape: HopperShape,
) {
    let bounded = comptime!(shape.bounded);
    let tile_bytes = comptime!(shape.tile_bytes() as u32);
    let stages = comptime!(shape.stages as u32);
    let warp = unit / 32;
    let lane = unit % 32;
    // This thread's rows are `row` and `row + 8`, its first columns `column` and `column + 1`.
    let row = consumer * 64 + warp * 16 + lane / 4;
    let column = 2 * (lane % 4);
    // What `ldmatrix` takes from each lane: 8 dims of one query, in the swizzle of its row.
    let own_query = room.q
        + (consumer * 64 + warp * 16 + lane % 16) * 128
        + (((lane / 16) ^ (lane % 8)) << 4u32);
    // A constant 1 costs nothing: the assembler leaves out the multiplications.
    let scale = if comptime!(shape.prescaled) {
        1.0f32.runtime()
    } else {
        numbers.scale * comptime!(std::f32::consts::LOG2_E)
    };

    if comptime!(shape.ping_pong) {
        if consumer == 1u32 {
            ptx::let_go(turn(0u32), CONSUMERS);
        }
    }
    let mut stage = 0u32;
    let mut parity = 0u32;
    let mut parity_q = 0u32;
    let mut more = true;
    while more {
        ptx::wait(room.full_q, parity_q, bounded);
        parity_q ^= 1u32;
        let item = received(room, lane);
        more = item.queries > 0u32;
        if more {
            let code = comptime!(shape.clear());
            gpu_asm!("{code}", options(nomem));
            let mut spoilt = 0u32;
            if item.any {
                if comptime!(shape.ahead) {
                    let thread = Thread { consumer, unit, lane, scale };
                    let sees = i32::cast_from(item.offset + row) - i32::cast_from(column);
                    let first = ahead::at(stage, parity);
                    let (after, cleaned) = ahead::walk(room, &item, first, sees, &thread, shape);
                    stage = ahead::stage(after);
                    parity = ahead::parity(after);
                    spoilt = cleaned;
                } else {
                    let code = comptime!(shape.load_queries());
                    gpu_asm!(
                        "{code}", "// {a}", a = in(_) own_query,
                        options(explicit_mem, reads_address_space shared)
                    );
                    // The first tile.
                    ptx::wait(room.full_k + stage * 8, parity, bounded);
                    let mut last = told(room.last + stage * 4, lane);
                    score(k_major(room.k + stage * tile_bytes), shape);
                    if item.diagonal {
                        ptx::wait(room.full_v + stage * 8, parity, bounded);
                        spoilt = clean_values(
                            room.v + stage * tile_bytes,
                            room.spoilt,
                            consumer,
                            unit,
                            shape,
                        );
                    }
                    wait_products(0u32);
                    release(room.empty_k + stage * 8, lane);
                    // Q is in registers: the next item's may come.
                    release(room.empty_q, lane);
                    if item.diagonal {
                        let sees = i32::cast_from(item.offset + row) - i32::cast_from(column);
                        let code = comptime!(shape.mask());
                        gpu_asm!("{code}", "// {s}", s = in(_) sees, options(nomem));
                    }
                    let code = comptime!(shape.first_softmax());
                    gpu_asm!("{code}", "// {s}", s = in(_) scale, options(nomem));
                    let code = comptime!(shape.round_weights());
                    gpu_asm!("{code}", options(nomem));

                    // The others: the scores of one are computed before the output of the one before it.
                    while last == 0u32 {
                        let before = stage + 0u32;
                        let parity_before = parity + 0u32;
                        stage += 1u32;
                        if stage == stages {
                            stage = 0u32;
                            parity ^= 1u32;
                        }
                        let keys = k_major(room.k + stage * tile_bytes);
                        ptx::wait(room.full_k + stage * 8, parity, bounded);
                        last = told(room.last + stage * 4, lane);
                        if comptime!(shape.ping_pong) {
                            ptx::meet(turn(consumer), CONSUMERS);
                        }
                        score(keys, shape);
                        ptx::wait(room.full_v + before * 8, parity_before, bounded);
                        accumulate(mn_major(room.v + before * tile_bytes, ACROSS), shape);
                        if comptime!(shape.ping_pong) {
                            ptx::let_go(turn(1u32 - consumer), CONSUMERS);
                        }
                        wait_products(1u32);
                        let code = comptime!(shape.softmax());
                        gpu_asm!(
                            "{code}", "// {s} {b} {k}",
                            s = in(_) scale, b = in(_) alone(consumer), k = in(_) keys,
                            options(explicit_mem, reads_address_space shared, writes_address_space shared)
                        );
                        // Only now: a tile may have been scored twice.
                        release(room.empty_k + stage * 8, lane);
                        wait_products(0u32);
                        release(room.empty_v + before * 8, lane);
                        let code = comptime!(shape.rescale());
                        gpu_asm!("{code}", options(nomem));
                        let code = comptime!(shape.round_weights());
                        gpu_asm!("{code}", options(nomem));
                    }
                    ptx::wait(room.full_v + stage * 8, parity, bounded);
                    accumulate(mn_major(room.v + stage * tile_bytes, ACROSS), shape);
                    wait_products(0u32);
                    release(room.empty_v + stage * 8, lane);
                    stage += 1u32;
                    if stage == stages {
                        stage = 0u32;
                        parity ^= 1u32;
                    }
                }
            } else {
                release(room.empty_q, lane);
            }

            let statistics: Vector<f32, Const<4>>;
            let code = comptime!(shape.finish());
            gpu_asm!("{code}", "// {s}", s = out(_) statistics, options(nomem));
            if spoilt == 1u32 {
                let code = comptime!(shape.spoil());
                gpu_asm!(
                    "{code}", "// {a} {k}",
                    a = in(_) room.spoilt + column * 4, k = in(_) item.offset + row,
                    options(explicit_mem, reads_address_space shared)
                );
            }
            #[unroll]
            for half in 0..2usize {
                let query = row + comptime!(8 * half as u32);
                let stored = query < item.queries;
                let place = usize::cast_from(item.place) + query as usize;
                #[unroll]
                for quad in 0..comptime!(shape.dim.div_ceil(32)) {
                    let eight: Vector<u32, Const<4>>;
                    let code = comptime!(shape.rounded(quad, half));
                    gpu_asm!("{code}", "// {e} {l}", e = out(_) eight, l = in(_) lane, options(nomem));
                    let group = comptime!(quad as u32 * 4) + lane % 4;
                    if stored && group < comptime!(shape.dim as u32 / 8) {
                        out[place * comptime!(shape.dim / 8) + group as usize] = eight;
                    }
                }
                if comptime!(shape.walk.lse) {
                    if stored && lane % 4 == 0u32 {
                        let sum = statistics.extract(half);
                        let offset = statistics.extract(half + 2);
                        let value = sum.ln() - offset * comptime!(std::f32::consts::LN_2);
                        lse[place] = select(sum == 0.0f32, nothing(), value);
                    }
                }
            }
        }
    }
    // The last turn that was given and not taken.
    if comptime!(shape.ping_pong) {
        if consumer == 0u32 {
            ptx::meet(turn(0u32), CONSUMERS);
        }
    }
}
