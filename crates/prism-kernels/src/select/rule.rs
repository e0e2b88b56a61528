//! The selection rule on the device: from the integer masses of a row to its bits, equal bit for
//! bit to [`prism_core::SelectionRule::select_row`].
//!
//! A row is worked by `lanes` units together (a plane) or by one. Nothing is sorted: the lightest
//! mass that is kept is found bit by bit, since the sum of the masses not lighter than a bound
//! only falls as the bound rises. Integer sums don't depend on the order of the lanes.

use cubecl::prelude::*;
use prism_core::{Budget, SelectionRule};

use crate::fixed::{Total, usable, weight};

/// Marks a selected block next to its mass (masses need 31 bits).
const SELECTED: u32 = 1 << 31;

/// What a kernel is compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct RuleShape {
    /// Units that work a row together.
    pub lanes: u32,
    /// Whether inline PTX is there, which adds up a warp in one instruction.
    pub ptx: bool,
    /// Softmaxes a row.
    pub bands: u32,
    /// Whether each band keeps a mass, rather than a number of blocks.
    pub by_mass: bool,
    /// Whether rows can be filled up to a minimum.
    pub fill: bool,
    /// Whether rows can be cut to a maximum.
    pub cut: bool,
}

impl RuleShape {
    pub fn new(rule: &SelectionRule, lanes: u32, bands: u32, ptx: bool) -> Self {
        Self {
            lanes,
            ptx: ptx && lanes == 32,
            bands,
            by_mass: matches!(rule.budget, Budget::Mass(_)),
            fill: rule.min_blocks > 1,
            cut: rule.max_blocks.is_some(),
        }
    }
}

/// The numbers of a [`SelectionRule`].
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Rule {
    /// Mass or number of blocks that each band keeps; `u32::MAX` for all.
    pub budget: u32,
    pub sinks: usize,
    pub recents: usize,
    pub min_blocks: u32,
    pub max_blocks: u32,
}

/// Where a row's masses lie: band `z` at `start + z · stride`.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Row {
    pub start: usize,
    pub stride: usize,
    /// Causal blocks.
    pub causal: usize,
    /// Place of this unit among those that work the row.
    pub lane: usize,
}

/// A prefix of the blocks by (mass descending, index ascending): `[lightest, last]` holds those
/// heavier than `lightest`, and of those that weigh just this the ones up to index `last`.
type Prefix = Vector<u32, Const<2>>;

#[cube]
fn holds(prefix: Prefix, mass: u32, v: usize) -> bool {
    let lightest = prefix.extract(0usize);
    mass > lightest || (mass == lightest && v as u32 <= prefix.extract(1usize))
}

#[cube]
fn forced(rule: &Rule, row: &Row, v: usize) -> bool {
    v < rule.sinks || v + rule.recents >= row.causal
}

/// Sum over the units that work a row.
#[cube]
pub(crate) fn sum(x: u32, #[comptime] shape: RuleShape) -> u32 {
    if comptime!(shape.ptx) {
        let total: u32;
        gpu_asm!("redux.sync.add.u32 {t}, {x}, 0xffffffff;", t = out(_) total, x = in(_) x + 0u32, options(nomem));
        total
    } else if comptime!(shape.lanes > 1) {
        plane_sum(x)
    } else {
        x
    }
}

/// Turns the scores of band `z` (f32 bits) into masses that sum to 2³⁰, in place. Returns the
/// bits that the heaviest mass needs.
#[cube]
pub(crate) fn to_masses(
    scratch: &mut [u32],
    row: &Row,
    z: usize,
    #[comptime] shape: RuleShape,
) -> u32 {
    let start = row.start + z * row.stride;
    let step = comptime!(shape.lanes as usize);
    let none = f32::reinterpret(0xff80_0000u32);
    let mut max = none;
    let mut v = row.lane;
    while v < row.causal {
        max = max.max(usable(f32::reinterpret(scratch[start + v])));
        v += step;
    }
    if comptime!(shape.lanes > 1) {
        max = plane_max(max);
    }
    let silent = u32::reinterpret(max) == 0xff80_0000u32;
    let mut high = 0u32;
    let mut low = 0u32;
    let mut v = row.lane;
    while v < row.causal {
        let score = usable(f32::reinterpret(scratch[start + v]));
        let w = select(silent, 0u32, weight(max - score));
        high += w >> 16u32;
        low += w & 0xffffu32;
        scratch[start + v] = w;
        v += step;
    }
    let total = Total { high: sum(high, shape), low: sum(low, shape) };
    let normaliser = total.normaliser();
    let mut v = row.lane;
    while v < row.causal {
        scratch[start + v] = normaliser.mass(scratch[start + v]);
        v += step;
    }
    32u32 - normaliser.mass(1u32 << 30u32).leading_zeros()
}

