//! NaN and infinities in values that not every query of a tile sees: a weight of 0 times such a value
//! is NaN. They are taken out of the tile, and the queries that do see them get NaN at the end.

use cubecl::prelude::*;

use super::copies::WIDE;

/// Forgets what was seen: of each dim the first position of a bad value, and of all dims the first.
#[cube]
pub(super) fn spotless(
    spoilt: &Shared<[Atomic<u32>]>,
    unit: usize,
    #[comptime] units: usize,
    #[comptime] dim: usize,
) {
    let mut c = unit;
    while c <= dim {
        spoilt[c].store(u32::MAX);
        c += units;
    }
}

/// Replaces the bad values of a tile, whose first row is at position `start`, by 0 and notes where
/// they were.
#[cube]
pub(super) fn clean<E: Float, N: Size>(
    tile: &mut Shared<[Vector<E, N>]>,
    base: usize,
    start: usize,
    unit: usize,
    #[comptime] units: usize,
    #[comptime] rows: usize,
    #[comptime] chunks: usize,
    spoilt: &Shared<[Atomic<u32>]>,
) {
    let pitch = comptime!(chunks + 1);
    let mut slot = unit;
    while slot < rows * chunks {
        let (row, column) = (slot / chunks, slot % chunks);
        let at = base + row * pitch + column;
        let values = Vector::<f32, N>::cast_from(tile[at]);
        let mut any = false;
        #[unroll]
        for e in 0..WIDE {
            any = any || bad(values.extract(e));
        }
        if any {
            let position = (start + row) as u32;
            let mut cleaned = tile[at];
            #[unroll]
            for e in 0..WIDE {
                if bad(values.extract(e)) {
                    cleaned.insert(e, E::from_int(0));
                    spoilt[column * WIDE + e].fetch_min(position);
                }
            }
            tile[at] = cleaned;
            spoilt[comptime!(chunks * WIDE)].fetch_min(position);
        }
        slot += units;
    }
}

/// By its bits: compilers may take a product with 0 for 0.
#[cube]
fn bad(x: f32) -> bool {
    u32::reinterpret(x) & 0x7f80_0000u32 == 0x7f80_0000u32
}

/// Two neighbouring elements of the output of the query at `position`, from dim `c` on: NaN where it
/// sees a bad value.
#[cube]
pub(super) fn spoil<NC: Size>(
    pair: Vector<f32, NC>,
    spoilt: &Shared<[Atomic<u32>]>,
    c: usize,
    position: usize,
) -> Vector<f32, NC> {
    let mut out = pair;
    let nan = f32::reinterpret(0x7fc0_0000u32);
    #[unroll]
    for e in 0..2usize {
        let sees = position >= spoilt[c + e].load() as usize;
        out.insert(e, select(sees, nan, pair.extract(e)));
    }
    out
}
