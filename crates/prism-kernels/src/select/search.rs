//! The search for a row's prefix: the smallest set of its heaviest blocks that reaches a target.

use cubecl::prelude::*;

use super::rule::{Pair, Row, Rule, RuleShape, sum};

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
/// that takes part if none does. No block of band z weighs 2^`bits`\[z\] or more.
///
/// Bounds close in on the lightest mass that is kept, two bits at a time, until they hold a single
/// block, or blocks of one mass, of which the first ones complete the prefix. Sums tell how many
/// they hold: two blocks weigh at least twice the lower bound together, and one, being below the
/// upper bound, weighs less. The bands are searched side by side.
#[cube]
pub(super) fn heaviest(
    scratch: &mut [u32],
    row: &Row,
    rule: &Rule,
    target: u32,
    bits: Pair,
    #[comptime] bands: usize,
    #[comptime] search: Search,
    #[comptime] shape: RuleShape,
) -> Prefixes {
    let by_mass = comptime!(search == Search::Mass);
    // Of each band: the sum of the blocks not lighter than `lightest`, and of those beyond the upper
    // bound.
    let mut kept = Pair::new(row.causal as u32);
    if comptime!(search == Search::Free || search == Search::Chosen) {
        let mut all = 0u32;
        let mut v = row.lane;
        while v < row.causal {
            all += select(takes_part(rule, row, v, scratch[row.start + v], search), 1u32, 0u32);
            v += comptime!(shape.lanes as usize);
        }
        kept = Pair::new(sum(all, shape));
    }
    let mut heavier = Pair::new(0u32);
    let mut lightest = Pair::new(0u32);
    let mut bit = bits.extract(0usize);
    if comptime!(bands == 2) {
        bit = bit.max(bits.extract(1usize));
    }
    bit = bit.div_ceil(2u32) * 2u32;
    let mut open = true;
    while open && bit > 0u32 {
        bit -= 2u32;
        let sums = above(scratch, row, rule, &lightest, bit, bands, search, shape);
        open = false;
        #[unroll]
        for z in 0..bands {
            // The highest of the three bounds that still reaches the target, 0 if none does.
            let mut reaches = 0u32;
            #[unroll]
            for j in 0..3usize {
                if sums[z * 3 + j] >= target {
                    reaches = comptime!(j as u32 + 1).runtime();
                }
            }
            #[unroll]
            for j in 0..3usize {
                if reaches == comptime!(j as u32 + 1) {
                    kept.insert(z, sums[z * 3 + j]);
                }
                if reaches == comptime!(j as u32) {
                    heavier.insert(z, sums[z * 3 + j]);
                }
            }
            lightest.insert(z, lightest.extract(z) | (reaches << bit));
            let each = if comptime!(by_mass) { lightest.extract(z) } else { 1u32.runtime() };
            let between = kept.extract(z) - heavier.extract(z);
            open = open || each == 0u32 || between >= 2u32 * each;
        }
    }
    let mut last = Pair::new(row.causal as u32);
    #[unroll]
    for z in 0..bands {
        let mass = lightest.extract(z);
        let each = if comptime!(by_mass) { mass } else { 1u32.runtime() };
        // Weightless blocks never reach a target: all of them stay.
        if each > 0u32 {
            let tied = (kept.extract(z) - heavier.extract(z)) / each;
            let missing = target - heavier.extract(z).min(target);
            let wanted = missing.div_ceil(each);
            if tied > 1u32 && wanted < tied {
                let start = row.start + z * row.stride;
                last.insert(z, tied_block(scratch, row, rule, start, mass, wanted, search, shape));
            }
        }
        // No mass is as heavy as u32::MAX: a target of 0 keeps nothing.
        lightest.insert(z, select(target == 0u32, u32::MAX, mass));
    }
    Prefixes { lightest, last }
}

/// The index of block number `wanted` among those that weigh `mass`.
#[cube]
fn tied_block(
    scratch: &mut [u32],
    row: &Row,
    rule: &Rule,
    start: usize,
    mass: u32,
    wanted: u32,
    #[comptime] search: Search,
    #[comptime] shape: RuleShape,
) -> u32 {
    let mut low = 0usize;
    let mut high = row.causal;
    while low < high {
        let middle = (low + high) / 2;
        let mut count = 0u32;
        let mut v = row.lane;
        while v <= middle {
            let x = scratch[start + v];
            let part = takes_part(rule, row, v, x, search);
            count += select(part && (x & comptime!(SELECTED - 1)) == mass, 1u32, 0u32);
            v += comptime!(shape.lanes as usize);
        }
        if sum(count, shape) >= wanted {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    low as u32
}

/// What the blocks add that weigh at least each of three bounds, for each band: those of band z are
/// `lightest`\[z\] with 1, 2 and 3 in the two bits from `bit` on.
#[cube]
fn above(
    scratch: &mut [u32],
    row: &Row,
    rule: &Rule,
    lightest: &Pair,
    bit: u32,
    #[comptime] bands: usize,
    #[comptime] search: Search,
    #[comptime] shape: RuleShape,
) -> Array<u32> {
    let step = comptime!(shape.lanes as usize);
    let mut sums = Array::<u32>::new(comptime!(bands * 3));
    #[unroll]
    for j in 0..bands * 3 {
        sums[j] = 0u32;
    }
    let mut v = row.lane;
    if comptime!(search == Search::Mass && shape.lanes > 1) {
        // Independent reads at once.
        while v + 3 * step < row.causal {
            #[unroll]
            for i in 0..4usize {
                add_above(
                    scratch,
                    row,
                    rule,
                    lightest,
                    bit,
                    &mut sums,
                    v + i * step,
                    bands,
                    search,
                );
            }
            v += 4 * step;
        }
    }
    while v < row.causal {
        add_above(scratch, row, rule, lightest, bit, &mut sums, v, bands, search);
        v += step;
    }
    #[unroll]
    for j in 0..bands * 3 {
        sums[j] = sum(sums[j], shape);
    }
    sums
}

/// Adds block `v` where it takes part.
#[cube]
fn add_above(
    scratch: &mut [u32],
    row: &Row,
    rule: &Rule,
    lightest: &Pair,
    bit: u32,
    sums: &mut Array<u32>,
    v: usize,
    #[comptime] bands: usize,
    #[comptime] search: Search,
) {
    #[unroll]
    for z in 0..bands {
        let x = scratch[row.start + z * row.stride + v];
        #[unroll]
        for j in 0..3usize {
            let bound = lightest.extract(z) | (comptime!(j as u32 + 1) << bit);
            if comptime!(search == Search::Mass) {
                sums[z * 3 + j] += select(x >= bound, x, 0u32);
            } else {
                let heavy = (x & comptime!(SELECTED - 1)) >= bound;
                let counts = heavy && takes_part(rule, row, v, x, search);
                sums[z * 3 + j] += select(counts, 1u32, 0u32);
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
