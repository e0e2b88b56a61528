//! The same search digit by digit: where the prefix ends is narrowed to one bin of 128 a round, by
//! sums that the lanes gather in shared memory. Two rounds mostly do, where bounds that close in by
//! quarters need seven or eight.

use cubecl::prelude::*;
use prism_core::select::MASS_ONE;

use super::rule::{Pair, Row, Rule, RuleShape, sum};
use super::search::{Found, Prefixes, Search, complete};

/// Bins of a digit: four for each lane of a plane.
pub(super) const BINS: usize = 128;

/// Of each band the smallest prefix whose masses reach `target`, as
/// [`heaviest`](super::search::heaviest) finds it by [`Search::Mass`]. From `first` on `bins`
/// has room for [`BINS`] of each band, for this row alone.
#[cube]
pub(super) fn heaviest_by_digits<S: Size>(
    scratch: &mut [Vector<u32, S>],
    bins: &mut [Vector<u32, Const<4>>],
    first: usize,
    row: &Row,
    rule: &Rule,
    target: u32,
    most: Pair,
    #[comptime] bands: usize,
    #[comptime] shape: RuleShape,
) -> Prefixes {
    // Masses add up to at least MASS_ONE − n: without the blocks lighter than this they still reach
    // the target.
    let blocks = row.causal.max(1) as u32;
    let spare = MASS_ONE - target.min(MASS_ONE);
    let likely = (spare - blocks.min(spare)) / blocks;
    // The prefix ends with a block not lighter than `lower` and lighter than `upper`; the blocks
    // between the two weigh `inside`, and those from `upper` on `heavier`.
    let mut lower = Pair::new(0u32);
    let mut upper = Pair::new(0u32);
    let mut inside = Pair::new(0u32);
    let mut heavier = Pair::new(0u32);
    let mut open = Pair::new(0u32);
    #[unroll]
    for z in 0..bands {
        let most = most.extract(z);
        lower.insert(z, likely.min(most));
        upper.insert(z, most + 1u32);
        open.insert(z, select(row.causal > 0 && target > 0u32, 1u32, 0u32));
    }
    while open.extract(0usize) + open.extract(1usize) > 0u32 {
        let mut shift = Pair::new(0u32);
        #[unroll]
        for z in 0..bands {
            let widest = upper.extract(z) - lower.extract(z) - 1u32;
            let digits = 32u32 - widest.leading_zeros();
            shift.insert(z, digits - digits.min(comptime!(BINS.ilog2())));
        }
        gather::<S>(scratch, bins, first, row, lower, upper, shift, open, bands, shape);
        #[unroll]
        for z in 0..bands {
            if open.extract(z) > 0u32 {
                let bin = reach(
                    bins,
                    first + z * comptime!(BINS / 4),
                    row.lane,
                    target - heavier.extract(z),
                    shape,
                );
                let reached = bin.past > 0u32;
                let past = bin.past.max(1u32) - 1u32;
                let heaviest = upper.extract(z) - (past << shift.extract(z));
                let width = 1u32 << shift.extract(z);
                let lightest = (heaviest - width.min(heaviest)).max(lower.extract(z));
                // Weightless blocks never reach a target: all of them stay.
                let lightest = select(reached, lightest, 0u32);
                lower.insert(z, lightest);
                upper.insert(z, heaviest);
                inside.insert(z, bin.mass);
                heavier.insert(z, heavier.extract(z) + bin.before);
                // Two blocks weigh at least twice the lower bound together, and one, being below the
                // upper one, weighs less where the bounds are that close.
                let several = lightest == 0u32 || bin.mass >= 2u32 * lightest;
                let wide = heaviest - lightest > 1u32;
                open.insert(z, select(reached && wide && several, 1u32, 0u32));
            }
        }
    }
    let found = Found { lightest: lower, kept: heavier + inside, heavier };
    complete::<S>(scratch, row, rule, target, &found, bands, Search::Mass, shape)
}

