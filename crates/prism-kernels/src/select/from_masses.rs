//! The selection rule on integer masses that something else has found: a plane a row, or a unit. Rows are
//! any of those of sequences on one grid.

use cubecl::prelude::*;
use cubecl::server::Handle;
use derive_new::new;
use prism_core::select::ByMass;
use prism_core::{BlockGrid, SelectionRule};

use super::rule::{Pair, Row, Rule, RuleShape, limited, sum};
use super::search::{Prefixes, Search, forced, heaviest};
use super::write::{Line, write_row};
use super::{SelectNumbers, Selection, numbers};
use crate::capabilities::Capabilities;
use crate::operand::buffer;
use crate::span::{Spans, span};
use crate::work::{cube_count, launch};

/// Rows a cube of planes.
const PLANES: u32 = 4;

/// Masses of some rows, and how they choose.
#[derive(Debug, Clone, new)]
pub struct MassesProblem<'a> {
    /// `[heads, rows, bands, blocks]` u32, each below 2³¹ and where a mass is kept those of a band together
    /// below 2³², contiguous, which are overwritten. What lies after
    /// the causal blocks of a row doesn't count.
    pub masses: &'a Handle,
    /// Those four: the heads of all sequences, 1 or 2 bands, and at least the causal blocks of the last row.
    pub shape: [usize; 4],
    /// Block grid of every sequence.
    pub grid: &'a BlockGrid,
    /// Row of the grid that is the first of these.
    pub first_row: usize,
    /// Words a row of the result.
    pub words_per_row: usize,
    /// How masses choose; two bands by the budget alone.
    pub by: ByMass,
    /// Forced blocks, limits, budget.
    pub rule: &'a SelectionRule,
    /// Whether this is a chunk of a prompt that goes on.
    pub more_follows: bool,
}

/// Selects the blocks of these rows, of every head.
pub fn select_from_masses(
    client: &Client,
    capabilities: &Capabilities,
    problem: &MassesProblem,
) -> Selection {
    let [heads, rows, bands, blocks] = problem.shape;
    let (lines, words_per_row) = (heads * rows, problem.words_per_row);
    let selection = Selection::room(client, lines, rows, words_per_row);
    if lines == 0 {
        return selection;
    }
    let (lanes, per_cube) = capabilities.lines(PLANES);
    let grids = [*problem.grid];
    let spans = Spans::new(client, &grids);
    let rule = problem.rule;
    let shape = MassesShape::new(problem, lanes, capabilities.copy_async);
    let target = match problem.by {
        ByMass::Budget | ByMass::AfterForced(None) => u32::MAX,
        ByMass::AfterForced(Some(mass)) | ByMass::Above(mass) => mass,
    };
    let numbers =
        numbers(rule, [heads, heads, 0], &grids, problem.more_follows, &spans, &selection);
    // SAFETY: planes past the last row read the first and write nothing, and each row has its own masses.
    unsafe {
        launch!(
            choose_from_masses,
            client,
            cube_count(client, lines.div_ceil(per_cube as usize)),
            CubeDim::new_2d(lanes, per_cube),
            buffer(problem.masses, lines * bands * blocks),
            buffer(&selection.words, lines * words_per_row),
            buffer(&selection.counts, lines),
            spans.arg(&selection.counts),
            numbers,
            problem.first_row,
            blocks,
            target,
            shape,
        );
    }
    selection
}

/// What the kernel is compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct MassesShape {
    block: usize,
    rule: RuleShape,
    target: Target,
}

/// What the target is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Target {
    /// The rule's.
    Budget,
    /// None: every block.
    All,
    /// A mass that forced blocks count towards.
    AfterForced,
    /// The lightest mass that is read.
    Above,
}

impl MassesShape {
    fn new(problem: &MassesProblem, lanes: u32, ptx: bool) -> Self {
        let rule = problem.rule;
        let mut shape = RuleShape::new(rule, lanes, problem.shape[2] as u32, ptx);
        let target = match problem.by {
            ByMass::Budget => Target::Budget,
            ByMass::AfterForced(None) => Target::All,
            ByMass::AfterForced(Some(_)) => Target::AfterForced,
            ByMass::Above(_) => Target::Above,
        };
        shape.by_mass |= target != Target::Budget;
        // A mass keeps at least one block, a threshold may keep none.
        shape.fill |= target == Target::Above && rule.min_blocks > 0;
        let block = problem.grid.block();
        Self { block, rule: shape, target }
    }
}

