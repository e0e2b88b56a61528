//! The selection rule on the device: from the integer masses of a row to its bits, equal bit for
//! bit to [`prism_core::SelectionRule::select_row`].
//!
//! A row is worked by `lanes` units together (a plane) or by one. Nothing is sorted: bounds close
//! in on the lightest mass that is kept, since the sum of the masses not lighter than a bound only
//! falls as the bound rises. Integer sums don't depend on the order of the lanes.

use cubecl::prelude::*;
use prism_core::{Budget, SelectionRule};

use super::search::{Prefixes, SELECTED, Search, forced, heaviest};
use crate::fixed::{Normaliser, Total, usable, weight};

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

/// Where a row's masses lie, in vectors of neighbouring blocks: band `z` at `start + z · stride`.
/// Blocks past the causal ones, in the last vector, hold scores of −∞ and so masses of 0.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Row {
    pub start: usize,
    pub stride: usize,
    /// Causal blocks.
    pub causal: usize,
    /// Place of this unit among those that work the row.
    pub lane: usize,
}

/// A number for each band.
pub(crate) type Pair = Vector<u32, Const<2>>;

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

/// A score as [`to_masses`] takes it.
#[cube]
pub(crate) fn score_bits(score: f32) -> u32 {
    u32::reinterpret(usable(score))
}

/// Turns the scores of the first `bands` bands, as [`score_bits`] leaves them, into masses that sum
/// to 2³⁰ each, in place. Returns the heaviest mass of each. Bands are worked side by side, so that
/// one's arithmetic hides the other's latency.
#[cube]
pub(crate) fn to_masses<S: Size>(
    scratch: &mut [Vector<u32, S>],
    row: &Row,
    #[comptime] bands: usize,
    #[comptime] shape: RuleShape,
) -> Pair {
    let step = comptime!(shape.lanes as usize);
    let width = S::value();
    let vectors = row.causal.div_ceil(width);
    let mut max = Vector::<f32, Const<2>>::new(f32::reinterpret(0xff80_0000u32));
    let mut i = row.lane;
    while i < vectors {
        #[unroll]
        for z in 0..bands {
            let scores = scratch[row.start + z * row.stride + i];
            #[unroll]
            for e in 0..width {
                max.insert(z, max.extract(z).max(f32::reinterpret(scores.extract(e))));
            }
        }
        i += step;
    }
    if comptime!(shape.lanes > 1) {
        #[unroll]
        for z in 0..bands {
            max.insert(z, plane_max(max.extract(z)));
        }
    }
    let mut high = Pair::new(0u32);
    let mut low = Pair::new(0u32);
    let mut i = row.lane;
    while i < vectors {
        #[unroll]
        for z in 0..bands {
            let place = row.start + z * row.stride + i;
            let highest = max.extract(z);
            let silent = u32::reinterpret(highest) == 0xff80_0000u32;
            let scores = scratch[place];
            let mut weights = Vector::<u32, S>::new(0u32);
            #[unroll]
            for e in 0..width {
                let score = f32::reinterpret(scores.extract(e));
                let w = select(silent, 0u32, weight(highest - score));
                high.insert(z, high.extract(z) + (w >> 16u32));
                low.insert(z, low.extract(z) + (w & 0xffffu32));
                weights.insert(e, w);
            }
            scratch[place] = weights;
        }
        i += step;
    }
    let mut heaviest = Pair::new(0u32);
    let mut reciprocal = Pair::new(0u32);
    let mut shift = Pair::new(0u32);
    #[unroll]
    for z in 0..bands {
        let total = Total { high: sum(high.extract(z), shape), low: sum(low.extract(z), shape) };
        let normaliser = total.normaliser();
        reciprocal.insert(z, normaliser.reciprocal);
        shift.insert(z, normaliser.shift);
        heaviest.insert(z, normaliser.mass(1u32 << 30u32));
    }
    let mut i = row.lane;
    while i < vectors {
        #[unroll]
        for z in 0..bands {
            let place = row.start + z * row.stride + i;
            let normaliser =
                Normaliser { reciprocal: reciprocal.extract(z), shift: shift.extract(z) };
            let weights = scratch[place];
            let mut masses = Vector::<u32, S>::new(0u32);
            #[unroll]
            for e in 0..width {
                masses.insert(e, normaliser.mass(weights.extract(e)));
            }
            scratch[place] = masses;
        }
        i += step;
    }
    heaviest
}

