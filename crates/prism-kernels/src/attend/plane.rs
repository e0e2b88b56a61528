//! A plane for a few queries of one head, tiles of keys and values in shared memory for all
//! planes of the cube. Each lane scores a key of the tile; then each holds some of the columns of
//! the output. Any GPU with subgroups, any element type.

use cubecl::prelude::*;

use super::softmax::{inverse, log_sum_exp, nothing, reference};
use super::walk::{WalkShape, tile, word};
use super::{AttendNumbers, AttendProblem, Attended, RungError, buffers, numbers};
use crate::capabilities::Capabilities;
use crate::operand::buffer;
use crate::span::Spans;
use crate::work::{cube_count, launch};

/// Queries a plane.
const QUERIES: usize = 4;
/// Most planes a cube.
const PLANES: usize = 4;

/// What the kernel is compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct PlaneShape {
    walk: WalkShape,
    dim: usize,
    lanes: usize,
    planes: usize,
    /// Whether the last dim of a tensor has gaps.
    gaps: bool,
}

impl PlaneShape {
    /// Queries, and one tile of keys or values with rows a vector apart to avoid bank conflicts.
    fn shared_memory(dim: usize, lanes: usize, planes: usize) -> usize {
        (planes * QUERIES * dim + lanes * (dim + vector_size(dim, lanes))) * 4
    }

    /// Planes a cube: as many as share a tile usefully and fit.
    fn planes(capabilities: &Capabilities, dim: usize, lanes: usize, block: usize) -> usize {
        let most = PLANES.min(block.div_ceil(QUERIES)).min(capabilities.units as usize / lanes);
        let fits =
            |&planes: &usize| Self::shared_memory(dim, lanes, planes) <= capabilities.shared_memory;
        (1..=most.max(1)).rev().find(fits).unwrap_or(1)
    }
}

/// Columns a vector: as wide as leaves every lane one.
fn vector_size(dim: usize, lanes: usize) -> usize {
    [4, 2].into_iter().find(|n| dim % n == 0 && dim / n >= lanes).unwrap_or(1)
}

/// Whether the rung runs.
pub(super) fn check(capabilities: &Capabilities, dim: usize) -> Result<(), RungError> {
    let lanes = capabilities.plane.ok_or(RungError::NoPlanes)? as usize;
    let (needs, has) = (PlaneShape::shared_memory(dim, lanes, 1), capabilities.shared_memory);
    if needs > has { Err(RungError::SharedMemory { needs, has }) } else { Ok(()) }
}

pub(super) fn launch(
    client: &Client,
    capabilities: &Capabilities,
    problem: &AttendProblem,
    attended: &Attended,
) {
    let [batch, heads, _, dim] = problem.q.shape;
    let block = problem.grids[0].block();
    let spans = Spans::new(client, problem.grids);
    let lanes = capabilities.plane.unwrap_or(1) as usize;
    let planes = PlaneShape::planes(capabilities, dim, lanes, block);
    let tiles = block.div_ceil(planes * QUERIES);
    let items = batch * heads * prism_core::selection::extent(problem.grids).0 * tiles;
    let operands = [problem.q, problem.k, problem.v];
    let widest = vector_size(dim, lanes);
    let narrowest = operands.map(|x| x.vector_size(widest * x.element.size()));
    let vector = narrowest.into_iter().min().unwrap_or(1);
    let address = operands.map(|x| x.address_type()).into_iter().max().unwrap_or_default();
    let walk = WalkShape {
        block,
        dense: problem.selection.is_none(),
        ordered: problem.order.is_some(),
        ragged: spans.ragged(),
        lse: problem.lse,
        tiles,
    };
    let gaps = operands.iter().any(|x| x.strides[3] != 1);
    let [words, order, lengths, lse] = buffers(problem, &spans, attended);
    let out = buffer(&attended.out, problem.q.shape.iter().product::<usize>() / vector);
    // SAFETY: every query of an item lies in its sequence, and items past the end return.
    unsafe {
        launch!(
            attend_plane,
            client,
            cube_count(client, items),
            CubeDim::new_2d(lanes as u32, planes as u32),
            address,
            vector,
            problem.q.arg(),
            problem.k.arg(),
            problem.v.arg(),
            out,
            lse,
            words,
            order,
            lengths,
            numbers(problem, &spans, items),
            PlaneShape { walk, dim, lanes, planes, gaps },
            problem.q.element.elem_type(),
        );
    }
}

