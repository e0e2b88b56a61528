//! The kernel. A line of work is a block of positions of a few heads of Q, or of K: then the angles of
//! a position serve all of these heads. Lines of the same positions are neighbours, and find the angles
//! in the cache.
//!
//! A unit holds a lane: two vectors of dims that form pairs, or one of dims that don't turn. Units of
//! a cube that hold the same lane share the rows of the block.

use cubecl::prelude::*;

use super::rows::{Heads, Lane, Rows, add_rows, clear, lane, reset, rotate_rows};
use crate::band_mask::BandMask;
use crate::pool::{add_energy, write_energy};
use crate::span::span;

/// What the kernel is compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct RotateShape {
    pub block: usize,
    pub dim: usize,
    /// Units a cube.
    pub units: u32,
    /// Rows of a block that are worked at once.
    pub groups: usize,
    /// Heads a line.
    pub heads: usize,
    /// Lanes that turn; the first ones.
    pub turning: usize,
    pub interleaved: bool,
    /// Whether Q is scaled.
    pub scaled: bool,
    /// Whether means and energies are wanted.
    pub pools: bool,
    /// Whether K goes into a cache, behind keys that are there.
    pub cached: bool,
    /// Whether each unit works lines of its own, as on a CPU.
    pub alone: bool,
    pub plane: Option<u32>,
    pub ragged: bool,
    /// Whether the last dim of every tensor has no gaps.
    pub dense: bool,
    pub bands: BandMask,
}

/// Numbers of a launch.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
pub(super) struct RotateNumbers {
    q_len: usize,
    kv_len: usize,
    q_heads: usize,
    kv_heads: usize,
    rows: usize,
    key_blocks: usize,
    /// Lines of work.
    lines: usize,
    /// Factor on Q.
    factor: f32,
}

#[cube(launch_unchecked, create_dummy_kernel, address_type = "dynamic")]
pub(super) fn rotate_kernel<E: Float, N: Size>(
    q: &Tensor<Vector<E, N>>,
    k: &Tensor<Vector<E, N>>,
    cos: &[Vector<f32, N>],
    sin: &[Vector<f32, N>],
    lengths: &[u32],
    new_q: &mut Tensor<Vector<E, N>>,
    new_k: &mut Tensor<Vector<E, N>>,
    q_means: &mut [f32],
    k_means: &mut [f32],
    q_energy: &mut [f32],
    k_energy: &mut [f32],
    numbers: RotateNumbers,
    #[comptime] shape: RotateShape,
    #[define(E)] _element: ElemType,
) {
    let mut line = CUBE_POS;
    if comptime!(shape.alone) {
        line = CUBE_POS * comptime!(shape.units as usize) + UNIT_POS as usize;
    }
    if line >= numbers.lines {
        terminate!();
    }
    let block = comptime!(shape.block);
    let heads = comptime!(shape.heads);
    let (q_heads, kv_heads) = (numbers.q_heads, numbers.kv_heads);
    let q_teams = q_heads.div_ceil(heads);
    let teams = q_teams + kv_heads.div_ceil(heads);
    let team = line % teams;
    let at = (line / teams) % numbers.key_blocks;
    let batch = line / teams / numbers.key_blocks;
    let span = span(lengths, batch, numbers.q_len, numbers.kv_len, comptime!(shape.ragged));
    let position = span.first_position();
    if team < q_teams {
        // Row r of a sequence is at key block first_block + r; rows that it lacks come around.
        let row = (at + numbers.key_blocks - span.first_block(block)) % numbers.key_blocks;
        if row >= numbers.rows {
            terminate!();
        }
        let first = team * heads;
        let heads = Heads {
            batch,
            first,
            count: heads.min(q_heads - first),
            line: (batch * q_heads + first) * numbers.rows + row,
            lines: numbers.rows,
        };
        let start = (span.first_block(block) + row) * block;
        let end = (start + block).min(span.kv_len).max(position);
        let start = start.max(position).min(end);
        let from = start - position + span.blind;
        let rows = Rows { from, to: from, position: start, count: end - start };
        let none = Rows { from: 0usize, to: 0usize, position: 0usize, count: 0usize };
        let scaled = comptime!(shape.scaled);
        rotate_block::<E, N>(
            q,
            new_q,
            cos,
            sin,
            q_means,
            q_energy,
            &heads,
            &none,
            &rows,
            numbers.factor,
            scaled,
            false,
            shape,
        );
        clear::<E, N>(new_q, &heads, span.blind, span.seeing, row, numbers.rows, shape);
    } else {
        let first = (team - q_teams) * heads;
        let heads = Heads {
            batch,
            first,
            count: heads.min(kv_heads - first),
            line: (batch * kv_heads + first) * numbers.key_blocks + at,
            lines: numbers.key_blocks,
        };
        let start = (at * block).min(span.kv_len);
        let end = (start + block).min(span.kv_len);
        let mut first_new = 0usize;
        let mut blind = 0usize;
        if comptime!(shape.cached) {
            first_new = position;
            blind = span.blind;
        }
        let middle = first_new.max(start).min(end);
        let old = Rows { from: start, to: start, position: start, count: middle - start };
        // Keys of before are only pooled.
        let pools_old = comptime!(shape.cached && shape.pools);
        let from = middle.max(first_new) - first_new + blind;
        let rows = Rows { from, to: middle, position: middle, count: end - middle };
        rotate_block::<E, N>(
            k,
            new_k,
            cos,
            sin,
            k_means,
            k_energy,
            &heads,
            &old,
            &rows,
            1.0f32.runtime(),
            false,
            pools_old,
            shape,
        );
        if comptime!(!shape.cached) {
            let parts = numbers.key_blocks;
            clear::<E, N>(new_k, &heads, 0usize.runtime(), span.kv_len, at, parts, shape);
        }
    }
}

