//! From [`products`] of groups to their exponentials, added up by block.
//!
//! A cube takes 128 query groups by 128 key groups, a warp a quarter.

use cubecl::cmma::{MatrixIdent, MmaDefinition};
use cubecl::prelude::*;
use cubecl::server::Handle;

use super::products::{Rows, own, products};
use super::{AntidiagonalProblem, HostRun, Run};
use crate::attend::softmax::nothing;
use crate::capabilities::Capabilities;
use crate::fixed::usable;
use crate::operand::buffer;
use crate::select::log_sum::{log_sum, reference};
use crate::special::exp2;
use crate::work::{cube_count, launch};

/// Groups a tile, of queries and of keys.
pub(super) const TILE: usize = 128;
/// Groups a warp, of both.
pub(super) const OWN: usize = 64;
const WARPS: usize = (TILE / OWN) * (TILE / OWN);
pub(super) const UNITS: usize = WARPS * 32;
/// Tiles of 16 query groups and of 8 key groups a warp.
pub(super) const M_TILES: usize = OWN / 16;
pub(super) const N_TILES: usize = OWN / 8;
/// Least positions a group.
const LEAST_STRIDE: usize = 4;
/// Elements of 16 bytes.
pub(super) const WIDE: usize = 8;

/// What the kernel is compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct SumsShape {
    /// Positions a group.
    pub stride: usize,
    /// Groups a block.
    per_block: usize,
    pub dim: usize,
    /// Dims a step.
    pub dims: usize,
    /// Steps in shared memory.
    pub stages: usize,
}

impl SumsShape {
    /// Vectors of 16 bytes from one row in shared memory to the next: an odd number, so that the eight rows
    /// that `ldmatrix` reads at once lie in different banks.
    pub fn pitch(&self) -> usize {
        self.dims / WIDE + 1
    }

    /// Vectors of a step, of queries or of keys.
    pub fn stage(&self) -> usize {
        TILE * self.pitch()
    }

    fn shared_memory(&self) -> usize {
        2 * self.stages * self.stage() * 16
    }

    /// The layout that fits a device, if any does.
    fn fitting(
        capabilities: &Capabilities,
        dim: usize,
        block: usize,
        stride: usize,
    ) -> Option<Self> {
        let dims = [64, 32, 16].into_iter().find(|dims| dim % dims == 0)?;
        let per_block = if block % stride == 0 { block / stride } else { 0 };
        let shape = Self { stride, per_block, dim, dims, stages: 3 };
        let shapes = [shape, Self { stages: 2, ..shape }];
        // Fewer positions a group would be fewer steps than are brought ahead.
        let takes =
            stride >= LEAST_STRIDE && (2..=OWN).contains(&per_block) && per_block.is_power_of_two();
        let fits = |shape: &Self| shape.shared_memory() <= capabilities.shared_memory;
        shapes.into_iter().find(fits).filter(|_| takes)
    }
}

/// Whether some layout fits.
pub(super) fn fits(capabilities: &Capabilities, dim: usize, block: usize, stride: usize) -> bool {
    UNITS <= capabilities.units as usize
        && SumsShape::fitting(capabilities, dim, block, stride).is_some()
}

/// Writes the logarithms to base 2 of the sums of a run: `[heads, lines, blocks]` f32, as far as causal.
pub(super) fn sum(
    client: &Client,
    capabilities: &Capabilities,
    problem: &AntidiagonalProblem,
    run: &HostRun,
    sums: &Handle,
) {
    let (block, [.., dim]) = (problem.grid.block(), problem.q.shape);
    let Some(shape) = SumsShape::fitting(capabilities, dim, block, problem.stride) else { return };
    let blocks = problem.blocks();
    let k_tiles = (blocks * shape.per_block).div_ceil(TILE);
    let cubes = run.heads * run.lines.div_ceil(TILE) * k_tiles;
    let address = problem.q.address_type().max(problem.k.address_type());
    let factor = problem.scale / problem.stride as f64 * std::f64::consts::LOG2_E;
    // SAFETY: cubes past the last tile return, positions outside of the sequence aren't read, and only the
    // sums of a run's lines and causal blocks are written.
    unsafe {
        launch!(
            group_sums,
            client,
            cube_count(client, cubes),
            CubeDim::new_2d(32, WARPS as u32),
            address,
            WIDE,
            problem.q.arg(),
            problem.k.arg(),
            buffer(sums, run.heads * run.lines * blocks),
            run.launch(problem),
            k_tiles,
            factor as f32,
            shape,
            problem.q.element.elem_type(),
        );
    }
}

