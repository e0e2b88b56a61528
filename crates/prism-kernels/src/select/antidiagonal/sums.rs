//! Scores of groups on `mma.sync` m16n8k16, and their exponentials added up by block.
//!
//! A cube takes a tile of query groups by 128 key groups, a warp 64 by 64 of them. Of the S·head_dim that each product
//! is long, some dims of one position pass through shared memory at a time: step c brings query S − 1 − c
//! and key c of every group, which is all that the reversal takes. Positions without a query or a key are
//! zeros. Copies run a few steps ahead.

use cubecl::cmma::{MatrixIdent, MmaDefinition};
use cubecl::frontend::barrier::copy_async;
use cubecl::prelude::*;
use cubecl::server::Handle;

use super::{AntidiagonalProblem, HostRun, Run};
use crate::attend::softmax::{nothing, reference};
use crate::capabilities::Capabilities;
use crate::fixed::usable;
use crate::operand::buffer;
use crate::special::{exp2, log2};
use crate::work::{cube_count, launch};

/// Key groups a tile.
const KEYS: usize = 128;
/// Groups a warp, of queries and of keys.
const OWN: usize = 64;
/// Tiles of 16 query groups and of 8 key groups a warp.
const M_TILES: usize = OWN / 16;
const N_TILES: usize = OWN / 8;
/// Elements of 16 bytes.
pub(super) const WIDE: usize = 8;

/// What the kernel is compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct SumsShape {
    /// Positions a group.
    stride: usize,
    /// Groups a block.
    per_block: usize,
    dim: usize,
    /// Query groups a tile.
    lines: usize,
    /// Dims a step.
    dims: usize,
    /// Steps in shared memory.
    stages: usize,
}

impl SumsShape {
    /// Vectors of 16 bytes from one row in shared memory to the next: an odd number, so that the eight rows
    /// that `ldmatrix` reads at once lie in different banks.
    fn pitch(&self) -> usize {
        self.dims / WIDE + 1
    }

    fn warps(&self) -> usize {
        self.lines / OWN * (KEYS / OWN)
    }

    fn shared_memory(&self) -> usize {
        self.stages * (self.lines + KEYS) * self.pitch() * 16
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
        let env = |name: &str, or: usize| {
            std::env::var(name).ok().and_then(|x| x.parse().ok()).unwrap_or(or)
        };
        let (lines, stages) = (env("PRISM_LINES", 128), env("PRISM_STAGES", 3));
        let shape = Self { stride, per_block, dim, lines, dims, stages };
        let shapes = [shape, Self { lines: 128, stages: 2, ..shape }];
        let takes = (2..=OWN).contains(&per_block) && per_block.is_power_of_two();
        let fits = |shape: &Self| {
            shape.shared_memory() <= capabilities.shared_memory
                && shape.warps() * 32 <= capabilities.units as usize
        };
        shapes.into_iter().find(fits).filter(|_| takes)
    }
}

/// Whether some layout fits.
pub(super) fn fits(capabilities: &Capabilities, dim: usize, block: usize, stride: usize) -> bool {
    SumsShape::fitting(capabilities, dim, block, stride).is_some()
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
    let k_tiles = (blocks * shape.per_block).div_ceil(KEYS);
    let cubes = run.heads * run.lines.div_ceil(shape.lines) * k_tiles;
    let address = problem.q.address_type().max(problem.k.address_type());
    let factor = problem.scale / problem.stride as f64 * std::f64::consts::LOG2_E;
    // SAFETY: cubes past the last tile return, positions outside of the sequence aren't read, and only the
    // sums of a run's lines and causal blocks are written.
    unsafe {
        launch!(
            group_sums,
            client,
            cube_count(client, cubes),
            CubeDim::new_2d(32, shape.warps() as u32),
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
    let tile = comptime!(shape.lines);
    let (lines, keys) = comptime!((shape.stages * shape.lines, shape.stages * KEYS));
    let mut q_tile =
        Shared::<[Vector<E, N>]>::new_aligned_slice(comptime!(lines * shape.pitch()), 16usize);
    let mut k_tile =
        Shared::<[Vector<E, N>]>::new_aligned_slice(comptime!(keys * shape.pitch()), 16usize);
    // Cubes that run at the same time read the same keys, and queries of few tiles.
    let q_tiles = run.lines.div_ceil(tile);
    let first_line = CUBE_POS % q_tiles * tile;
    let first_key = CUBE_POS / q_tiles % k_tiles * comptime!(KEYS);
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
        comptime!(shape.lines * shape.stride).runtime(),
    );
    let keys = Rows::new(
        k_base / comptime!(WIDE),
        k.stride(2) / comptime!(WIDE),
        first_key * comptime!(shape.stride),
        0usize.runtime(),
        run.kv_len,
        comptime!(KEYS * shape.stride).runtime(),
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
                sums[place] = select(total == 0.0f32, nothing(), base + log2(total, true));
            }
        }
    }
}

