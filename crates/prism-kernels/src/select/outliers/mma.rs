//! Sums on tensor cores. Query sub-blocks are the rows of `mma.sync` m16n8k16, key sub-blocks the
//! columns. A warp keeps its queries in registers and walks along the keys; the warps of a cube walk
//! side by side, so that what one reads the others find in the first-level cache.
//!
//! Operands are sums of two f16 [`halves`](crate::select::halves): q·k = h·h + (h·l + l·h), but for
//! l·l, which is below f32's own rounding. In Σ q² var the upper halves will do: no term is negative and
//! each is rounded four times to 11 bits, so that the variance is right to 2⁻⁹ of itself; on random
//! numbers to 1·10⁻⁴ (rms, all dims alike) or 4·10⁻⁴ (few dims that dominate). A score that isn't finite
//! counts for nothing.

use cubecl::cmma::{MatrixIdent, MmaDefinition};
use cubecl::prelude::*;
use half::f16;

use super::terms::{Factors, FactorsLaunch, cloud};
use super::{HostRun, Launch, OutliersProblem, OutliersShape, Parts, Run};
use crate::attend::softmax::nothing;
use crate::capabilities::Capabilities;
use crate::fixed::usable;
use crate::operand::buffer;
use crate::select::SelectNumbers;
use crate::select::halves::{Split, split};
use crate::select::log_sum::{log_sum, reference};
use crate::span::span;
use crate::special::{exp2, log2};
use crate::work::{cube_count, launch};

/// Warps a cube.
const WARPS: usize = 8;
/// Dims that a warp multiplies at once. A lane's four lie side by side, as
/// [`select::mma`](crate::select::mma) says.
const DIMS: usize = 16;
/// Tiles of 8 key sub-blocks that a warp scores at once.
const KEY_TILES: usize = 2;
/// Key sub-blocks that a cube scores: few enough for short rows to occupy the device, and for cubes to
/// be of one length.
const KEYS: usize = 256;
/// A power of two on queries before they are squared, which keeps their squares within f16.
const SHRINK: f32 = 1.0 / 256.0;

/// What the kernel is compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct MmaShape {
    parts: OutliersShape,
    /// Tiles of 16 query sub-blocks a warp: each key that is read serves them all.
    tiles: usize,
}

impl MmaShape {
    fn new(parts: OutliersShape) -> Self {
        // What a lane's registers hold of the queries.
        Self { parts, tiles: if parts.dim <= 128 { 2 } else { 1 } }
    }

    /// Query sub-blocks a warp.
    fn rows(&self) -> usize {
        self.tiles * 16
    }

    /// Steps along head_dim.
    fn steps(&self) -> usize {
        self.parts.dim / DIMS
    }
}

/// Whether the kernel runs a problem.
pub(super) fn runs(capabilities: &Capabilities, problem: &OutliersProblem) -> bool {
    let [.., dim] = problem.q.shape;
    // A block's columns lie in one tile, in lanes of two columns each. What comes of CubeCL's LLVM
    // compiler, which has no asynchronous copies, has not been checked.
    let per_block = problem.block() / problem.subs[1];
    capabilities.mma_f16
        && capabilities.copy_async
        && dim % DIMS == 0
        && dim <= 256
        && [2, 4, 8].contains(&per_block)
        && WARPS * 32 <= capabilities.units as usize
}

/// Sub-blocks as tensor cores take them.
pub(super) struct Splits {
    queries: Split,
    means: Split,
    variances: Split,
    outliers: Split,
}

impl Splits {
    /// Splits all of them.
    pub fn new(client: &Client, parts: &Parts) -> Self {
        let sizes = parts.sizes;
        let keys = |x| split(client, x, [sizes.k_heads, sizes.k_subs], sizes.dim);
        Self {
            queries: split(client, &parts.q_means, [sizes.q_heads, sizes.q_subs], sizes.dim),
            means: keys(&parts.means),
            variances: keys(&parts.variances),
            outliers: keys(&parts.outliers),
        }
    }
}

