//! From masses of blocks to a selection, in tensor ops: the rule of [`prism_core::select`] for all rows of
//! all heads at once.

use burn::backend::Backend;
use burn::backend::tensor::IntTensor;
use prism_core::Budget;
use prism_core::select::ByMass;
use prism_core::selection::WORD_BITS;

use super::tensor::{Bool, Int};
use crate::ops::{ChooseParams, Prefix};

/// Words `[batch, q_heads, rows, words_per_row]` and counts `[batch, q_heads, rows, 1]` from masses
/// `[batch, q_heads, rows, bands · blocks]`; the blocks end with those that the last row may read.
pub fn choose<B: Backend>(
    masses: IntTensor<B>,
    params: &ChooseParams,
) -> (IntTensor<B>, IntTensor<B>) {
    let (words, counts) = pack(selected::<B>(&Int(masses), params), params.words_per_row);
    (words.0, counts.0)
}

/// The blocks that the rows read, `[batch, q_heads, rows, blocks]`.
fn selected<B: Backend>(masses: &Int<B>, params: &ChooseParams) -> Bool<B> {
    let ChooseParams { grid, rows, bands, by, rule, more_follows, .. } = params;
    let device = &masses.device();
    let [batch, heads, count, all] = masses.dims();
    let (first, blocks) = (grid.first_block(), all / bands);
    let number = |n: usize| Int::<B>::full([1, 1, 1, 1], saturate(n), device);
    let dims = [batch, heads, count, blocks];
    let v = Int::range(0..blocks, device).reshape([1, 1, 1, blocks]);
    let u = Int::range(rows.start + first..rows.end + first, device);
    let age = u.reshape([1, 1, count, 1]) - v.clone();
    let future = age.below(0);
    let sink = v.below(saturate(rule.sink_blocks));
    let recent = age.below(saturate(rule.recent_blocks));
    let forced = (sink | recent) & !future.clone();

    let one = Int::full(dims, 1, device);
    let mut selected = forced.clone().expand(dims);
    let mut best = Int::full(dims, -1, device);
    for z in 0..*bands {
        let masses = masses.clone().slice(3, z * blocks..(z + 1) * blocks).fill(&future, -1);
        let kept = match (by, rule.budget, rule.target()) {
            (ByMass::Budget, Budget::TopK(k), _) => heaviest(&masses, &one, &number(k)),
            (ByMass::Budget, Budget::Mass(_), Some(mass)) => {
                heaviest(&masses, &masses, &number(mass as usize))
            }
            (ByMass::Budget, Budget::Mass(_), None) | (ByMass::AfterForced(None), ..) => {
                !future.clone()
            }
            (ByMass::AfterForced(Some(target)), ..) => {
                let held = masses.clone().fill(&!forced.clone().expand(dims), 0).sum(3);
                let free = masses.clone().fill(&forced, -1);
                heaviest(&free, &free, &(number(*target as usize) - held))
            }
            (ByMass::Above(least), ..) => !masses.below(saturate(*least as usize)),
        };
        selected = selected | kept;
        best = best.max(masses);
    }

    // But for thresholds a row has at least one block.
    let may_lack = matches!(by, ByMass::Above(_));
    if rule.min_blocks > 1 || may_lack && rule.min_blocks > 0 {
        let lacking = number(rule.min_blocks) - selected.clone().int().sum(3);
        let free = best.clone().fill(&selected, -1);
        selected = selected | heaviest(&free, &one, &lacking.at_least(0));
    }
    if let Some(max) = rule.max_blocks {
        let room = number(max) - forced.clone().int().sum(3);
        let chosen = best.fill(&(forced.clone() | !selected), -1);
        selected = forced | heaviest(&chosen, &one, &room.at_least(0));
    }
    if may_lack {
        let none = selected.clone().int().sum(3).is(0);
        selected = selected | (none & age.is(0));
    }
    let dense = if *more_follows { 0 } else { rule.dense_last_blocks.min(grid.rows()) };
    let dense_from = grid.rows() - dense;
    if rows.end > dense_from {
        let row = Int::range(rows.clone(), device).reshape([1, 1, count, 1]);
        selected = selected | !(future | row.below(saturate(dense_from)));
    }
    selected
}

