//! The order in which rows are worked: kv heads one after the other, so that the keys of one stay
//! in cache; within it the rows that read most come first, so that none is left over at the end.
//! Where the lengths are alike, a group's heads lie side by side: what they select in common is
//! then read from memory once.

use cubecl::prelude::*;
use cubecl::server::Handle;

use crate::capabilities::Capabilities;
use crate::operand::buffer;
use crate::select::Selection;
use crate::work::{cube_count, launch};

/// Lengths that are told apart.
const BINS: usize = 256;

/// Orders the rows of a selection of `[batch, q_heads, kv_heads]` heads over `key_blocks` blocks:
/// `[batch · q_heads · rows]` u32, each the index of a row, heads first. A counting sort a kv head.
pub fn schedule(
    client: &Client,
    capabilities: &Capabilities,
    selection: &Selection,
    [batch, q_heads, kv_heads]: [usize; 3],
    key_blocks: usize,
) -> Handle {
    let lines = batch * q_heads * selection.rows;
    let order = client.empty((lines * 4).max(4));
    if lines == 0 {
        return order;
    }
    let units = match capabilities.cores {
        Some(_) => 1,
        None => 256.min(capabilities.units),
    };
    // SAFETY: each cube orders the rows of its own kv head.
    unsafe {
        launch!(
            schedule_kernel,
            client,
            cube_count(client, batch * kv_heads),
            CubeDim::new_1d(units),
            buffer(&selection.counts, lines),
            buffer(&order, lines),
            batch * kv_heads,
            selection.rows,
            q_heads / kv_heads,
            key_blocks.max(1),
            units as usize,
        );
    }
    order
}

#[cube(launch_unchecked, create_dummy_kernel)]
fn schedule_kernel(
    counts: &[u32],
    order: &mut [u32],
    heads: usize,
    rows: usize,
    group: usize,
    key_blocks: usize,
    #[comptime] units: usize,
) {
    if CUBE_POS >= heads {
        terminate!();
    }
    let lines = group * rows;
    let base = CUBE_POS * lines;
    let unit = UNIT_POS as usize;
    let places = Shared::<[Atomic<u32>]>::new_slice(BINS);
    let mut bin = unit;
    while bin < BINS {
        places[bin].store(0u32);
        bin += units;
    }
    sync_cube();
    let mut i = unit;
    while i < lines {
        places[length_bin(counts[base + i], key_blocks)].fetch_add(1u32);
        i += units;
    }
    sync_cube();
    // Where each bin begins.
    if unit == 0 {
        let mut next = 0u32;
        for bin in 0..BINS {
            let count = places[bin].load();
            places[bin].store(next);
            next += count;
        }
    }
    sync_cube();
    let mut i = unit;
    while i < lines {
        // A row's heads one after the other, the rows as dense attention takes them.
        let line = base + (i % group) * rows + rows - 1 - i / group;
        let place = places[length_bin(counts[line], key_blocks)].fetch_add(1u32);
        order[base + place as usize] = line as u32;
        i += units;
    }
}

/// The bin of a row: the most blocks first.
#[cube]
fn length_bin(count: u32, key_blocks: usize) -> usize {
    let scaled = (count as usize * comptime!(BINS - 1)) / key_blocks;
    comptime!(BINS - 1) - scaled.min(comptime!(BINS - 1))
}

/// Blocks that each row of a selection reads, `[lines]` u32, from its words
/// `[lines, words_per_row]`.
pub fn count_blocks(client: &Client, words: &Handle, [lines, words_per_row]: [usize; 2]) -> Handle {
    let counts = client.empty((lines * 4).max(4));
    if lines > 0 {
        let units = 64u32.min(client.properties().hardware.max_units_per_cube);
        // SAFETY: units past the last line return.
        unsafe {
            launch!(
                count_kernel,
                client,
                cube_count(client, lines.div_ceil(units as usize)),
                CubeDim::new_1d(units),
                buffer(words, lines * words_per_row),
                buffer(&counts, lines),
                lines,
                words_per_row,
            );
        }
    }
    counts
}

#[cube(launch_unchecked, create_dummy_kernel)]
fn count_kernel(words: &[u32], counts: &mut [u32], lines: usize, words_per_row: usize) {
    let line = ABSOLUTE_POS;
    if line >= lines {
        terminate!();
    }
    let mut count = 0u32;
    for w in 0..words_per_row {
        count += words[line * words_per_row + w].count_ones();
    }
    counts[line] = count;
}