/// Scores the rows of a run.
pub(super) fn score(launch: &Launch, splits: &Splits, run: &HostRun, shape: OutliersShape) {
    let Launch { client, parts, .. } = launch;
    let sizes = parts.sizes;
    let (lines, shape) = (run.lines(shape), MmaShape::new(shape));
    let tiles = (lines / run.heads).div_ceil(WARPS * shape.rows());
    let cubes = run.heads * tiles * sizes.k_subs.div_ceil(KEYS);
    let (q_lines, k_lines) = (sizes.q_heads * sizes.q_subs, sizes.k_heads * sizes.k_subs);
    let halves = |split: &Split, lines: usize| buffer(&split.halves, lines * sizes.dim / 4);
    // SAFETY: cubes past the last tile return, queries and keys past the last are read as the last,
    // and only sums of query sub-blocks and key blocks of the run are written.
    unsafe {
        launch!(
            outlier_sums_mma,
            client,
            cube_count(client, cubes),
            CubeDim::new_2d(32, WARPS as u32),
            halves(&splits.queries, q_lines),
            buffer(&splits.queries.inverses, q_lines),
            halves(&splits.means, k_lines),
            buffer(&splits.means.inverses, k_lines),
            halves(&splits.variances, k_lines),
            buffer(&splits.variances.inverses, k_lines),
            halves(&splits.outliers, k_lines),
            buffer(&splits.outliers.inverses, k_lines),
            buffer(&parts.positions, k_lines),
            buffer(&launch.sums, lines * sizes.key_blocks),
            launch.spans.arg(&launch.selection.counts),
            launch.numbers(),
            launch.run(run),
            FactorsLaunch::of(launch.problem.scale),
            shape,
        );
    }
}