#[cube(launch_unchecked, create_dummy_kernel)]
fn choose_from_masses(
    masses: &mut [u32],
    words: &mut [u32],
    counts: &mut [u32],
    lengths: &[u32],
    numbers: SelectNumbers,
    first_row: usize,
    blocks: usize,
    target: u32,
    #[comptime] shape: MassesShape,
) {
    let bands = comptime!(shape.rule.bands as usize);
    let lanes = comptime!(shape.rule.lanes as usize);
    let at = CUBE_POS * CUBE_DIM_Y as usize + UNIT_POS_Y as usize;
    let there = at < numbers.lines;
    let line = select(there, at, 0usize);
    let row = first_row + line % numbers.rows;
    let span = span(lengths, 0usize, numbers.q_len, numbers.kv_len, false);
    let causal = select(there, span.causal_blocks(row, comptime!(shape.block)), 0usize);
    let dense = numbers.dense(&span, row, comptime!(shape.block));
    let place = Row {
        start: line * bands * blocks,
        stride: blocks,
        causal: select(dense, 0usize, causal),
        lane: UNIT_POS_X as usize,
    };
    let scratch = masses.as_vectorized_mut();
    let kept = kept(scratch, &place, &numbers.rule(), target, shape);
    let rule = numbers.rule();
    let selected =
        limited::<Const<1>>(scratch, &place, &rule, kept.most, kept.bands, comptime!(shape.rule));
    if comptime!(lanes > 1) {
        // Lanes read each other's masses from here on.
        sync_cube();
    }
    if there {
        let line = Line { index: line, words_per_row: numbers.words_per_row, causal, dense };
        let shape = comptime!(shape.rule);
        write_row::<Const<1>>(words, counts, scratch, &line, &place, &rule, &selected, shape);
    }
}

/// What the masses of a row keep before limits.
#[derive(CubeType, Clone, Copy)]
struct Kept {
    bands: Prefixes,
    /// The heaviest mass of each band.
    most: Pair,
}

#[cube]
fn kept(
    masses: &mut [Vector<u32, Const<1>>],
    row: &Row,
    rule: &Rule,
    target: u32,
    #[comptime] shape: MassesShape,
) -> Kept {
    let bands = comptime!(shape.rule.bands as usize);
    let lanes = comptime!(shape.rule.lanes as usize);
    let mut most = Pair::new(0u32);
    let mut held = 0u32;
    let mut v = row.lane;
    while v < row.causal {
        #[unroll]
        for z in 0..bands {
            let at = row.start + z * row.stride + v;
            let mut mass = masses[at].extract(0usize);
            if comptime!(shape.target == Target::AfterForced) {
                // What is read anyway takes no part in the search.
                if forced(rule, row, v) {
                    held += mass;
                    mass = 0u32;
                    masses[at] = Vector::new(0u32);
                }
            }
            most.insert(z, most.extract(z).max(mass));
        }
        v += lanes;
    }
    if comptime!(lanes > 1) {
        #[unroll]
        for z in 0..bands {
            most.insert(z, plane_max(most.extract(z)));
        }
    }
    if comptime!(shape.target == Target::Above) {
        let none = most.extract(0usize) < target && rule.sinks == 0usize && rule.recents == 0usize;
        if none && rule.min_blocks == 0u32 && row.causal > 0 {
            let diagonal = row.causal - 1;
            if diagonal % lanes == row.lane {
                masses[row.start + diagonal] = Vector::new(target);
            }
            most = Pair::new(target);
        }
        let last = Pair::new(row.causal as u32);
        Kept { bands: Prefixes { lightest: Pair::new(target), last }, most }
    } else {
        let mut target = target;
        if comptime!(shape.target == Target::Budget) {
            target = rule.budget;
        }
        if comptime!(shape.target == Target::AfterForced) {
            let held = sum(held, comptime!(shape.rule));
            target -= held.min(target);
        }
        let search = comptime!(if shape.rule.by_mass { Search::Mass } else { Search::Count });
        let rule_shape = comptime!(shape.rule);
        let bands =
            heaviest::<Const<1>>(masses, row, rule, target, most, bands, search, rule_shape);
        Kept { bands, most }
    }
}