/// The heaviest elements of each row, 1 for each of them; see
/// [`prism_heaviest`](crate::ops::PrismBackend::prism_heaviest).
pub fn heaviest_prefix<B: Backend>(
    masses: IntTensor<B>,
    limits: IntTensor<B>,
    prefix: Prefix,
) -> IntTensor<B> {
    let (masses, limits) = (Int::<B>(masses), Int(limits));
    let kept = match prefix {
        Prefix::Reaching => heaviest(&masses, &masses, &limits),
        Prefix::Count => {
            let one = Int::full(masses.dims::<4>(), 1, &masses.device());
            heaviest(&masses, &one, &limits)
        }
        Prefix::Within => {
            // Lighter ones than the first that is too much take no part.
            let Edge { heavier, tied, tied_weights, missing } =
                edge(&masses, &masses, &(limits + 1));
            heavier | (tied & tied_weights.cumsum().lt(&missing))
        }
    };
    kept.int().0
}

/// The smallest prefix of the blocks, by (mass descending, index ascending), whose weights add up
/// to `target`; every block if they don't. Blocks of negative mass take no part.
fn heaviest<B: Backend>(masses: &Int<B>, weights: &Int<B>, target: &Int<B>) -> Bool<B> {
    let Edge { heavier, tied, tied_weights, missing } = edge(masses, weights, target);
    let before = tied_weights.clone().cumsum() - tied_weights;
    heavier | (tied & before.lt(&missing))
}

/// Where a prefix ends.
struct Edge<B: Backend> {
    /// Blocks before those of its lightest mass, which don't reach the target.
    heavier: Bool<B>,
    /// Blocks of its lightest mass.
    tied: Bool<B>,
    /// Their weights, 0 elsewhere.
    tied_weights: Int<B>,
    /// What is missing of the target before them.
    missing: Int<B>,
}

/// The lightest mass of the prefix is found bit by bit; of the blocks that have just this mass,
/// the first ones complete the prefix.
fn edge<B: Backend>(masses: &Int<B>, weights: &Int<B>, target: &Int<B>) -> Edge<B> {
    let [batch, heads, rows, _] = masses.dims();
    let mut lightest = Int::full([batch, heads, rows, 1], 0, &masses.device());
    for bit in (0..31).rev() {
        let next = lightest.clone() + (1 << bit);
        let above = weights.clone().fill(&masses.lt(&next), 0).sum(3);
        lightest = lightest + above.ge(target).int() * (1 << bit);
    }
    let (heavier, tied) = (masses.gt(&lightest), masses.eq(&lightest));
    let missing = target.clone() - weights.clone().fill(&!heavier.clone(), 0).sum(3);
    let tied_weights = weights.clone().fill(&!tied.clone(), 0);
    Edge { heavier, tied, tied_weights, missing }
}

/// Bits `[batch, heads, rows, blocks]` as words `[batch, heads, rows, width]` and counts
/// `[batch, heads, rows, 1]`.
fn pack<B: Backend>(selected: Bool<B>, width: usize) -> (Int<B>, Int<B>) {
    let device = selected.device();
    let [batch, heads, rows, _] = selected.dims();
    let ones = selected.int();
    let dims = [batch, heads, rows, width * WORD_BITS];
    let words = Int::join(vec![ones.clone()], 3, dims, 0, &device)
        .reshape([batch, heads, rows, width, WORD_BITS]);
    let bits = Int::bits(&device).reshape([1, 1, 1, 1, WORD_BITS]);
    let words = (words * bits).sum(4);
    (words.reshape([batch, heads, rows, width]), ones.sum(3))
}

fn saturate(n: usize) -> i32 {
    i32::try_from(n).unwrap_or(i32::MAX)
}