#[cube(launch_unchecked, create_dummy_kernel)]
fn outlier_sums_mma(
    queries: &[Vector<u32, Const<4>>],
    q_inverses: &[f32],
    means: &[Vector<u32, Const<4>>],
    mean_inverses: &[f32],
    variances: &[Vector<u32, Const<4>>],
    variance_inverses: &[f32],
    outliers: &[Vector<u32, Const<4>>],
    outlier_inverses: &[f32],
    positions: &[u32],
    sums: &mut [f32],
    lengths: &[u32],
    numbers: SelectNumbers,
    run: Run,
    factors: Factors,
    #[comptime] shape: MmaShape,
) {
    let parts = comptime!(shape.parts);
    let (block, k_sub) = comptime!((shape.parts.block, shape.parts.subs[1]));
    let per_block = comptime!(shape.parts.per_block());
    let (tiles, rows, steps) = comptime!((shape.tiles, shape.rows(), shape.steps()));
    let (warps, key_tiles, keys) = comptime!((WARPS, KEY_TILES, KEYS));
    let lane = UNIT_POS_X as usize;
    let def = MmaDefinition::<f16, f16, f32>::new(16usize, 8usize, 16usize);
    let size!(NF) = def.vector_size(MatrixIdent::A);
    let size!(NC) = def.vector_size(MatrixIdent::Accumulator);

    let lines = run.rows * comptime!(shape.parts.per_row());
    let q_tiles = lines.div_ceil(warps * rows);
    let ranges = run.k_subs.div_ceil(keys);
    let range = CUBE_POS % ranges;
    let tile = CUBE_POS / ranges % q_tiles;
    let index = CUBE_POS / (ranges * q_tiles);
    if index >= run.heads {
        terminate!();
    }
    let head = run.first_head + index;
    let batch = head / numbers.q_heads;
    let span = span(lengths, batch, numbers.q_len, numbers.kv_len, comptime!(parts.ragged));

    // The warp's queries as fragments: of each step and tile two dims of rows `lane / 4` and
    // `lane / 4 + 8`, then two other dims of both.
    let first = (tile * warps + UNIT_POS_Y as usize) * rows;
    let mut high = Array::<Vector<f16, NF>>::new(comptime!(steps * tiles * 4));
    let mut low = Array::<Vector<f16, NF>>::new(comptime!(steps * tiles * 4));
    let mut visible = Array::<usize>::new(comptime!(tiles * 2));
    let mut score_factors = Array::<f32>::new(comptime!(tiles * 2));
    let mut spread_factors = Array::<f32>::new(comptime!(tiles * 2));
    let mut reach = 0u32;
    #[unroll]
    for r in 0..comptime!(tiles * 2) {
        let sub = first + r * 8 + lane / 4;
        let query = run.query(&span, head, sub.min(lines - 1), parts);
        visible[r] = select(sub < lines, query.visible, 0usize);
        reach = reach.max(visible[r] as u32);
        let inverse = q_inverses[query.line];
        score_factors[r] = inverse * factors.score;
        let unshrunk = inverse * comptime!(1.0 / SHRINK);
        spread_factors[r] = unshrunk * unshrunk * factors.spread;
        let line = query.line - head * run.q_subs;
        #[unroll]
        for p in 0..steps {
            let x = queries[((head * steps + p) * run.q_subs + line) * 4 + lane % 4];
            let at = comptime!((p * tiles + r / 2) * 4 + r % 2);
            #[unroll]
            for pair in 0..2usize {
                high[at + pair * 2] = Vector::<f16, NF>::reinterpret(x.extract(pair));
                low[at + pair * 2] = Vector::<f16, NF>::reinterpret(x.extract(pair + 2));
            }
        }
    }
    let reach = plane_max(reach) as usize;

    let full = comptime!((shape.parts.subs[1] as f32).log2());
    let last = (span.kv_len.max(1) - 1) % k_sub + 1;
    let last = log2(f32::cast_from(last), true);
    let k_head = head / numbers.group;
    let end = reach.div_ceil(k_sub).min((range + 1) * keys);
    let mut group = range * keys;
    while group < end {
        // The lane's column of each tile, and its dims.
        let mut places = Array::<usize>::new(key_tiles);
        #[unroll]
        for n in 0..key_tiles {
            let key = (group + n * 8 + lane / 4).min(run.k_subs - 1);
            places[n] = (k_head * steps * run.k_subs + key) * 4 + lane % 4;
        }
        let step = run.k_subs * 4;
        let scores = products::<NF, NC>(&high, &low, means, &places, step, false, shape);
        let spreads = products::<NF, NC>(&high, &low, variances, &places, step, true, shape);
        let alone = products::<NF, NC>(&high, &low, outliers, &places, step, false, shape);

        #[unroll]
        for n in 0..key_tiles {
            // Columns of the accumulators, not of the fragments above.
            let column = group + n * 8 + lane % 4 * 2;
            let mut inverses = Array::<f32>::new(6usize);
            let mut log_counts = Array::<f32>::new(2usize);
            let mut after = Array::<usize>::new(2usize);
            #[unroll]
            for e in 0..2usize {
                let key = k_head * run.k_subs + (column + e).min(run.k_subs - 1);
                inverses[e] = mean_inverses[key];
                inverses[2 + e] = variance_inverses[key];
                inverses[4 + e] = outlier_inverses[key];
                after[e] = positions[key] as usize;
                let whole = (column + e + 1) * k_sub <= span.kv_len;
                log_counts[e] = select(whole, full, last);
            }
            #[unroll]
            for r in 0..comptime!(tiles * 2) {
                let at = comptime!((r / 2 * key_tiles + n) * 2 + r % 2);
                let mut terms = Array::<f32>::new(4usize);
                let mut largest = nothing();
                #[unroll]
                for e in 0..2usize {
                    let score = scores[at].extract(e) * score_factors[r] * inverses[e];
                    let spread = spreads[at].extract(e) * spread_factors[r] * inverses[2 + e];
                    let seen = (column + e) * k_sub < visible[r];
                    let a = cloud(score, spread, log_counts[e], true);
                    terms[e] = select(seen, a, nothing());
                    let b = usable(alone[at].extract(e) * score_factors[r] * inverses[4 + e]);
                    // Past the last key sub-block the last one's position stands in.
                    terms[2 + e] = select(seen && after[e] < visible[r], b, nothing());
                    largest = largest.max(terms[e]).max(terms[2 + e]);
                }
                let sharing = comptime!(per_block / 2);
                let hops = comptime!(sharing.ilog2());
                #[unroll]
                for hop in 0..hops {
                    largest = largest.max(plane_shuffle_xor(largest, comptime!(1u32 << hop)));
                }
                let base = reference(largest);
                let mut total = 0.0f32;
                #[unroll]
                for i in 0..4usize {
                    total += exp2(terms[i] - base, true);
                }
                #[unroll]
                for hop in 0..hops {
                    total += plane_shuffle_xor(total, comptime!(1u32 << hop));
                }
                let v = column / per_block;
                if lane % sharing == 0 && v * block < visible[r] {
                    let line = index * lines + first + r * 8 + lane / 4;
                    sums[line * numbers.key_blocks + v] = log_sum(largest, total, true);
                }
            }
        }
        group += comptime!(KEY_TILES * 8);
    }
}