#[cube(launch_unchecked, create_dummy_kernel, address_type = "dynamic")]
fn group_sums<E: Float, N: Size>(
    q: &Tensor<Vector<E, N>>,
    k: &Tensor<Vector<E, N>>,
    sums: &mut [f32],
    run: Run,
    k_tiles: usize,
    factor: f32,
    #[comptime] shape: SumsShape,
    #[define(E)] _element: ElemType,
) {
    let (tile, stages) = comptime!((TILE, shape.stages));
    let mut q_tile =
        Shared::<[Vector<E, N>]>::new_aligned_slice(comptime!(stages * shape.stage()), 16usize);
    let mut k_tile =
        Shared::<[Vector<E, N>]>::new_aligned_slice(comptime!(stages * shape.stage()), 16usize);
    // Cubes that run at the same time read the same keys, and queries of few tiles.
    let q_tiles = run.lines.div_ceil(tile);
    let first_line = CUBE_POS % q_tiles * tile;
    let first_key = CUBE_POS / q_tiles % k_tiles * tile;
    let index = CUBE_POS / (q_tiles * k_tiles);
    let last_group = run.first_group + (first_line + tile).min(run.lines) - 1;
    if index >= run.heads || first_key > last_group {
        terminate!();
    }
    let head = run.first_head + index;
    let (batch, q_head) = (head / run.q_heads, head % run.q_heads);
    let (q_base, k_base) = (
        batch * q.stride(0) + q_head * q.stride(1),
        batch * k.stride(0) + q_head / run.group * k.stride(1),
    );
    let first_query = (run.first_group + first_line) * comptime!(shape.stride);
    let queries = Rows::new(
        q_base / comptime!(WIDE),
        q.stride(2) / comptime!(WIDE),
        first_query + run.blind - run.first_position,
        run.blind,
        run.kv_len - run.first_position,
        comptime!(TILE * shape.stride).runtime(),
    );
    let keys = Rows::new(
        k_base / comptime!(WIDE),
        k.stride(2) / comptime!(WIDE),
        first_key * comptime!(shape.stride),
        0usize.runtime(),
        run.kv_len,
        comptime!(TILE * shape.stride).runtime(),
    );
    let def = MmaDefinition::<E, E, f32>::new(16usize, 8usize, 16usize);
    let size!(NF) = def.vector_size(MatrixIdent::A);
    let size!(NC) = def.vector_size(MatrixIdent::Accumulator);
    let scores = products::<E, N, NF, NC>(q, k, &mut q_tile, &mut k_tile, &queries, &keys, shape);

    let lane = UNIT_POS_X as usize;
    let (own_line, own_key) = own();
    let per_block = comptime!(shape.per_block);
    // A block is a few tiles of columns, or some columns of a tile, which a lane shares with others.
    let (tiles, sharing) = comptime!(((per_block / 8).max(1), (per_block / 2).min(4)));
    let hops = comptime!(sharing.ilog2());
    #[unroll]
    for r in 0..comptime!(M_TILES * 2) {
        let line = first_line + own_line + r * 8 + lane / 4;
        let group = run.first_group + line;
        let holds = run.holds(line, comptime!(shape.stride));
        #[unroll]
        for part in 0..comptime!(N_TILES / tiles) {
            let mut terms = Array::<f32>::new(comptime!(tiles * 2));
            let mut largest = nothing();
            #[unroll]
            for i in 0..comptime!(tiles * 2) {
                let n = comptime!(part * tiles + i / 2);
                let key = first_key + own_key + n * 8 + lane % 4 * 2 + i % 2;
                let score = scores[comptime!((r / 2 * N_TILES + n) * 2 + r % 2)].extract(i % 2);
                terms[i] = select(key <= group, usable(score * factor), nothing());
                largest = largest.max(terms[i]);
            }
            #[unroll]
            for hop in 0..hops {
                largest = largest.max(plane_shuffle_xor(largest, comptime!(1u32 << hop)));
            }
            let base = reference(largest);
            let mut total = 0.0f32;
            #[unroll]
            for i in 0..comptime!(tiles * 2) {
                total += exp2(terms[i] - base, true);
            }
            #[unroll]
            for hop in 0..hops {
                total += plane_shuffle_xor(total, comptime!(1u32 << hop));
            }
            let key = first_key + own_key + part * comptime!(tiles * 8) + lane % 4 * 2;
            if lane % sharing == 0 && holds && key / per_block * per_block <= group {
                let place = (index * run.lines + line) * run.blocks + key / per_block;
                sums[place] = log_sum(largest, total, true);
            }
        }
    }
}
