//! The selection rule of [`prism_core::select`] for all rows of all heads at once.

use std::ops::Range;

use burn::backend::Backend;
use burn::backend::tensor::{Device, FloatTensor, IntTensor};
use prism_core::scores::SILENT_RMS;
use prism_core::select::MASS_ONE;
use prism_core::selection::WORD_BITS;
use prism_core::{BlockGrid, Budget, Calibration};

use super::tensor::{Bool, Float, Int};
use super::{TILE, runs, steps};
use crate::ops::SelectParams;

/// Selection from pooled Q `[batch, q_heads, rows, head_dim]`, pooled K
/// `[batch, kv_heads, key_blocks, head_dim]` and the energy of earlier query blocks
/// `[batch, q_heads, 4]`: words `[batch, q_heads, rows, ceil(key_blocks / 32)]` and counts
/// `[batch, q_heads, rows]`.
pub fn select<B: Backend>(
    pooled_q: FloatTensor<B>,
    pooled_k: FloatTensor<B>,
    history: FloatTensor<B>,
    params: &SelectParams,
) -> (IntTensor<B>, IntTensor<B>) {
    let (q, k) = (Float::<B>(pooled_q), Float::<B>(pooled_k));
    let history = Float::<B>(history);
    let device = q.device();
    let [batch, heads, rows, _] = q.dims();
    let width = k.dims::<4>()[2].div_ceil(WORD_BITS);
    let (mut words, mut counts) = (Vec::new(), Vec::new());
    for (sequences, grid) in runs(&params.grids) {
        let batch = sequences.len();
        let of = |x: &Float<B>| x.clone().slice(0, sequences.clone());
        let (some_words, some_counts) = if grid.rows() == 0 {
            (Vec::new(), Vec::new())
        } else {
            let per_row = batch * heads * grid.key_blocks();
            let heads = Heads::new(of(&q), of(&k), of(&history), grid, params);
            steps(grid.rows(), (TILE / per_row).max(1))
                .map(|rows| pack(heads.select(rows), width))
                .unzip()
        };
        let dims = |last| [batch, heads, rows, last];
        words.push(Int::join(some_words, 2, dims(width), 0, &device));
        counts.push(Int::join(some_counts, 2, dims(1), 0, &device));
    }
    let words = Int::join(words, 0, [batch, heads, rows, width], 0, &device);
    let counts = Int::join(counts, 0, [batch, heads, rows, 1], 0, &device);
    (words.0, counts.reshape([batch, heads, rows]).0)
}

/// The heads of some sequences on one grid.
struct Heads<'a, B: Backend> {
    /// Of each band: queries over √d · τ `[batch, q_heads, rows, dims]` and transposed keys
    /// `[batch, kv_heads, dims, key_blocks]`.
    bands: Vec<(Float<B>, Float<B>)>,
    batch: usize,
    heads: usize,
    device: Device<B>,
    grid: &'a BlockGrid,
    params: &'a SelectParams,
}