/// Which blocks take part in a search, and what each adds to the sum.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Search {
    /// Every block adds its mass.
    Mass,
    /// Every block adds 1.
    Count,
    /// Blocks that aren't selected add 1.
    Free,
    /// Blocks that are selected but not forced add 1.
    Chosen,
}

/// The smallest prefix whose sum reaches `target`; every block that takes part if none does.
/// No block weighs 2^`bits` or more.
///
/// Bounds close in on the lightest mass that is kept, a bit at a time, until they hold a single
/// block, or blocks of one mass, of which the first ones complete the prefix.
#[cube]
fn heaviest(
    scratch: &mut [u32],
    row: &Row,
    rule: &Rule,
    z: usize,
    target: u32,
    bits: u32,
    #[comptime] search: Search,
    #[comptime] shape: RuleShape,
) -> Prefix {
    let start = row.start + z * row.stride;
    let step = comptime!(shape.lanes as usize);
    // Of the blocks not lighter than `lightest`, and of those beyond the upper bound.
    let mut kept = row.causal as u32;
    if comptime!(search == Search::Free || search == Search::Chosen) {
        kept = above(scratch, row, rule, start, 0u32, search, shape).extract(1usize);
    }
    let mut heavier = 0u32;
    let mut beyond = 0u32;
    let mut lightest = 0u32;
    let mut bit = bits;
    while bit > 0u32 && kept > beyond + 1u32 {
        bit -= 1u32;
        let bound = lightest | (1u32 << bit);
        let found = above(scratch, row, rule, start, bound, search, shape);
        let sum = found.extract(0usize);
        let count = found.extract(1usize);
        if sum >= target {
            lightest = bound;
            kept = count;
        } else {
            heavier = sum;
            beyond = count;
        }
    }
    let tied = kept - beyond;
    let mut last = row.causal;
    if tied > 1u32 {
        let missing = target - heavier.min(target);
        let each = if comptime!(search == Search::Mass) { lightest } else { 1u32.runtime() };
        // Weightless blocks never reach a target: all of them stay.
        let wanted = select(each == 0u32, tied, missing.div_ceil(each.max(1u32)));
        if wanted < tied {
            // The index of the tied block number `wanted`.
            let mut low = 0usize;
            let mut high = row.causal;
            while low < high {
                let middle = (low + high) / 2;
                let mut count = 0u32;
                let mut v = row.lane;
                while v <= middle {
                    let x = scratch[start + v];
                    let mass = x & comptime!(SELECTED - 1);
                    let part = takes_part(rule, row, v, x, search);
                    count += select(part && mass == lightest, 1u32, 0u32);
                    v += step;
                }
                if sum(count, shape) >= wanted {
                    high = middle;
                } else {
                    low = middle + 1;
                }
            }
            last = low;
        }
    }
    // No mass is as heavy as u32::MAX: a target of 0 keeps nothing.
    let mut prefix = Prefix::new(last as u32);
    prefix.insert(0usize, select(target == 0u32, u32::MAX, lightest));
    prefix
}