#[cube(launch_unchecked, create_dummy_kernel, address_type = "dynamic")]
fn attend_plane<E: Float, N: Size>(
    q: &Tensor<Vector<E, N>>,
    k: &Tensor<Vector<E, N>>,
    v: &Tensor<Vector<E, N>>,
    out: &mut [Vector<E, N>],
    lse: &mut [f32],
    words: &[u32],
    order: &[u32],
    lengths: &[u32],
    numbers: AttendNumbers,
    #[comptime] shape: PlaneShape,
    #[define(E)] _element: ElemType,
) {
    let walk = comptime!(shape.walk);
    let block = comptime!(walk.block);
    let gaps = comptime!(shape.gaps);
    let lanes = comptime!(shape.lanes);
    let units = comptime!(shape.lanes * shape.planes);
    let queries = comptime!(shape.planes * QUERIES);
    let width = N::value();
    let chunks = comptime!(shape.dim / width);
    // Chunks of columns a lane holds; the last ones may be past the end.
    let held = comptime!(chunks.div_ceil(lanes));
    // Rows of the tile start in different banks.
    let pitch = comptime!(chunks + 1);

    let i = CUBE_POS;
    if i >= numbers.items {
        terminate!();
    }
    let tile = tile(order, lengths, &numbers, i, queries, walk);
    if tile.is_empty() {
        terminate!();
    }
    let (first, end, causal, line) = (tile.first, tile.end, tile.causal, tile.line);
    let q_base = tile.batch * q.stride(0) + tile.head * q.stride(1);
    let k_base = tile.batch * k.stride(0) + tile.kv_head * k.stride(1);
    let v_base = tile.batch * v.stride(0) + tile.kv_head * v.stride(1);
    let unit = UNIT_POS as usize;
    let lane = UNIT_POS_X as usize;
    let plane = UNIT_POS_Y as usize;

    let mut query = Shared::<[Vector<f32, N>]>::new_slice(comptime!(queries * chunks));
    let mut slot = unit;
    while slot < queries * chunks {
        let r = (slot / chunks).min(end - first - 1);
        let x = load::<E, N>(q, q_base + (tile.query + r) * q.stride(2), slot % chunks, gaps);
        query[slot] = x * Vector::new(numbers.scale);
        slot += units;
    }
    let mut keys = Shared::<[Vector<f32, N>]>::new_slice(comptime!(lanes * pitch));

    let mut sum = Array::<Vector<f32, N>>::new(comptime!(QUERIES * held));
    let mut max = Array::<f32>::new(QUERIES);
    let mut total = Array::<f32>::new(QUERIES);
    #[unroll]
    for r in 0..QUERIES {
        max[r] = nothing();
        total[r] = 0.0f32;
        #[unroll]
        for h in 0..held {
            sum[r * held + h] = Vector::new(0.0f32);
        }
    }

    let own = plane * QUERIES;
    for w in 0..causal.div_ceil(32usize) {
        let mut bits = word(words, &numbers, line, w, causal, comptime!(walk.dense));
        while bits != 0u32 {
            let bit = bits.find_first_set() - 1u32;
            bits &= bits - 1u32;
            let start = (w * 32 + bit as usize) * block;
            let stop = (start + block).min(end);
            let mut from = start;
            while from < stop {
                let count = (stop - from).min(lanes);
                sync_cube();
                fill::<E, N>(k, &mut keys, k_base, from, count, unit, units, lanes, pitch, gaps);
                sync_cube();
                let mut scores = Array::<Vector<f32, N>>::new(QUERIES);
                #[unroll]
                for r in 0..QUERIES {
                    scores[r] = Vector::new(0.0f32);
                }
                for c in 0..chunks {
                    let x = keys[lane * pitch + c];
                    #[unroll]
                    for r in 0..QUERIES {
                        scores[r] += query[(own + r) * chunks + c] * x;
                    }
                }
                sync_cube();
                fill::<E, N>(v, &mut keys, v_base, from, count, unit, units, lanes, pitch, gaps);
                sync_cube();

                let mut weights = Array::<f32>::new(QUERIES);
                #[unroll]
                for r in 0..QUERIES {
                    let sees = lane < count && from + lane <= first + own + r;
                    let score = select(sees, add::<N>(scores[r]), nothing());
                    let highest = max[r].max(plane_max(score));
                    let base = reference(highest);
                    let factor = (reference(max[r]) - base).exp();
                    let factor = select(max[r] == nothing(), 0.0f32, factor);
                    let weight = select(sees, (score - base).exp(), 0.0f32);
                    max[r] = highest;
                    total[r] = total[r] * factor + plane_sum(weight);
                    weights[r] = weight;
                    #[unroll]
                    for h in 0..held {
                        sum[r * held + h] *= Vector::new(factor);
                    }
                }
                // A value that no query of the plane weighs may be NaN.
                let whole = from + lanes <= first + own + 1 && count == lanes;
                for j in 0..lanes {
                    #[unroll]
                    for r in 0..QUERIES {
                        let weight = plane_shuffle(weights[r], j as u32);
                        #[unroll]
                        for h in 0..held {
                            let c = (h * lanes + lane).min(chunks - 1);
                            let x = keys[j * pitch + c];
                            let x = select_vector::<N>(whole || weight != 0.0f32, x);
                            sum[r * held + h] += Vector::new(weight) * x;
                        }
                    }
                }
                from += lanes;
            }
        }
    }

    #[unroll]
    for r in 0..QUERIES {
        if first + own + r < end {
            let place = tile.place + own + r;
            let factor = inverse(total[r]);
            #[unroll]
            for h in 0..held {
                let c = h * lanes + lane;
                if c < chunks {
                    out[place * chunks + c] =
                        Vector::cast_from(sum[r * held + h] * Vector::new(factor));
                }
            }
            if comptime!(walk.lse) {
                if lane == 0 {
                    lse[place] = log_sum_exp(max[r], total[r]);
                }
            }
        }
    }
}

