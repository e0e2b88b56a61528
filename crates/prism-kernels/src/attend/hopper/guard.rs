//! NaN and infinities among the values of the diagonal tile, which not every query sees: a weight of 0
//! times such a value is NaN. They are taken out of the tile, and the queries that do see them get NaN
//! at the end. Behind the end of a sequence, too, there may be anything.
//!
//! Tiles before the diagonal are seen by all queries of a row: there NaN is what comes out anyway.

use cubecl::prelude::*;

use super::consumer::alone;
use super::{HALF, HopperShape, TILE};
use crate::hopper::ptx;
use crate::operand::Element;

/// Named barrier of both consumers.
const BOTH: u32 = 5;
const UNITS: u32 = 256;

/// Cleans the tile at `values` if it needs that; 1 if it did. Then `spoilt` has, of each dim, the first
/// position within the tile that was bad, 2³² − 1 where none was.
///
/// Each consumer looks at the whole tile, so that they needn't meet when all is well, which
/// they nearly always find; and what they find is the same, since neither cleans before both have
/// looked.
#[cube]
pub(super) fn clean_values(
    values: u32,
    spoilt: u32,
    consumer: u32,
    unit: u32,
    #[comptime] shape: HopperShape,
) -> u32 {
    let code = comptime!(shape.find_bad());
    let found: u32;
    gpu_asm!(
        "{code}", "// {f} {v} {b}",
        f = out(_) found, v = in(_) values + unit * 16, b = in(_) alone(consumer),
        options(explicit_mem, reads_address_space shared, writes_address_space shared)
    );
    if found == 1u32 {
        let at = consumer * 128 + unit;
        // Nobody reads what the last cleaning left any more.
        ptx::meet(BOTH, UNITS);
        if at < comptime!(TILE as u32) {
            ptx::store(spoilt + at * 4, u32::MAX);
        }
        ptx::meet(BOTH, UNITS);
        let mut word = at + 0u32;
        while word < comptime!(shape.tile_bytes() as u32 / 4) {
            clean_pair(values, spoilt, word + 0u32, shape);
            word += UNITS;
        }
        ptx::publish_to_async();
        ptx::meet(BOTH, UNITS);
    }
    found
}

/// Two neighbouring values, the `word`th of the tile.
#[cube]
fn clean_pair(values: u32, spoilt: u32, word: u32, #[comptime] shape: HopperShape) {
    let exponent = comptime!(match shape.element {
        Element::BF16 => 0x7f80u32,
        _ => 0x7c00u32,
    });
    let pair = ptx::load(values + word * 4);
    let low = pair & exponent == exponent.runtime();
    let high = (pair >> 16u32) & exponent == exponent.runtime();
    if low || high {
        // A row has 32 words in 8 chunks, which the swizzle permutes by the row.
        let half = word / comptime!(HALF as u32 / 4);
        let row = (word / 32) % comptime!(TILE as u32);
        let chunk = ((word / 4) ^ row) % 8;
        let dim = half * 64 + chunk * 8 + (word % 4) * 2;
        let keep = select(low, 0u32, 0xffffu32) | select(high, 0u32, 0xffff_0000u32);
        ptx::store(values + word * 4, pair & keep);
        if low {
            ptx::store_min(spoilt + dim * 4, row);
        }
        if high {
            ptx::store_min(spoilt + dim * 4 + 4u32, row);
        }
    }
}