/// The selection of one row, ready to be asked block by block.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Selected {
    bands: Prefixes,
    /// Of the heavier of the bands' masses.
    extra: Prefixes,
    /// 0: as the bands say. 1: filled up by `extra`. 2: cut to `extra` and the forced blocks.
    change: u32,
}

/// Selects the blocks of a row from its masses, none of which is heavier than `most` of its band.
/// Units that work the row must meet before they ask for blocks that another lane wrote.
#[cube]
pub(crate) fn select_row<S: Size>(
    scratch: &mut [Vector<u32, S>],
    row: &Row,
    rule: &Rule,
    most: Pair,
    #[comptime] shape: RuleShape,
) -> Selected {
    let search = comptime!(if shape.by_mass { Search::Mass } else { Search::Count });
    let count = comptime!(shape.bands as usize);
    let bands = heaviest::<S>(scratch, row, rule, rule.budget, most, count, search, shape);
    limited::<S>(scratch, row, rule, most, bands, shape)
}

/// The selection that the bands' prefixes make, within the rule's limits.
#[cube]
pub(crate) fn limited<S: Size>(
    scratch: &mut [Vector<u32, S>],
    row: &Row,
    rule: &Rule,
    most: Pair,
    bands: Prefixes,
    #[comptime] shape: RuleShape,
) -> Selected {
    let mut lightest = Pair::new(0u32);
    let mut last = Pair::new(0u32);
    let mut change = 0u32;
    if comptime!(shape.fill || shape.cut) {
        // The heavier of the bands, marked if selected, in place of the first band.
        let step = comptime!(shape.lanes as usize);
        let width = S::value();
        let mut selected = 0u32;
        let mut fixed = 0u32;
        let mut i = row.lane;
        while i < row.causal.div_ceil(width) {
            let masses = scratch[row.start + i];
            let mut marked = Vector::<u32, S>::new(0u32);
            #[unroll]
            for e in 0..width {
                let v = i * width + e;
                let mass = masses.extract(e);
                let mut best = mass;
                let mut kept = bands.holds(0usize, mass, v);
                if comptime!(shape.bands == 2) {
                    let other = scratch[row.start + row.stride + i].extract(e);
                    best = best.max(other);
                    kept = kept || bands.holds(1usize, other, v);
                }
                let there = v < row.causal;
                let must = there && forced(rule, row, v);
                kept = (there && kept) || must;
                selected += select(kept, 1u32, 0u32);
                fixed += select(must, 1u32, 0u32);
                marked.insert(e, best | select(kept, SELECTED, 0u32));
            }
            scratch[row.start + i] = marked;
            i += step;
        }
        let selected = sum(selected, shape);
        let fixed = sum(fixed, shape);
        let most = Pair::new(most.extract(0usize).max(most.extract(1usize)));
        if comptime!(shape.fill) {
            if selected < rule.min_blocks {
                let lacking = rule.min_blocks - selected;
                let found =
                    heaviest::<S>(scratch, row, rule, lacking, most, 1usize, Search::Free, shape);
                lightest = found.lightest;
                last = found.last;
                change = 1u32;
            }
        }
        if comptime!(shape.cut) {
            if selected > rule.max_blocks {
                let room = rule.max_blocks - fixed.min(rule.max_blocks);
                let found =
                    heaviest::<S>(scratch, row, rule, room, most, 1usize, Search::Chosen, shape);
                lightest = found.lightest;
                last = found.last;
                change = 2u32;
            }
        }
    }
    Selected { bands, extra: Prefixes { lightest, last }, change }
}

#[cube]
impl Selected {
    /// Whether the row reads block `v`, whose masses these are.
    pub fn reads(
        &self,
        masses: Pair,
        row: &Row,
        rule: &Rule,
        v: usize,
        #[comptime] shape: RuleShape,
    ) -> bool {
        let x = masses.extract(0usize);
        let must = forced(rule, row, v);
        if comptime!(shape.fill || shape.cut) {
            let kept = x >= SELECTED;
            let mass = x & comptime!(SELECTED - 1);
            let filled = kept || (self.change == 1u32 && self.extra.holds(0usize, mass, v));
            let stays = must || (kept && self.extra.holds(0usize, mass, v));
            select(self.change == 2u32, stays, filled)
        } else {
            let mut kept = self.bands.holds(0usize, x, v) || must;
            if comptime!(shape.bands == 2) {
                kept = kept || self.bands.holds(1usize, masses.extract(1usize), v);
            }
            kept
        }
    }
}