/// Rows `from .. from + count` of a head into the tile; 0 in the rows after them.
#[cube]
fn fill<E: Float, N: Size>(
    x: &Tensor<Vector<E, N>>,
    tile: &mut Shared<[Vector<f32, N>]>,
    base: usize,
    from: usize,
    count: usize,
    unit: usize,
    #[comptime] units: usize,
    #[comptime] rows: usize,
    #[comptime] pitch: usize,
    #[comptime] gaps: bool,
) {
    let chunks = comptime!(pitch - 1);
    let mut slot = unit;
    while slot < rows * chunks {
        let row = slot / chunks;
        let mut value = Vector::<f32, N>::new(0.0f32);
        if row < count {
            value = load::<E, N>(x, base + (from + row) * x.stride(2), slot % chunks, gaps);
        }
        tile[row * pitch + slot % chunks] = value;
        slot += units;
    }
}

/// Vector `c` of the row at element `base`.
#[cube]
fn load<E: Float, N: Size>(
    x: &Tensor<Vector<E, N>>,
    base: usize,
    c: usize,
    #[comptime] gaps: bool,
) -> Vector<f32, N> {
    let width = N::value();
    let mut place = base / width + c;
    if comptime!(gaps) {
        place = base + c * x.stride(3);
    }
    Vector::cast_from(x[place])
}

#[cube]
fn add<N: Size>(x: Vector<f32, N>) -> f32 {
    let mut sum = x.extract(0usize);
    let width = N::value();
    #[unroll]
    for i in 1..width {
        sum += x.extract(i);
    }
    sum
}

/// `x`, or zeros.
#[cube]
fn select_vector<N: Size>(keep: bool, x: Vector<f32, N>) -> Vector<f32, N> {
    let mut out = x;
    if !keep {
        out = Vector::new(0.0f32);
    }
    out
}
