//! A unit for a few queries of one head: no planes, no shared memory, no barriers. What CPUs run,
//! and GPUs without subgroups.

use cubecl::prelude::*;

use super::softmax::{inverse, log_sum_exp, nothing, reference};
use super::walk::{WalkShape, tile, word};
use super::{AttendNumbers, AttendProblem, Attended, buffers, numbers};
use crate::capabilities::Capabilities;
use crate::operand::buffer;
use crate::span::Spans;
use crate::work::{cube_count, launch, widest};

/// Queries a unit of a CPU: each key and value is read once for all of them. On a GPU it is one,
/// whose output then fits into registers.
const QUERIES: usize = 8;

pub(super) fn launch(
    client: &Client,
    capabilities: &Capabilities,
    problem: &AttendProblem,
    attended: &Attended,
) {
    let [batch, heads, _, dim] = problem.q.shape;
    let block = problem.grids[0].block();
    let spans = Spans::new(client, problem.grids);
    let on_cpu = capabilities.cores.is_some();
    let queries = if on_cpu { QUERIES.min(block) } else { 1 };
    let tiles = block.div_ceil(queries);
    let items = batch * heads * prism_core::selection::extent(problem.grids).0 * tiles;
    let (units, bytes) = match capabilities.cores {
        Some(cores) => (cores, 64),
        None => (32u32.min(capabilities.units), 16),
    };
    let operands = [problem.q, problem.k, problem.v];
    let fits = operands.map(|x| x.vector_size(bytes * x.element.size() / 4));
    let vector = widest(client, fits.into_iter().min().unwrap_or(1));
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
            attend_unit,
            client,
            cube_count(client, items.div_ceil(units as usize)),
            CubeDim::new_1d(units),
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
            UnitShape { walk, dim, queries, gaps, unrolled: !on_cpu },
            problem.q.element.elem_type(),
        );
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct UnitShape {
    walk: WalkShape,
    dim: usize,
    queries: usize,
    /// Whether the last dim of a tensor has gaps.
    gaps: bool,
    /// Whether loops over the dims are unrolled, as arrays in registers need.
    unrolled: bool,
}

/// Element `c` of a row at `base`, which counts elements, in vectors.
#[cube]
fn at<E: Float, N: Size>(
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

#[cube(launch_unchecked, create_dummy_kernel, address_type = "dynamic")]
fn attend_unit<E: Float, N: Size>(
    q: &Tensor<Vector<E, N>>,
    k: &Tensor<Vector<E, N>>,
    v: &Tensor<Vector<E, N>>,
    out: &mut [Vector<E, N>],
    lse: &mut [f32],
    words: &[u32],
    order: &[u32],
    lengths: &[u32],
    numbers: AttendNumbers,
    #[comptime] shape: UnitShape,
    #[define(E)] _element: ElemType,
) {
    let walk = comptime!(shape.walk);
    let block = comptime!(walk.block);
    let queries = comptime!(shape.queries);
    let gaps = comptime!(shape.gaps);
    let width = N::value();
    let chunks = comptime!(shape.dim / width);
    let unrolled = comptime!(shape.unrolled);
    let i = ABSOLUTE_POS;
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

    let mut query = Array::<Vector<f32, N>>::new(comptime!(queries * chunks));
    let mut sum = Array::<Vector<f32, N>>::new(comptime!(queries * chunks));
    let mut max = Array::<f32>::new(queries);
    let mut total = Array::<f32>::new(queries);
    #[unroll(unrolled)]
    for r in 0..queries {
        max[r] = nothing();
        total[r] = 0.0f32;
        let index = tile.query + r.min(end - first - 1);
        #[unroll(unrolled)]
        for c in 0..chunks {
            let x = at::<E, N>(q, q_base + index * q.stride(2), c, gaps);
            query[r * chunks + c] = x * Vector::new(numbers.scale);
            sum[r * chunks + c] = Vector::new(0.0f32);
        }
    }

    for w in 0..causal.div_ceil(32usize) {
        let mut bits = word(words, &numbers, line, w, causal, comptime!(walk.dense));
        while bits != 0u32 {
            let bit = bits.find_first_set() - 1u32;
            bits &= bits - 1u32;
            let start = (w * 32 + bit as usize) * block;
            for key in start..(start + block).min(end) {
                let mut dots = Array::<Vector<f32, N>>::new(queries);
                #[unroll(unrolled)]
                for r in 0..queries {
                    dots[r] = Vector::new(0.0f32);
                }
                #[unroll(unrolled)]
                for c in 0..chunks {
                    let x = at::<E, N>(k, k_base + key * k.stride(2), c, gaps);
                    #[unroll]
                    for r in 0..queries {
                        dots[r] += query[r * chunks + c] * x;
                    }
                }
                #[unroll(unrolled)]
                for r in 0..queries {
                    if key <= first + r {
                        let score = fold::<N>(dots[r]);
                        let mut weight = 1.0f32;
                        // Not `score <= max`: a NaN score must not be taken for a small one.
                        if score > max[r] {
                            let factor = (reference(max[r]) - score).exp();
                            let factor = select(max[r] == nothing(), 0.0f32, factor);
                            total[r] *= factor;
                            #[unroll(unrolled)]
                            for c in 0..chunks {
                                sum[r * chunks + c] *= Vector::new(factor);
                            }
                            max[r] = score;
                        } else {
                            weight = (score - reference(max[r])).exp();
                        }
                        total[r] += weight;
                        #[unroll(unrolled)]
                        for c in 0..chunks {
                            let x = at::<E, N>(v, v_base + key * v.stride(2), c, gaps);
                            sum[r * chunks + c] += Vector::new(weight) * x;
                        }
                    }
                }
            }
        }
    }

    #[unroll(unrolled)]
    for r in 0..queries {
        if first + r < end {
            let place = tile.place + r;
            let factor = inverse(total[r]);
            #[unroll(unrolled)]
            for c in 0..chunks {
                out[place * chunks + c] =
                    Vector::cast_from(sum[r * chunks + c] * Vector::new(factor));
            }
            if comptime!(walk.lse) {
                lse[place] = log_sum_exp(max[r], total[r]);
            }
        }
    }
}

/// Sum of a vector's elements, by halves.
#[cube]
fn fold<N: Size>(x: Vector<f32, N>) -> f32 {
    let width = N::value();
    let mut parts = Array::<f32>::new(width);
    #[unroll]
    for i in 0..width {
        parts[i] = x.extract(i);
    }
    #[unroll]
    for level in 0..comptime!(width.ilog2() as usize) {
        let half = comptime!(width >> (level + 1));
        #[unroll]
        for i in 0..half {
            let other = parts[i + half];
            parts[i] += other;
        }
    }
    parts[0]
}