/// Adds the masses between the bounds to their bins, the heaviest ones to the first.
#[cube]
fn gather<S: Size>(
    scratch: &mut [Vector<u32, S>],
    bins: &mut [Vector<u32, Const<4>>],
    first: usize,
    row: &Row,
    lower: Pair,
    upper: Pair,
    shift: Pair,
    open: Pair,
    #[comptime] bands: usize,
    #[comptime] shape: RuleShape,
) {
    let lanes = comptime!(shape.lanes as usize);
    let width = S::value();
    let vectors = row.causal.div_ceil(width);
    let vectors_a_band = comptime!(BINS / 4);
    #[unroll]
    for z in 0..bands {
        bins[first + z * vectors_a_band + row.lane] = Vector::new(0u32);
    }
    sync_plane();
    let sums = shared_address(bins) + (first * 16) as u32;
    let mut top = Pair::new(0u32);
    let mut range = Pair::new(0u32);
    #[unroll]
    for z in 0..bands {
        // Where the search has ended no mass is that heavy.
        let open = open.extract(z) > 0u32;
        top.insert(z, select(open, upper.extract(z) - 1u32, u32::MAX));
        range.insert(z, select(open, upper.extract(z) - 1u32 - lower.extract(z), 0u32));
    }
    let mut i = row.lane;
    while i < vectors {
        #[unroll]
        for z in 0..bands {
            let masses = scratch[row.start + z * row.stride + i];
            #[unroll]
            for e in 0..width {
                let x = masses.extract(e);
                // Masses above the range wrap around.
                let depth = top.extract(z) - x;
                if depth <= range.extract(z) {
                    let bin = depth >> shift.extract(z);
                    add(sums + comptime!((z * BINS * 4) as u32) + bin * 4u32, x);
                }
            }
        }
        i += lanes;
    }
    sync_plane();
}

/// The bin that holds where a prefix ends.
#[derive(CubeType, Clone, Copy)]
struct Bin {
    /// One more than its index, 0 if there is none.
    past: u32,
    /// What the bins before it weigh.
    before: u32,
    /// What it weighs.
    mass: u32,
}

/// The first bin with which the sum of the bins reaches `missing`.
#[cube]
fn reach(
    bins: &mut [Vector<u32, Const<4>>],
    first: usize,
    lane: usize,
    missing: u32,
    #[comptime] shape: RuleShape,
) -> Bin {
    let own = bins[first + lane];
    let mut before = plane_exclusive_sum(
        own.extract(0usize) + own.extract(1usize) + own.extract(2usize) + own.extract(3usize),
    );
    let mut past = 0u32;
    let mut ahead = 0u32;
    let mut mass = 0u32;
    #[unroll]
    for i in 0..4usize {
        let after = before + own.extract(i);
        if before < missing && after >= missing {
            past = (lane * 4 + i + 1) as u32;
            ahead = before;
            mass = own.extract(i);
        }
        before = after;
    }
    Bin { past: sum(past, shape), before: sum(ahead, shape), mass: sum(mass, shape) }
}

/// Address of the bins in the shared window.
#[cube]
fn shared_address(bins: &mut [Vector<u32, Const<4>>]) -> u32 {
    let address: u32;
    gpu_asm!(
        "{{ .reg .u64 shared; cvta.to.shared.u64 shared, {p}; cvt.u32.u64 {a}, shared; }}",
        a = out(_) address, p = in(_) bins.as_ptr(), options(nomem)
    );
    address
}

/// Adds to a word of shared memory, whoever else does. CubeCL's atomics don't know the address space,
/// which costs a multiple. That this writes to memory is kept from the compiler, so that masses are read
/// ahead; planes meet before they read the bins.
#[cube]
fn add(address: u32, x: u32) {
    gpu_asm!(
        "red.relaxed.cta.shared::cta.add.u32 [{a}], {x};",
        a = in(_) address + 0u32, x = in(_) x + 0u32, options(nomem)
    );
}