/// Products of the warp's queries with tiles of keys, of which `places` are the lane's: of each tile of
/// queries and of keys the two rows of a lane. Of their squares, if so asked.
#[cube]
fn products<NF: Size, NC: Size>(
    high: &Array<Vector<f16, NF>>,
    low: &Array<Vector<f16, NF>>,
    keys: &[Vector<u32, Const<4>>],
    places: &Array<usize>,
    step: usize,
    #[comptime] squared: bool,
    #[comptime] shape: MmaShape,
) -> Array<Vector<f32, NC>> {
    let (tiles, steps, key_tiles) = comptime!((shape.tiles, shape.steps(), KEY_TILES));
    let def = MmaDefinition::<f16, f16, f32>::new(16usize, 8usize, 16usize);
    let mut sums = Array::<Vector<f32, NC>>::new(comptime!(tiles * key_tiles * 2));
    #[unroll]
    for i in 0..comptime!(tiles * key_tiles * 2) {
        sums[i] = Vector::new(0.0f32);
    }
    #[unroll]
    for p in 0..steps {
        let mut fragments = Array::<Vector<f16, NF>>::new(comptime!(key_tiles * 4));
        #[unroll]
        for n in 0..key_tiles {
            let key = keys[places[n] + p * step];
            #[unroll]
            for i in 0..4usize {
                fragments[n * 4 + i] = Vector::<f16, NF>::reinterpret(key.extract(i));
            }
        }
        // h·h, h·l, l·h: products that add to the same sums stand apart.
        #[unroll]
        for part in 0..comptime!(if squared { 1usize } else { 3 }) {
            #[unroll]
            for m in 0..tiles {
                let mut a = Array::<Vector<f16, NF>>::new(4usize);
                #[unroll]
                for i in 0..4usize {
                    let at = comptime!((p * tiles + m) * 4 + i);
                    let mut x = high[at];
                    if comptime!(part == 2) {
                        x = low[at];
                    }
                    if comptime!(squared) {
                        let shrunk = x * Vector::<f16, NF>::new(f16::new(SHRINK));
                        x = shrunk * shrunk;
                    }
                    a[i] = x;
                }
                #[unroll]
                for n in 0..key_tiles {
                    let mut b = Array::<Vector<f16, NF>>::new(2usize);
                    #[unroll]
                    for i in 0..2usize {
                        b[i] = fragments[comptime!(n * 4 + part % 2 * 2 + i)];
                    }
                    let c = comptime!((m * key_tiles + n) * 2);
                    let mut acc = Array::<Vector<f32, NC>>::new(2usize);
                    acc[0] = sums[c];
                    acc[1] = sums[c + 1];
                    let acc = def.execute::<NF, NF, NC>(&a, &b, &acc);
                    sums[c] = acc[0];
                    sums[c + 1] = acc[1];
                }
            }
        }
    }
    sums
}