/// Rows of positions that a tile is made of.
#[derive(CubeType, Clone, Copy)]
struct Rows {
    /// Vectors before the first.
    base: usize,
    /// Vectors from one to the next.
    step: usize,
    /// Row of the tile's first position. It may lie before the first that is there: then it wraps around.
    first: usize,
    /// The rows that are there.
    least: usize,
    count: usize,
    /// Whether all rows of the tile are.
    whole: bool,
}

#[cube]
impl Rows {
    fn new(
        base: usize,
        step: usize,
        first: usize,
        least: usize,
        count: usize,
        tile: usize,
    ) -> Rows {
        let from = first - least;
        let whole = from < count && from + tile <= count;
        Rows { base, step, first, least, count, whole }
    }
}

/// The first query group and the first key group of this warp in the tile.
#[cube]
fn own() -> (usize, usize) {
    let warp = UNIT_POS_Y as usize;
    let across = comptime!(KEYS / OWN);
    (warp / across * comptime!(OWN), warp % across * comptime!(OWN))
}

/// Products of the warp's groups: of each tile of 16 query groups and of 8 key groups the two rows of a lane.
#[cube]
fn products<E: Float, N: Size, NF: Size, NC: Size>(
    q: &Tensor<Vector<E, N>>,
    k: &Tensor<Vector<E, N>>,
    q_tile: &mut Shared<[Vector<E, N>]>,
    k_tile: &mut Shared<[Vector<E, N>]>,
    queries: &Rows,
    keys: &Rows,
    #[comptime] shape: SumsShape,
) -> Array<Vector<f32, NC>> {
    let (stages, pitch) = comptime!((shape.stages, shape.pitch()));
    let (q_stage, k_stage) = comptime!((shape.lines * shape.pitch(), KEYS * shape.pitch()));
    let (m_tiles, n_tiles) = comptime!((M_TILES, N_TILES));
    let steps = comptime!(shape.stride * (shape.dim / shape.dims));
    let def = MmaDefinition::<E, E, f32>::new(16usize, 8usize, 16usize);
    let lane = UNIT_POS_X as usize;
    let mut sums = Array::<Vector<f32, NC>>::new(comptime!(M_TILES * N_TILES * 2));
    #[unroll]
    for i in 0..comptime!(M_TILES * N_TILES * 2) {
        sums[i] = Vector::new(0.0f32);
    }
    #[unroll]
    for step in 0..comptime!(shape.stages - 1) {
        bring::<E, N>(q, q_tile, queries, step * q_stage, step, true, shape);
        bring::<E, N>(k, k_tile, keys, step * k_stage, step, false, shape);
        commit();
    }
    let (own_line, own_key) = own();
    let mut now = 0usize;
    let mut free = comptime!(shape.stages - 1).runtime();
    for step in 0..steps {
        // This step has arrived, and nobody reads the one before, whose place the next to come takes.
        wait(comptime!(shape.stages as u32 - 2));
        sync_cube();
        let ahead = step + comptime!(stages - 1);
        if ahead < steps {
            bring::<E, N>(q, q_tile, queries, free * q_stage, ahead, true, shape);
            bring::<E, N>(k, k_tile, keys, free * k_stage, ahead, false, shape);
        }
        commit();
        #[unroll]
        for s in 0..comptime!(shape.dims / 16) {
            let mut lines = Sequence::<Array<Vector<E, NF>>>::new();
            #[unroll]
            for m in 0..m_tiles {
                let row = own_line + m * 16 + lane % 16;
                let at = now * q_stage + row * pitch + s * 2 + lane / 16;
                let fragment =
                    def.load_matrix::<_, NF>(&q_tile[at..at + 1], MatrixIdent::A, 4usize, false);
                lines.push(fragment);
            }
            #[unroll]
            for n in 0..comptime!(N_TILES / 2) {
                let row = own_key + n * 16 + lane / 16 * 8 + lane % 8;
                let at = now * k_stage + row * pitch + s * 2 + lane / 8 % 2;
                let pair =
                    def.load_matrix::<_, NF>(&k_tile[at..at + 1], MatrixIdent::B, 4usize, false);
                #[unroll]
                for j in 0..2usize {
                    let mut b = Array::<Vector<E, NF>>::new(2usize);
                    b[0] = pair[j * 2];
                    b[1] = pair[j * 2 + 1];
                    #[unroll]
                    for m in 0..m_tiles {
                        let c = (m * n_tiles + n * 2 + j) * 2;
                        let mut acc = Array::<Vector<f32, NC>>::new(2usize);
                        acc[0] = sums[c];
                        acc[1] = sums[c + 1];
                        let acc = def.execute::<NF, NF, NC>(&lines[m], &b, &acc);
                        sums[c] = acc[0];
                        sums[c + 1] = acc[1];
                    }
                }
            }
        }
        free = now;
        now += 1usize;
        if now == stages {
            now = 0usize;
        }
    }
    sums
}