/// Sum and number of the blocks that weigh at least `bound`.
#[cube]
fn above(
    scratch: &mut [u32],
    row: &Row,
    rule: &Rule,
    start: usize,
    bound: u32,
    #[comptime] search: Search,
    #[comptime] shape: RuleShape,
) -> Vector<u32, Const<2>> {
    let mut mass_above = 0u32;
    let mut count = 0u32;
    let mut v = row.lane;
    let step = comptime!(shape.lanes as usize);
    let by_mass = comptime!(search == Search::Mass);
    if comptime!(search == Search::Mass || search == Search::Count) {
        // Four independent reads at once.
        while v + 3 * step < row.causal {
            #[unroll]
            for i in 0..4usize {
                let x = scratch[start + v + i * step];
                let counts = x >= bound;
                count += select(counts, 1u32, 0u32);
                if comptime!(by_mass) {
                    mass_above += select(counts, x, 0u32);
                }
            }
            v += 4 * step;
        }
    }
    while v < row.causal {
        let x = scratch[start + v];
        let mass = x & comptime!(SELECTED - 1);
        let counts = mass >= bound && takes_part(rule, row, v, x, search);
        count += select(counts, 1u32, 0u32);
        if comptime!(by_mass) {
            mass_above += select(counts, x, 0u32);
        }
        v += step;
    }
    let count = sum(count, shape);
    let mut found = Vector::<u32, Const<2>>::new(count);
    if comptime!(search == Search::Mass) {
        found.insert(0usize, sum(mass_above, shape));
    }
    found
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

/// The selection of one row, ready to be asked block by block.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Selected {
    high: Prefix,
    low: Prefix,
    extra: Prefix,
    /// 0: as the bands say. 1: filled up by `extra`. 2: cut to `extra` and the forced blocks.
    change: u32,
}

/// Selects the blocks of a row from its masses, which need `bits` bits in each band. Units that
/// work the row must meet before they ask for blocks that another lane wrote.
#[cube]
pub(crate) fn select_row(
    scratch: &mut [u32],
    row: &Row,
    rule: &Rule,
    bits: Vector<u32, Const<2>>,
    #[comptime] shape: RuleShape,
) -> Selected {
    let search = comptime!(if shape.by_mass { Search::Mass } else { Search::Count });
    let first = bits.extract(0usize);
    let high = heaviest(scratch, row, rule, 0usize, rule.budget, first, search, shape);
    let mut low = high;
    if comptime!(shape.bands == 2) {
        let second = bits.extract(1usize);
        low = heaviest(scratch, row, rule, 1usize, rule.budget, second, search, shape);
    }
    let mut extra = high;
    let mut change = 0u32;
    if comptime!(shape.fill || shape.cut) {
        // The heavier of the bands, marked if selected, in place of the first band.
        let step = comptime!(shape.lanes as usize);
        let mut selected = 0u32;
        let mut fixed = 0u32;
        let mut v = row.lane;
        while v < row.causal {
            let mass = scratch[row.start + v];
            let mut best = mass;
            let mut kept = holds(high, mass, v);
            if comptime!(shape.bands == 2) {
                let other = scratch[row.start + row.stride + v];
                best = best.max(other);
                kept = kept || holds(low, other, v);
            }
            let must = forced(rule, row, v);
            kept = kept || must;
            selected += select(kept, 1u32, 0u32);
            fixed += select(must, 1u32, 0u32);
            scratch[row.start + v] = best | select(kept, SELECTED, 0u32);
            v += step;
        }
        let selected = sum(selected, shape);
        let fixed = sum(fixed, shape);
        if comptime!(shape.fill) {
            if selected < rule.min_blocks {
                let lacking = rule.min_blocks - selected;
                extra = heaviest(scratch, row, rule, 0usize, lacking, 31u32, Search::Free, shape);
                change = 1u32;
            }
        }
        if comptime!(shape.cut) {
            if selected > rule.max_blocks {
                let room = rule.max_blocks - fixed.min(rule.max_blocks);
                extra = heaviest(scratch, row, rule, 0usize, room, 31u32, Search::Chosen, shape);
                change = 2u32;
            }
        }
    }
    Selected { high, low, extra, change }
}

#[cube]
impl Selected {
    /// Whether the row reads block `v`.
    pub fn reads(
        &self,
        scratch: &mut [u32],
        row: &Row,
        rule: &Rule,
        v: usize,
        #[comptime] shape: RuleShape,
    ) -> bool {
        let x = scratch[row.start + v];
        let must = forced(rule, row, v);
        if comptime!(shape.fill || shape.cut) {
            let kept = x >= SELECTED;
            let mass = x & comptime!(SELECTED - 1);
            let filled = kept || (self.change == 1u32 && holds(self.extra, mass, v));
            let stays = must || (kept && holds(self.extra, mass, v));
            select(self.change == 2u32, stays, filled)
        } else {
            let mut kept = holds(self.high, x, v) || must;
            if comptime!(shape.bands == 2) {
                kept = kept || holds(self.low, scratch[row.start + row.stride + v], v);
            }
            kept
        }
    }
}
