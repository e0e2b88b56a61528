//! The search for a row's prefix: the smallest set of its heaviest blocks that reaches a target.

use cubecl::prelude::*;
use prism_core::select::MASS_ONE;

use super::rule::{Pair, Row, Rule, RuleShape, sum};

/// Bounds tried a round.
const BOUNDS: usize = 3;
/// Masses that a lane reads at once, at least.
const AHEAD: usize = 4;
/// Marks a selected block next to its mass (masses need 31 bits).
pub(super) const SELECTED: u32 = 1 << 31;

/// Of each band a prefix of its blocks by (mass descending, index ascending): those heavier than
/// `lightest`, and of those that weigh just this the ones up to index `last`.
#[derive(CubeType, Clone, Copy)]
pub(super) struct Prefixes {
    pub lightest: Pair,
    pub last: Pair,
}

#[cube]
impl Prefixes {
    /// Whether the prefix of band `z` holds block `v` of this mass.
    pub fn holds(&self, #[comptime] z: usize, mass: u32, v: usize) -> bool {
        let lightest = self.lightest.extract(z);
        mass > lightest || (mass == lightest && v as u32 <= self.last.extract(z))
    }
}

#[cube]
pub(super) fn forced(rule: &Rule, row: &Row, v: usize) -> bool {
    v < rule.sinks || v + rule.recents >= row.causal
}

/// Which blocks take part in a search, and what each adds to the sum.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Search {
    /// Every block adds its mass.
    Mass,
    /// Every block adds 1.
    Count,
    /// Blocks that aren't selected add 1.
    Free,
    /// Blocks that are selected but not forced add 1.
    Chosen,
}

/// Of each of the first `bands` bands the smallest prefix whose sum reaches `target`: every block
/// that takes part if none does. No block of band z is heavier than `most`\[z\].
///
/// Bounds close in on the lightest mass that is kept, until they hold a single block, or blocks of one mass, of which the first ones complete the prefix. Sums tell how many
/// they hold: two blocks weigh at least twice the lower bound together, and one, being below the
/// upper bound, weighs less. The bands are searched side by side.
#[cube]
pub(super) fn heaviest<S: Size>(
    scratch: &mut [Vector<u32, S>],
    row: &Row,
    rule: &Rule,
    target: u32,
    most: Pair,
    #[comptime] bands: usize,
    #[comptime] search: Search,
    #[comptime] shape: RuleShape,
) -> Prefixes {
    let by_mass = comptime!(search == Search::Mass);
    // Of each band: the bounds, the sum of the blocks not lighter than the lower one, and of those
    // not lighter than the upper one.
    let mut lightest = Pair::new(0u32);
    let mut upper = Pair::new(0u32);
    let mut kept = Pair::new(row.causal as u32);
    let mut heavier = Pair::new(0u32);
    // Blocks lighter than this weigh less together than what may be left out. Roundings aside: it
    // is tried first, not taken for granted.
    let mut likely = Pair::new(0u32);
    #[unroll]
    for z in 0..bands {
        upper.insert(z, most.extract(z) + 1u32);
        if comptime!(by_mass) {
            let spare = MASS_ONE - target.min(MASS_ONE);
            likely.insert(z, (spare / row.causal.max(1) as u32).min(most.extract(z)));
        }
    }
    if comptime!(search == Search::Free || search == Search::Chosen) {
        let mut none = Array::<u32>::new(comptime!(bands * BOUNDS));
        #[unroll]
        for j in 0..comptime!(bands * BOUNDS) {
            none[j] = 0u32;
        }
        let all = above::<S>(scratch, row, rule, &none, bands, search, shape);
        kept = Pair::new(all[0]);
    }
    let mut open = row.causal > 0;
    while open {
        let mut bounds = Array::<u32>::new(comptime!(bands * BOUNDS));
        #[unroll]
        for z in 0..bands {
            between(&mut bounds, lightest.extract(z).max(likely.extract(z)), upper.extract(z), z);
            if comptime!(by_mass) {
                if likely.extract(z) > 0u32 {
                    bounds[z * comptime!(BOUNDS)] = likely.extract(z);
                }
            }
        }
        likely = Pair::new(0u32);
        let sums = above::<S>(scratch, row, rule, &bounds, bands, search, shape);
        open = false;
        #[unroll]
        for z in 0..bands {
            // Sums fall as bounds rise.
            #[unroll]
            for j in 0..comptime!(BOUNDS) {
                let at = comptime!(z * BOUNDS + j);
                let reaches = sums[at] >= target;
                if reaches {
                    lightest.insert(z, bounds[at]);
                    kept.insert(z, sums[at]);
                }
            }
            #[unroll]
            for i in 0..comptime!(BOUNDS) {
                let at = comptime!(z * BOUNDS + BOUNDS - 1 - i);
                if sums[at] < target {
                    upper.insert(z, bounds[at]);
                    heavier.insert(z, sums[at]);
                }
            }
            let lower = lightest.extract(z);
            let each = if comptime!(by_mass) { lower } else { 1u32.runtime() };
            let several = kept.extract(z) - heavier.extract(z) >= 2u32 * each;
            open = open || (upper.extract(z) - lower > 1u32 && (each == 0u32 || several));
        }
    }
    let found = Found { lightest, kept, heavier };
    complete::<S>(scratch, row, rule, target, &found, bands, search, shape)
}