/// Brings some dims of one position of each group to shared memory: of queries in reverse.
#[cube]
fn bring<E: Float, N: Size>(
    x: &Tensor<Vector<E, N>>,
    tile: &mut Shared<[Vector<E, N>]>,
    rows: &Rows,
    offset: usize,
    step: usize,
    #[comptime] reversed: bool,
    #[comptime] shape: SumsShape,
) {
    let (stride, pitch) = comptime!((shape.stride, shape.pitch()));
    let chunks = comptime!(shape.dims / WIDE);
    let apart = comptime!(shape.warps() * 32 / chunks);
    let tile_rows = comptime!(if reversed { shape.lines } else { KEYS });
    let parts = comptime!(shape.dim / shape.dims);
    let unit = UNIT_POS as usize;
    let (column, first) = (unit % chunks, unit / chunks);
    let mut at = step / parts;
    if comptime!(reversed) {
        at = comptime!(stride - 1) - at;
    }
    let place = rows.base + step % parts * chunks + column;
    let row = rows.first + first * stride + at;
    let to = offset + first * pitch + column;
    if rows.whole {
        let from = place + row * rows.step;
        let far = rows.step * comptime!(apart * stride);
        #[unroll]
        for i in 0..comptime!(tile_rows / apart) {
            let (from, to) = (from + i * far, to + i * apart * pitch);
            copy_async(&x[from..from + 1], &mut tile[to..to + 1], comptime!(WIDE as u32));
        }
    } else {
        for i in 0..comptime!(tile_rows / apart) {
            let (row, to) = (row + i * apart * stride, to + i * apart * pitch);
            // Before the first this is a very large number.
            if row - rows.least < rows.count {
                let from = place + row * rows.step;
                copy_async(&x[from..from + 1], &mut tile[to..to + 1], comptime!(WIDE as u32));
            } else {
                tile[to] = Vector::new(E::from_int(0));
            }
        }
    }
}

#[cube]
fn commit() {
    gpu_asm!(
        "cp.async.commit_group;",
        options(explicit_mem, reads_address_space shared, writes_address_space shared)
    );
}

/// Waits until all but the last `pending` groups of copies have arrived.
#[cube]
fn wait(#[comptime] pending: u32) {
    gpu_asm!(
        "cp.async.wait_group {n};", n = const pending,
        options(explicit_mem, reads_address_space shared, writes_address_space shared)
    );
}