impl<'a, B: Backend> Heads<'a, B> {
    fn new(
        q: Float<B>,
        k: Float<B>,
        history: Float<B>,
        grid: &'a BlockGrid,
        params: &'a SelectParams,
    ) -> Self {
        let device = q.device();
        let [batch, heads, ..] = q.dims::<4>();
        let q = q.slice(2, 0..grid.rows());
        let k = k.slice(2, 0..grid.key_blocks());
        let energies = match params.calibration {
            Calibration::Off => None,
            calibration => {
                let history = history.reshape([batch, heads, 1, 4]);
                let (q_energy, k_energy) = (energy(&q, params), energy(&k, params));
                let (q_energy, k_energy) = if calibration == Calibration::Causal {
                    let diagonals = grid.first_block()..grid.key_blocks();
                    (q_energy.cumsum(2), k_energy.cumsum(2).slice(2, diagonals))
                } else {
                    (q_energy.sum(2), k_energy.sum(2))
                };
                Some((q_energy + history, repeat_heads(k_energy, heads)))
            }
        };
        let all_bands = [params.bands.high(), params.bands.low()];
        let bands = (0..2).filter(|&z| !all_bands[z].is_empty()).map(|z| {
            let dims = all_bands[z];
            let indices = Int::from_list(dims.iter().map(|&c| c as i32).collect(), &device);
            let k = k.clone().select(3, indices.clone()).transpose();
            let q = q.clone().select(3, indices) * (1.0 / (dims.len() as f32).sqrt());
            match &energies {
                None => (q, k),
                Some((q_energy, k_energy)) => {
                    let share = dims.len() as f32 / params.bands.head_dim() as f32;
                    let tau =
                        ratio(q_energy, z, params) * ratio(k_energy, z, params) * share.sqrt();
                    let tau = tau.clone().fill(&!tau.gt(0.0), 1.0);
                    (q / tau, k)
                }
            }
        });
        Self { bands: bands.collect(), batch, heads, device, grid, params }
    }

    /// The blocks that some rows read, `[batch, q_heads, rows, blocks]`; `blocks` are those that
    /// the last of the rows may read.
    fn select(&self, rows: Range<usize>) -> Bool<B> {
        let rule = &self.params.rule;
        let first = self.grid.first_block();
        let blocks = self.grid.causal_blocks(rows.end - 1);
        let number = |n: usize| Int::<B>::full([1, 1, 1, 1], saturate(n), &self.device);
        let dims = [self.batch, self.heads, rows.len(), blocks];
        let v = Int::range(0..blocks, &self.device).reshape([1, 1, 1, blocks]);
        let u = Int::range(rows.start + first..rows.end + first, &self.device);
        let age = u.reshape([1, 1, rows.len(), 1]) - v.clone();
        let future = age.below(0);
        let sink = v.below(saturate(rule.sink_blocks));
        let recent = age.below(saturate(rule.recent_blocks));
        let forced = (sink | recent) & !future.clone();

        let one = Int::full(dims, 1, &self.device);
        let mut selected = forced.clone().expand(dims);
        let mut best = Int::full(dims, -1, &self.device);
        for (q, k) in &self.bands {
            let q = q.clone().slice(2, rows.clone());
            let masses = masses(scores(q, k.clone().slice(3, 0..blocks)), &future);
            let kept = match (rule.budget, rule.target()) {
                (Budget::TopK(k), _) => heaviest(&masses, &one, &number(k)),
                (Budget::Mass(_), Some(mass)) => heaviest(&masses, &masses, &number(mass as usize)),
                (Budget::Mass(_), None) => !future.clone(),
            };
            selected = selected | kept;
            best = best.max(masses);
        }

        // Each band keeps at least one block.
        if rule.min_blocks > 1 {
            let lacking = number(rule.min_blocks) - selected.clone().int().sum(3);
            let free = best.clone().fill(&selected, -1);
            selected = selected | heaviest(&free, &one, &lacking.at_least(0));
        }
        if let Some(max) = rule.max_blocks {
            let room = number(max) - forced.clone().int().sum(3);
            let chosen = best.fill(&(forced.clone() | !selected), -1);
            selected = forced | heaviest(&chosen, &one, &room.at_least(0));
        }
        let dense = match self.params.more_follows {
            true => 0,
            false => rule.dense_last_blocks.min(self.grid.rows()),
        };
        let dense_from = self.grid.rows() - dense;
        if rows.end > dense_from {
            let count = rows.len();
            let row = Int::range(rows, &self.device).reshape([1, 1, count, 1]);
            selected = selected | !(future | row.below(saturate(dense_from)));
        }
        selected
    }
}