/// Rotates `rows` of a block; means and energies of them and of the rows `old`, which were rotated
/// before and are in `new`.
#[cube]
fn rotate_block<E: Float, N: Size>(
    x: &Tensor<Vector<E, N>>,
    new: &mut Tensor<Vector<E, N>>,
    cos: &[Vector<f32, N>],
    sin: &[Vector<f32, N>],
    means: &mut [f32],
    energy: &mut [f32],
    heads: &Heads,
    old: &Rows,
    rows: &Rows,
    factor: f32,
    #[comptime] scaled: bool,
    #[comptime] cached: bool,
    #[comptime] shape: RotateShape,
) {
    let width = N::value();
    let dim = comptime!(shape.dim);
    let lanes = comptime!(shape.turning + (dim / width - 2 * shape.turning));
    let count = old.count + rows.count;
    let share = 1.0 / f32::cast_from(count.max(1));
    // Of each head the sums of the lane's two vectors.
    let mut sums = Array::<Vector<f32, N>>::new(comptime!(2 * shape.heads));
    if comptime!(shape.alone) {
        for i in 0..lanes {
            let lane = lane(i, 0usize.runtime(), shape);
            reset::<N>(&mut sums, shape);
            if cached {
                add_rows::<E, N>(new, &mut sums, heads, old, &lane, shape);
            }
            rotate_rows::<E, N>(
                x, new, cos, sin, &mut sums, heads, rows, &lane, factor, scaled, shape,
            );
            #[unroll]
            for h in 0..shape.heads {
                if comptime!(shape.pools) && h < heads.count {
                    let place = (heads.line + h * heads.lines) * dim;
                    #[unroll]
                    for e in 0..width {
                        means[place + lane.second * width + e] = sums[2 * h + 1].extract(e) * share;
                        means[place + lane.first * width + e] = sums[2 * h].extract(e) * share;
                    }
                }
            }
        }
        #[unroll]
        for h in 0..shape.heads {
            if comptime!(shape.pools) && h < heads.count {
                let line = heads.line + h * heads.lines;
                let mut parts = Array::<f32>::new(3usize);
                for c in 0..dim {
                    let mean = means[line * dim + c];
                    add_energy(&mut parts, c, mean * mean, comptime!(shape.bands));
                }
                write_energy(energy, line, parts[0], parts[1], parts[2], count);
            }
        }
    } else {
        let unit = UNIT_POS as usize;
        let lane = lane(unit % lanes, unit / lanes, shape);
        reset::<N>(&mut sums, shape);
        if cached {
            add_rows::<E, N>(new, &mut sums, heads, old, &lane, shape);
        }
        rotate_rows::<E, N>(x, new, cos, sin, &mut sums, heads, rows, &lane, factor, scaled, shape);
        if comptime!(shape.pools) {
            pool_lane::<N>(&sums, means, energy, heads, &lane, count, shape);
        }
    }
}

/// Means and energies of a block, of the sums that the units of a cube hold.
#[cube]
fn pool_lane<N: Size>(
    sums: &Array<Vector<f32, N>>,
    means: &mut [f32],
    energy: &mut [f32],
    heads: &Heads,
    lane: &Lane,
    count: usize,
    #[comptime] shape: RotateShape,
) {
    let width = N::value();
    let dim = comptime!(shape.dim);
    let groups = comptime!(shape.groups);
    let units = comptime!(shape.units as usize);
    let unit = UNIT_POS as usize;
    let share = 1.0 / f32::cast_from(count.max(1));
    let mut partial = Shared::<[f32]>::new_slice(comptime!(shape.heads * groups * dim));
    #[unroll]
    for h in 0..shape.heads {
        let place = (h * groups + lane.group) * dim;
        #[unroll]
        for e in 0..width {
            partial[place + lane.second * width + e] = sums[2 * h + 1].extract(e);
            partial[place + lane.first * width + e] = sums[2 * h].extract(e);
        }
    }
    sync_cube();
    let mut i = unit;
    while i < comptime!(shape.heads * dim) {
        let h = i / dim;
        let c = i % dim;
        let mut total = 0.0f32;
        for group in 0..groups {
            total += partial[(h * groups + group) * dim + c];
        }
        let mean = total * share;
        if h < heads.count {
            means[(heads.line + h * heads.lines) * dim + c] = mean;
        }
        // Only this unit reads or writes column c of this head's partial sums from here on.
        partial[h * groups * dim + c] = mean * mean;
        i += units;
    }
    sync_cube();
    // A plane a head, or else a unit.
    let plane = comptime!(shape.plane.unwrap_or(1) as usize);
    let mut h = unit / plane;
    // A last plane may be incomplete.
    let planes = comptime!(units / plane);
    if h >= planes {
        h = heads.count;
    }
    while h < heads.count {
        let mut parts = Array::<f32>::new(3usize);
        let mut c = unit % plane;
        while c < dim {
            let square = partial[h * groups * dim + c];
            add_energy(&mut parts, c, square, comptime!(shape.bands));
            c += plane;
        }
        let mut high = parts[0];
        let mut low = parts[1];
        let mut all = parts[2];
        if comptime!(shape.plane.is_some()) {
            high = plane_sum(high);
            low = plane_sum(low);
            all = plane_sum(all);
        }
        if unit % plane == 0 {
            write_energy(energy, heads.line + h * heads.lines, high, low, all, count);
        }
        h += planes;
    }
}
