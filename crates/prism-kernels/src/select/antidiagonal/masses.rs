//! From sums of exponentials by block to integer masses of rows.

use cubecl::prelude::*;
use cubecl::server::Handle;
use prism_core::select::MASS_ONE;

use super::{AntidiagonalProblem, HostRun, Run};
use crate::attend::softmax::{inverse, nothing, reference};
use crate::operand::buffer;
use crate::special::exp2;
use crate::work::{cube_count, launch};

/// Lines a cube, a plane each.
const LINES: usize = 8;
/// Units a cube where each has a block.
const UNITS: usize = 128;

/// Adds the sums of a run's lines up to the masses of its rows.
pub(super) fn masses(
    client: &Client,
    problem: &AntidiagonalProblem,
    run: &HostRun,
    sums: &Handle,
    masses: &Handle,
) {
    let ([batch, q_heads, ..], blocks) = (problem.q.shape, problem.blocks());
    let (lines, rows) = (run.heads * run.lines, problem.rows.len());
    let totals = client.empty(lines * 8);
    let shape = MassesShape { per_block: problem.per_block(), stride: problem.stride };
    // SAFETY: planes past the last line and units past the last block return; each reads sums of its own
    // head and writes its own total or mass.
    unsafe {
        launch!(
            group_totals,
            client,
            cube_count(client, lines.div_ceil(LINES)),
            CubeDim::new_2d(32, LINES as u32),
            buffer(sums, lines * blocks),
            buffer(&totals, lines * 2),
            run.launch(problem),
            shape,
        );
        launch!(
            group_masses,
            client,
            cube_count(client, (run.heads * rows * blocks).div_ceil(UNITS)),
            CubeDim::new_1d(UNITS as u32),
            buffer(sums, lines * blocks),
            buffer(&totals, lines * 2),
            buffer(masses, batch * q_heads * rows * blocks),
            run.launch(problem),
            shape,
        );
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct MassesShape {
    /// Groups a block.
    per_block: usize,
    stride: usize,
}

/// Of each line the largest logarithm, and one over the sum over its blocks relative to that; 0 where there is
/// no line, or nothing counts. Apart, since beside infinite scores a sum would be lost.
#[cube(launch_unchecked, create_dummy_kernel)]
fn group_totals(sums: &[f32], totals: &mut [f32], run: Run, #[comptime] shape: MassesShape) {
    let line = CUBE_POS * comptime!(LINES) + UNIT_POS_Y as usize;
    if line >= run.heads * run.lines {
        terminate!();
    }
    let lane = UNIT_POS_X as usize;
    let own = line % run.lines;
    let causal = (run.first_group + own) / comptime!(shape.per_block) + 1;
    let blocks = select(run.holds(own, comptime!(shape.stride)), causal, 0usize);
    let start = line * run.blocks;
    let mut largest = nothing();
    let mut v = lane;
    while v < blocks {
        largest = largest.max(sums[start + v]);
        v += 32usize;
    }
    let largest = plane_max(largest);
    let base = reference(largest);
    let mut total = 0.0f32;
    let mut v = lane;
    while v < blocks {
        total += exp2(sums[start + v] - base, true);
        v += 32usize;
    }
    let total = plane_sum(total);
    if lane == 0 {
        totals[line * 2] = base;
        totals[line * 2 + 1] = inverse(total);
    }
}

/// The mass of a block for a row: the mean over the query groups of the row.
#[cube(launch_unchecked, create_dummy_kernel)]
fn group_masses(
    sums: &[f32],
    totals: &[f32],
    masses: &mut [u32],
    run: Run,
    #[comptime] shape: MassesShape,
) {
    let per_block = comptime!(shape.per_block);
    let rows = run.lines / per_block;
    let v = ABSOLUTE_POS % run.blocks;
    let row = ABSOLUTE_POS / run.blocks;
    if row >= run.heads * rows {
        terminate!();
    }
    let mut mass = 0.0f32;
    let mut count = 0.0f32;
    if v <= run.first_group / per_block + row % rows {
        for i in 0..per_block {
            if run.holds(row % rows * per_block + i, comptime!(shape.stride)) {
                let line = row * per_block + i;
                let share = exp2(sums[line * run.blocks + v] - totals[line * 2], true);
                mass += share * totals[line * 2 + 1];
                count += 1.0f32;
            }
        }
    }
    let one = comptime!(MASS_ONE as f32);
    let place = (run.first_head * rows + row) * run.blocks + v;
    masses[place] = u32::cast_from((mass / count.max(1.0f32) * one + 0.5f32).floor());
}