/// Energies of pooled vectors as [`prism_core::scores::BandEnergy`] counts them,
/// `[batch, heads, blocks, 4]`: high, low, all, blocks. Vectors that aren't finite count nothing.
fn energy<B: Backend>(x: &Float<B>, params: &SelectParams) -> Float<B> {
    let device = x.device();
    let squares = x.clone() * x.clone();
    let usable = squares.clone().sum(3).le(f32::MAX);
    let squares = squares.fill(&!usable.clone(), 0.0);
    let within = |dims: &[usize]| {
        let mut mask = vec![0.0; params.bands.head_dim()];
        dims.iter().for_each(|&c| mask[c] = 1.0);
        let len = mask.len();
        let mask = Float::from_list(mask, &device).reshape([1, 1, 1, len]);
        (squares.clone() * mask).sum(3)
    };
    let (high, low) = (within(params.bands.high()), within(params.bands.low()));
    let [batch, heads, blocks, _] = x.dims();
    let columns = vec![high, low, squares.clone().sum(3), usable.float()];
    Float::join(columns, 3, [batch, heads, blocks, 4], 0.0, &device)
}

/// RMS of band `z` over RMS of all dims.
fn ratio<B: Backend>(energy: &Float<B>, z: usize, params: &SelectParams) -> Float<B> {
    let column = |c: usize| energy.clone().slice(3, c..c + 1);
    let rms = |c: usize, dims: usize| (column(c) / (column(3) * dims as f32).at_least(1.0)).sqrt();
    let dims = [params.bands.high().len(), params.bands.low().len()][z];
    rms(z, dims) / rms(2, params.bands.head_dim()).at_least(SILENT_RMS as f32)
}

/// `[batch, kv_heads, n, 4]` for each query head, `[batch, heads, n, 4]`.
fn repeat_heads<B: Backend>(x: Float<B>, heads: usize) -> Float<B> {
    let [batch, kv_heads, n, columns] = x.dims();
    x.reshape([batch, kv_heads, 1, n * columns])
        .expand([batch, kv_heads, heads / kv_heads, n * columns])
        .reshape([batch, heads, n, columns])
}

/// Scores `[batch, q_heads, rows, blocks]`, without repeating the keys of a group of heads.
fn scores<B: Backend>(q: Float<B>, k: Float<B>) -> Float<B> {
    let [batch, heads, rows, dims] = q.dims();
    let [_, kv_heads, _, blocks] = k.dims();
    q.reshape([batch, kv_heads, heads / kv_heads * rows, dims])
        .matmul(k)
        .reshape([batch, heads, rows, blocks])
}

/// Softmax of scores as integers, as [`prism_core::masses::integer_masses`] up to rounding; −1
/// where `future`.
///
/// In floats: Burn's ints have no 64-bit products on every backend. A mass is off by up to about
/// 1e-6 of it, hence only blocks that close to the budget's edge may come out otherwise than in the
/// native implementations.
fn masses<B: Backend>(scores: Float<B>, future: &Bool<B>) -> Int<B> {
    let unusable = scores.is_nan() | future.clone();
    let scores = scores.fill(&unusable, f32::NEG_INFINITY).at_most(f32::MAX);
    let max = scores.clone().max(3);
    let max = max.clone().fill(&max.eq(f32::NEG_INFINITY), 0.0);
    let weights = (scores - max).exp();
    let total = weights.clone().sum(3).at_least(1.0);
    (weights / total * MASS_ONE as f32).round().fill(future, -1)
}

/// The smallest prefix of the blocks, by (mass descending, index ascending), whose weights add up
/// to `target`; every block if they don't. Blocks of negative mass take no part.
///
/// The lightest mass of the prefix is found bit by bit; of the blocks that have just this mass,
/// the first ones complete the prefix.
fn heaviest<B: Backend>(masses: &Int<B>, weights: &Int<B>, target: &Int<B>) -> Bool<B> {
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
    let before = tied_weights.clone().cumsum(3) - tied_weights;
    heavier | (tied & before.lt(&missing))
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