/// Where a search has ended: of each band the lower bound, what the blocks add that aren't lighter
/// than it, and what those of them add that are certainly kept, the others being one block or of one
/// mass.
#[derive(CubeType, Clone, Copy)]
pub(super) struct Found {
    pub lightest: Pair,
    pub kept: Pair,
    pub heavier: Pair,
}

/// The prefixes, once it is known how many blocks of one mass complete them.
#[cube]
pub(super) fn complete<S: Size>(
    scratch: &mut [Vector<u32, S>],
    row: &Row,
    rule: &Rule,
    target: u32,
    found: &Found,
    #[comptime] bands: usize,
    #[comptime] search: Search,
    #[comptime] shape: RuleShape,
) -> Prefixes {
    let by_mass = comptime!(search == Search::Mass);
    let mut lightest = Pair::new(0u32);
    let mut last = Pair::new(row.causal as u32);
    #[unroll]
    for z in 0..bands {
        let mass = found.lightest.extract(z);
        let each = if comptime!(by_mass) { mass } else { 1u32.runtime() };
        // Weightless blocks never reach a target: all of them stay.
        if each > 0u32 {
            let tied = (found.kept.extract(z) - found.heavier.extract(z)) / each;
            let missing = target - found.heavier.extract(z).min(target);
            let wanted = missing.div_ceil(each);
            if tied > 1u32 && wanted < tied {
                let start = row.start + z * row.stride;
                last.insert(
                    z,
                    tied_block::<S>(scratch, row, rule, start, mass, wanted, search, shape),
                );
            }
        }
        // No mass is as heavy as u32::MAX: a target of 0 keeps nothing.
        lightest.insert(z, select(target == 0u32, u32::MAX, mass));
    }
    Prefixes { lightest, last }
}

/// Bounds between `lower` and `upper` for band `z`: where they are far apart, at a sixteenth, a
/// quarter and half of the distance, since masses spread over many powers of two, otherwise at
/// quarters.
#[cube]
fn between(bounds: &mut Array<u32>, lower: u32, upper: u32, #[comptime] z: usize) {
    let distance = upper - lower;
    let far = distance >> 1u32 > lower;
    let quarter = distance >> 2u32;
    let half = distance >> 1u32;
    let parts = (
        select(far, distance >> 4u32, quarter),
        select(far, quarter, half),
        select(far, half, half + quarter),
    );
    bounds[z * comptime!(BOUNDS)] = lower + parts.0.max(1u32);
    bounds[z * comptime!(BOUNDS) + 1] = lower + parts.1.max(1u32);
    bounds[z * comptime!(BOUNDS) + 2] = lower + parts.2.max(1u32);
}

