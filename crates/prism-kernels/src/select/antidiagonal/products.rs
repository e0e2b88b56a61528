//! Products of groups, as tensor cores take them.
//!
//! Of the S·head_dim that each product is long, some dims of one position pass through shared memory at a time:
//! step c brings query S − 1 − c and key c of every group, which is all that the reversal takes. Positions
//! without a query or a key are zeros. Copies run a few steps ahead.

use cubecl::cmma::{MatrixIdent, MmaDefinition};
use cubecl::frontend::barrier::copy_async;
use cubecl::prelude::*;

use super::sums::{M_TILES, N_TILES, OWN, SumsShape, TILE, UNITS, WIDE};

/// Rows of positions that a tile is made of.
#[derive(CubeType, Clone, Copy)]
pub(super) struct Rows {
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
    pub fn new(
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
pub(super) fn own() -> (usize, usize) {
    let warp = UNIT_POS_Y as usize;
    let across = comptime!(TILE / OWN);
    (warp / across * comptime!(OWN), warp % across * comptime!(OWN))
}

/// Products of the warp's groups: of each tile of 16 query groups and of 8 key groups the two rows of a lane.
#[cube]
pub(super) fn products<E: Float, N: Size, NF: Size, NC: Size>(
    q: &Tensor<Vector<E, N>>,
    k: &Tensor<Vector<E, N>>,
    q_tile: &mut Shared<[Vector<E, N>]>,
    k_tile: &mut Shared<[Vector<E, N>]>,
    queries: &Rows,
    keys: &Rows,
    #[comptime] shape: SumsShape,
) -> Array<Vector<f32, NC>> {
    let (stages, pitch, stage) = comptime!((shape.stages, shape.pitch(), shape.stage()));
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
        bring::<E, N>(q, q_tile, queries, step * stage, step, true, shape);
        bring::<E, N>(k, k_tile, keys, step * stage, step, false, shape);
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
            bring::<E, N>(q, q_tile, queries, free * stage, ahead, true, shape);
            bring::<E, N>(k, k_tile, keys, free * stage, ahead, false, shape);
        }
        commit();
        #[unroll]
        for s in 0..comptime!(shape.dims / 16) {
            let mut lines = Sequence::<Array<Vector<E, NF>>>::new();
            #[unroll]
            for m in 0..m_tiles {
                let row = own_line + m * 16 + lane % 16;
                let at = now * stage + row * pitch + s * 2 + lane / 16;
                let fragment =
                    def.load_matrix::<_, NF>(&q_tile[at..at + 1], MatrixIdent::A, 4usize, false);
                lines.push(fragment);
            }
            #[unroll]
            for n in 0..comptime!(N_TILES / 2) {
                let row = own_key + n * 16 + lane / 16 * 8 + lane % 8;
                let at = now * stage + row * pitch + s * 2 + lane / 8 % 2;
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
    let apart = comptime!(UNITS / chunks);
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
        for i in 0..comptime!(TILE / apart) {
            let (from, to) = (from + i * far, to + i * apart * pitch);
            copy_async(&x[from..from + 1], &mut tile[to..to + 1], comptime!(WIDE as u32));
        }
    } else {
        for i in 0..comptime!(TILE / apart) {
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
