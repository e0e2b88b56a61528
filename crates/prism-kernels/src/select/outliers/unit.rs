//! Sums by a unit for a key block and a few query sub-blocks: any runtime.

use cubecl::prelude::*;
use cubecl::server::Handle;

use super::terms::{Factors, FactorsLaunch, cloud};
use super::{HostRun, Launch, OutliersShape, Parts, Run};
use crate::attend::softmax::nothing;
use crate::capabilities::Capabilities;
use crate::fixed::usable;
use crate::operand::buffer;
use crate::select::log_sum::{log_sum, reference};
use crate::select::{SelectNumbers, transposed, vector_size};
use crate::span::span;
use crate::special::{exp2, log2};
use crate::work::{cube_count, launch};

/// Query sub-blocks scored at once: each key that is read serves them all.
const AT_ONCE: usize = 4;

/// Key sub-blocks as units read them.
pub(super) struct Keys {
    means: Handle,
    variances: Handle,
    outliers: Handle,
    vector: usize,
    /// Whether dims come before sub-blocks.
    transposed: bool,
}

impl Keys {
    /// The keys in order, or where many units run side by side, so that those which score neighbouring
    /// blocks read neighbouring vectors.
    pub fn new(client: &Client, capabilities: &Capabilities, parts: &Parts) -> Self {
        let (sizes, vector) = (parts.sizes, vector_size(client, parts.sizes.dim));
        let transposes = capabilities.cores.is_none();
        let keys = |x: &Handle| match transposes {
            true => transposed(client, x, [sizes.k_heads, sizes.k_subs, sizes.dim], vector),
            false => x.clone(),
        };
        Self {
            means: keys(&parts.means),
            variances: keys(&parts.variances),
            outliers: keys(&parts.outliers),
            vector,
            transposed: transposes,
        }
    }
}

/// Scores the rows of a run.
pub(super) fn score(launch: &Launch, keys: &Keys, run: &HostRun, shape: OutliersShape) {
    let Launch { client, capabilities, parts, .. } = launch;
    let sizes = parts.sizes;
    let units = capabilities.cores.unwrap_or(64.min(capabilities.units));
    let tiles = (run.rows * shape.per_row()).div_ceil(AT_ONCE);
    let work = run.heads * tiles * sizes.key_blocks;
    let k_vectors = sizes.k_heads * sizes.k_subs * sizes.dim / keys.vector;
    // SAFETY: units past the last tile return, lines past the last query sub-block aren't written, and
    // keys are read up to what a query sees.
    unsafe {
        launch!(
            outlier_sums,
            client,
            cube_count(client, work.div_ceil(units as usize)),
            CubeDim::new_1d(units),
            keys.vector,
            buffer(&parts.q_means, sizes.q_heads * sizes.q_subs * sizes.dim / keys.vector),
            buffer(&keys.means, k_vectors),
            buffer(&keys.variances, k_vectors),
            buffer(&keys.outliers, k_vectors),
            buffer(&parts.positions, sizes.k_heads * sizes.k_subs),
            buffer(&launch.sums, run.lines(shape) * sizes.key_blocks),
            launch.spans.arg(&launch.selection.counts),
            launch.numbers(),
            launch.run(run),
            FactorsLaunch::of(launch.problem.scale),
            keys.transposed,
            shape,
        );
    }
}