/// The index of block number `wanted` among those that weigh `mass`.
#[cube]
fn tied_block<S: Size>(
    scratch: &mut [Vector<u32, S>],
    row: &Row,
    rule: &Rule,
    start: usize,
    mass: u32,
    wanted: u32,
    #[comptime] search: Search,
    #[comptime] shape: RuleShape,
) -> u32 {
    let width = S::value();
    let mut low = 0usize;
    let mut high = row.causal;
    while low < high {
        let middle = (low + high) / 2;
        let mut count = 0u32;
        let mut i = row.lane;
        while i * width <= middle {
            let masses = scratch[start + i];
            #[unroll]
            for e in 0..width {
                let v = i * width + e;
                let x = masses.extract(e);
                let part = v <= middle && takes_part(rule, row, v, x, search);
                count += select(part && (x & comptime!(SELECTED - 1)) == mass, 1u32, 0u32);
            }
            i += comptime!(shape.lanes as usize);
        }
        if sum(count, shape) >= wanted {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    low as u32
}

/// What the blocks add that weigh at least each of the bounds, for each band.
#[cube]
fn above<S: Size>(
    scratch: &mut [Vector<u32, S>],
    row: &Row,
    rule: &Rule,
    bounds: &Array<u32>,
    #[comptime] bands: usize,
    #[comptime] search: Search,
    #[comptime] shape: RuleShape,
) -> Array<u32> {
    let step = comptime!(shape.lanes as usize);
    let width = S::value();
    let vectors = row.causal.div_ceil(width);
    let mut sums = Array::<u32>::new(comptime!(bands * BOUNDS));
    #[unroll]
    for j in 0..comptime!(bands * BOUNDS) {
        sums[j] = 0u32;
    }
    let mut i = row.lane;
    let ahead = comptime!(AHEAD.div_ceil(width));
    if comptime!(search == Search::Mass && shape.lanes > 1 && ahead > 1) {
        // Independent reads at once.
        while i + (ahead - 1) * step < vectors {
            #[unroll]
            for n in 0..ahead {
                let i = i + n * step;
                add_above::<S>(scratch, row, rule, bounds, &mut sums, i, bands, search);
            }
            i += ahead * step;
        }
    }
    while i < vectors {
        add_above::<S>(scratch, row, rule, bounds, &mut sums, i, bands, search);
        i += step;
    }
    #[unroll]
    for j in 0..comptime!(bands * BOUNDS) {
        sums[j] = sum(sums[j], shape);
    }
    sums
}

/// Adds the blocks of vector `i` where they take part.
#[cube]
fn add_above<S: Size>(
    scratch: &mut [Vector<u32, S>],
    row: &Row,
    rule: &Rule,
    bounds: &Array<u32>,
    sums: &mut Array<u32>,
    i: usize,
    #[comptime] bands: usize,
    #[comptime] search: Search,
) {
    let width = S::value();
    #[unroll]
    for z in 0..bands {
        let masses = scratch[row.start + z * row.stride + i];
        #[unroll]
        for e in 0..width {
            let x = masses.extract(e);
            #[unroll]
            for j in 0..comptime!(BOUNDS) {
                let at = comptime!(z * BOUNDS + j);
                if comptime!(search == Search::Mass) {
                    if x >= bounds[at] {
                        sums[at] += x;
                    }
                } else {
                    let v = i * width + e;
                    let heavy = v < row.causal && (x & comptime!(SELECTED - 1)) >= bounds[at];
                    let counts = heavy && takes_part(rule, row, v, x, search);
                    sums[at] += select(counts, 1u32, 0u32);
                }
            }
        }
    }
}

#[cube]
fn takes_part(rule: &Rule, row: &Row, v: usize, x: u32, #[comptime] search: Search) -> bool {
    match search {
        Search::Mass => true.runtime(),
        Search::Count => true.runtime(),
        Search::Free => x < SELECTED,
        Search::Chosen => x >= SELECTED && !forced(rule, row, v),
    }
}