#[cube(launch_unchecked, create_dummy_kernel)]
fn outlier_sums<N: Size>(
    q_means: &[Vector<f32, N>],
    k_means: &[Vector<f32, N>],
    k_variances: &[Vector<f32, N>],
    outliers: &[Vector<f32, N>],
    positions: &[u32],
    sums: &mut [f32],
    lengths: &[u32],
    numbers: SelectNumbers,
    run: Run,
    factors: Factors,
    #[comptime] transposed: bool,
    #[comptime] shape: OutliersShape,
) {
    let at_once = comptime!(AT_ONCE);
    let width = N::value();
    let chunks = comptime!(shape.dim / width);
    let (per_block, k_sub) = comptime!((shape.per_block(), shape.subs[1]));
    let lines = run.rows * comptime!(shape.per_row());
    let tiles = lines.div_ceil(at_once);
    let v = ABSOLUTE_POS % numbers.key_blocks;
    let tile = ABSOLUTE_POS / numbers.key_blocks % tiles;
    let index = ABSOLUTE_POS / (numbers.key_blocks * tiles);
    if index >= run.heads {
        terminate!();
    }
    let head = run.first_head + index;
    let batch = head / numbers.q_heads;
    let span = span(lengths, batch, numbers.q_len, numbers.kv_len, comptime!(shape.ragged));
    let kv_head = head / numbers.group;

    let mut queries = Array::<usize>::new(at_once);
    let mut visible = Array::<usize>::new(at_once);
    let mut largest = Array::<f32>::new(at_once);
    let mut totals = Array::<f32>::new(at_once);
    let mut reach = 0usize;
    #[unroll]
    for i in 0..at_once {
        let query = run.query(&span, head, (tile * at_once + i).min(lines - 1), shape);
        queries[i] = query.line * chunks;
        visible[i] = query.visible;
        reach = reach.max(query.visible);
        largest[i] = nothing();
        totals[i] = 0.0f32;
    }
    let end = ((v + 1) * per_block).min(reach.div_ceil(k_sub));
    let mut t = v * per_block;
    while t < end {
        let mut means = Array::<Vector<f32, N>>::new(at_once);
        let mut spreads = Array::<Vector<f32, N>>::new(at_once);
        let mut alone = Array::<Vector<f32, N>>::new(at_once);
        #[unroll]
        for i in 0..at_once {
            means[i] = Vector::new(0.0f32);
            spreads[i] = Vector::new(0.0f32);
            alone[i] = Vector::new(0.0f32);
        }
        for c in 0..chunks {
            let mut key = (kv_head * run.k_subs + t) * chunks + c;
            if comptime!(transposed) {
                key = (kv_head * chunks + c) * run.k_subs + t;
            }
            let (mean, variance, outlier) = (k_means[key], k_variances[key], outliers[key]);
            #[unroll]
            for i in 0..at_once {
                let q = q_means[queries[i] + c];
                means[i] += q * mean;
                spreads[i] += q * q * variance;
                alone[i] += q * outlier;
            }
        }
        let count = k_sub.min(span.kv_len - t * k_sub);
        let log_count = log2(f32::cast_from(count), false);
        let position = positions[kv_head * run.k_subs + t] as usize;
        #[unroll]
        for i in 0..at_once {
            let score = total::<N>(means[i]) * factors.score;
            let variance = total::<N>(spreads[i]) * factors.spread;
            let seen = t * k_sub < visible[i];
            let a = select(seen, cloud(score, variance, log_count, false), nothing());
            let b = usable(total::<N>(alone[i]) * factors.score);
            let b = select(position < visible[i], b, nothing());
            let before = largest[i];
            let most = before.max(a).max(b);
            let base = reference(most);
            let terms = exp2(a - base, false) + exp2(b - base, false);
            totals[i] = totals[i] * exp2(before - base, false) + terms;
            largest[i] = most;
        }
        t += 1usize;
    }
    #[unroll]
    for i in 0..at_once {
        let sub = tile * at_once + i;
        if sub < lines && v * per_block < end {
            let place = (index * lines + sub) * numbers.key_blocks + v;
            sums[place] = log_sum(largest[i], totals[i], false);
        }
    }
}

#[cube]
fn total<N: Size>(x: Vector<f32, N>) -> f32 {
    let width = N::value();
    let mut sum = 0.0f32;
    #[unroll]
    for e in 0..width {
        sum += x.extract(e);
    }
    sum
}
