//! Tensor cores through `mma.sync` m16n8k16: f16 or bf16 operands, f32 accumulators. Each warp
//! owns 16 or 32 queries of a tile, whose keys and values pass through shared memory; where the
//! device copies asynchronously, the next tile arrives while this one is computed.
//!
//! Fragments follow the layouts of the PTX manual ("Matrix fragments for mma.m16n8k16"): a lane
//! holds columns 2(l mod 4), +1 of rows l/4 and l/4 + 8 of an accumulator, and two neighbouring
//! accumulators, rounded, are just the A operand of the second product.

use cubecl::cmma::{MatrixIdent, MmaDefinition};
use cubecl::prelude::*;

use super::copies::{WIDE, commit_copies, fill, wait_copies};
use super::guard::{clean, spoil, spotless};
use super::softmax::{inverse, log_sum_exp, nothing, reference};
use super::walk::{Tile, WalkShape, tile, word};
use super::{AttendNumbers, AttendProblem, Attended, RungError, buffers, numbers};
use crate::capabilities::Capabilities;
use crate::operand::{Element, buffer};
use crate::span::Spans;
use crate::special::exp2;
use crate::work::{cube_count, launch};

/// How the kernel is laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct MmaShape {
    walk: WalkShape,
    dim: usize,
    /// Warps a cube.
    pub warps: usize,
    /// 16-row tiles of queries a warp.
    pub m_tiles: usize,
    /// Keys a tile.
    pub keys: usize,
    /// Tiles of keys and values in shared memory.
    pub stages: usize,
    /// Whether tiles are copied asynchronously and `ex2` is there: CubeCL's C++ compiler.
    asynchronous: bool,
    bf16: bool,
}

impl MmaShape {
    /// Queries a cube.
    pub fn queries(&self) -> usize {
        self.warps * self.m_tiles * 16
    }

    /// Vectors of 16 bytes from one row in shared memory to the next: an odd number, so that the
    /// eight rows that `ldmatrix` reads at once lie in different banks.
    fn pitch(&self) -> usize {
        self.dim / WIDE + 1
    }

    fn shared_memory(&self) -> usize {
        (self.queries() + 2 * self.stages * self.keys) * self.pitch() * 16 + (self.dim + 1) * 4
    }

    /// The layout for a head_dim and block size that fits a device, if any does.
    fn fitting(capabilities: &Capabilities, dim: usize, block: usize) -> Result<Self, RungError> {
        let asynchronous = capabilities.copy_async;
        // The output of 32 queries by 128 dims fills half the registers of a warp.
        let m_tiles = if dim <= 128 && block >= 128 { 2 } else { 1 };
        let most = if m_tiles == 2 { 4 } else { 8 };
        let warps = block.div_ceil(16 * m_tiles).clamp(1, most);
        let walk = WalkShape {
            block,
            dense: true,
            ordered: false,
            ragged: false,
            lse: false,
            tiles: block.div_ceil(warps * m_tiles * 16),
        };
        let widest = if dim <= 128 { 64 } else { 32 };
        let shape = Self {
            walk,
            dim,
            warps,
            m_tiles,
            keys: widest.min(block.next_multiple_of(16)),
            stages: if asynchronous { 2 } else { 1 },
            asynchronous,
            bf16: false,
        };
        let mut shapes = vec![shape];
        shapes.push(Self { keys: 32.min(shape.keys), ..shape });
        shapes.push(Self { keys: 16, ..shape });
        let has = capabilities.shared_memory;
        let needs = shapes[2].shared_memory();
        let fitting = shapes.into_iter().find(|shape| shape.shared_memory() <= has);
        fitting.ok_or(RungError::SharedMemory { needs, has })
    }
}

/// Whether the rung runs.
pub(super) fn check(
    capabilities: &Capabilities,
    element: Element,
    dim: usize,
) -> Result<(), RungError> {
    if !capabilities.mma(element) {
        return Err(RungError::NoTensorCores(element));
    }
    if dim % 16 != 0 || dim > 256 {
        return Err(RungError::HeadDim(dim));
    }
    MmaShape::fitting(capabilities, dim, 128).map(|_| ())
}

/// The layout for a problem on a device that passed [`check`].
pub(super) fn layout(
    capabilities: &Capabilities,
    problem: &AttendProblem,
    ragged: bool,
) -> Option<MmaShape> {
    let block = problem.grids.first()?.block();
    let mut shape = MmaShape::fitting(capabilities, problem.q.shape[3], block).ok()?;
    shape.bf16 = problem.q.element == Element::BF16;
    shape.walk.dense = problem.selection.is_none();
    shape.walk.ordered = problem.order.is_some();
    shape.walk.lse = problem.lse;
    shape.walk.ragged = ragged;
    Some(shape)
}

pub(super) fn launch(
    client: &Client,
    capabilities: &Capabilities,
    problem: &AttendProblem,
    attended: &Attended,
) {
    let spans = Spans::new(client, problem.grids);
    if let Some(shape) = layout(capabilities, problem, spans.ragged()) {
        launch_shape(client, problem, attended, &spans, shape);
    }
}

fn launch_shape(
    client: &Client,
    problem: &AttendProblem,
    attended: &Attended,
    spans: &Spans,
    shape: MmaShape,
) {
    let [batch, heads, _, dim] = problem.q.shape;
    let items = batch * heads * prism_core::selection::extent(problem.grids).0 * shape.walk.tiles;
    let operands = [problem.q, problem.k, problem.v];
    let address = operands.map(|x| x.address_type()).into_iter().max().unwrap_or_default();
    let [words, order, lengths, lse] = buffers(problem, spans, attended);
    let pairs = problem.q.shape.iter().product::<usize>() / 2;
    debug_assert_eq!(dim, shape.dim);
    // SAFETY: every query of an item lies in its sequence, and items past the end return.
    unsafe {
        launch!(
            attend_mma,
            client,
            cube_count(client, items),
            CubeDim::new_2d(32, shape.warps as u32),
            address,
            WIDE,
            2,
            problem.q.arg(),
            problem.k.arg(),
            problem.v.arg(),
            buffer(&attended.out, pairs),
            lse,
            words,
            order,
            lengths,
            numbers(problem, spans, items),
            shape,
            problem.q.element.elem_type(),
        );
    }
}

#[cube(launch_unchecked, create_dummy_kernel, address_type = "dynamic")]
fn attend_mma<E: Float, N: Size, P: Size>(
    q: &Tensor<Vector<E, N>>,
    k: &Tensor<Vector<E, N>>,
    v: &Tensor<Vector<E, N>>,
    out: &mut [Vector<E, P>],
    lse: &mut [f32],
    words: &[u32],
    order: &[u32],
    lengths: &[u32],
    numbers: AttendNumbers,
    #[comptime] shape: MmaShape,
    #[define(E)] _element: ElemType,
) {
    let walk = comptime!(shape.walk);
    let pitch = comptime!(shape.pitch());
    let tiles = comptime!(shape.stages * shape.keys);
    let queries = comptime!(shape.queries());
    let mut q_tile =
        Shared::<[Vector<E, N>]>::new_aligned_slice(comptime!(queries * pitch), 16usize);
    let mut k_tile = Shared::<[Vector<E, N>]>::new_aligned_slice(comptime!(tiles * pitch), 16usize);
    let mut v_tile = Shared::<[Vector<E, N>]>::new_aligned_slice(comptime!(tiles * pitch), 16usize);
    let spoilt = Shared::<[Atomic<u32>]>::new_slice(comptime!(shape.dim + 1));
    let i = CUBE_POS;
    if i >= numbers.items {
        terminate!();
    }
    let tile = tile(order, lengths, &numbers, i, queries, walk);
    if tile.is_empty() {
        terminate!();
    }
    attend_tile::<E, N, P>(
        q,
        k,
        v,
        out,
        lse,
        words,
        &numbers,
        &tile,
        &mut q_tile,
        &mut k_tile,
        &mut v_tile,
        &spoilt,
        shape,
    );
}

/// Attention of the queries of one tile.
#[cube]
fn attend_tile<E: Float, N: Size, P: Size>(
    q: &Tensor<Vector<E, N>>,
    k: &Tensor<Vector<E, N>>,
    v: &Tensor<Vector<E, N>>,
    out: &mut [Vector<E, P>],
    lse: &mut [f32],
    words: &[u32],
    numbers: &AttendNumbers,
    tile: &Tile,
    q_tile: &mut Shared<[Vector<E, N>]>,
    k_tile: &mut Shared<[Vector<E, N>]>,
    v_tile: &mut Shared<[Vector<E, N>]>,
    spoilt: &Shared<[Atomic<u32>]>,
    #[comptime] shape: MmaShape,
) {
    let walk = comptime!(shape.walk);
    let block = comptime!(walk.block);
    let pitch = comptime!(shape.pitch());
    let chunks = comptime!(shape.dim / WIDE);
    let tile_keys = comptime!(shape.keys);
    let stages = comptime!(shape.stages);
    let queries = comptime!(shape.queries());
    let units = comptime!(shape.warps * 32);
    let m_tiles = comptime!(shape.m_tiles);
    // 8-wide tiles of the scores and of the output.
    let key_tiles = comptime!(shape.keys / 8);
    let dim_tiles = comptime!(shape.dim / 8);
    let halves = comptime!(shape.m_tiles * 2);
    let asynchronous = comptime!(shape.asynchronous);

    let (first, end, causal, line) = (tile.first, tile.end, tile.causal, tile.line);
    let q_base = (tile.batch * q.stride(0) + tile.head * q.stride(1)) / WIDE;
    let k_base = (tile.batch * k.stride(0) + tile.kv_head * k.stride(1)) / WIDE;
    let v_base = (tile.batch * v.stride(0) + tile.kv_head * v.stride(1)) / WIDE;
    let q_stride = q.stride(2) / WIDE;
    let k_stride = k.stride(2) / WIDE;
    let v_stride = v.stride(2) / WIDE;
    let unit = UNIT_POS as usize;
    let lane = UNIT_POS_X as usize;
    let own = UNIT_POS_Y as usize * comptime!(shape.m_tiles * 16);
    spotless(spoilt, unit, units, comptime!(shape.dim));

    fill::<E, N>(
        q,
        q_tile,
        0usize,
        q_base + tile.query * q_stride,
        q_stride,
        end - first,
        unit,
        units,
        queries,
        chunks,
        asynchronous,
    );

    let def = MmaDefinition::<E, E, f32>::new(16usize, 8usize, 16usize);
    let size!(NF) = def.vector_size(MatrixIdent::A);
    let size!(NC) = def.vector_size(MatrixIdent::Accumulator);

    let mut sum = Array::<Vector<f32, NC>>::new(comptime!(halves * dim_tiles));
    #[unroll]
    for n in 0..halves * dim_tiles {
        sum[n] = Vector::new(0.0f32);
    }
    let mut max = Array::<f32>::new(halves);
    let mut total = Array::<f32>::new(halves);
    #[unroll]
    for r in 0..halves {
        max[r] = nothing();
        total[r] = 0.0f32;
    }
    // Exponentials are taken to base 2.
    let factor = numbers.scale * comptime!(std::f32::consts::LOG2_E);

    // The walk: word `w` with its bits still to come, and the next tile of the current block.
    let words_of_row = causal.div_ceil(32usize);
    let mut w = 0usize;
    let mut bits = word(words, numbers, line, w, causal, comptime!(walk.dense));
    let mut next = 0usize;
    let mut stop = 0usize;
    let mut stage = 0usize;
    let mut start = 0usize;
    let mut loaded = false;
    let mut more = true;
    while more {
        // The tile after the one in flight.
        if next >= stop {
            while bits == 0u32 && w + 1 < words_of_row {
                w += 1;
                bits = word(words, numbers, line, w, causal, comptime!(walk.dense));
            }
            if bits != 0u32 {
                let bit = bits.find_first_set() - 1u32;
                bits &= bits - 1u32;
                next = (w * 32 + bit as usize) * block;
                stop = (next + block).min(end);
            }
        }
        let found = next < stop;
        let coming = next;
        let filling = if comptime!(stages == 2) { 1 - stage } else { 0usize.runtime() };
        let offset = filling * comptime!(tile_keys * pitch);
        let rows = if found { (stop - next).min(tile_keys) } else { 0usize.runtime() };
        if comptime!(asynchronous) {
            // The tile in flight has arrived, and nobody reads the one to be replaced.
            wait_copies();
            sync_cube();
            if found {
                let from = (k_base + coming * k_stride, v_base + coming * v_stride);
                fill::<E, N>(
                    k, k_tile, offset, from.0, k_stride, rows, unit, units, tile_keys, chunks, true,
                );
                fill::<E, N>(
                    v, v_tile, offset, from.1, v_stride, rows, unit, units, tile_keys, chunks, true,
                );
                commit_copies();
            }
        }
        if loaded {
            let base = stage * comptime!(tile_keys * pitch);
            if start + tile_keys > first + 1 {
                // Values that some of the queries must not see.
                clean::<E, N>(v_tile, base, start, unit, units, tile_keys, chunks, spoilt);
                sync_cube();
            }
            // S = Q Kᵀ.
            let mut scores = Array::<Vector<f32, NC>>::new(comptime!(halves * key_tiles));
            #[unroll]
            for n in 0..halves * key_tiles {
                scores[n] = Vector::new(0.0f32);
            }
            #[unroll]
            for s in 0..comptime!(shape.dim / 16) {
                let mut query = Sequence::<Array<Vector<E, NF>>>::new();
                #[unroll]
                for t in 0..m_tiles {
                    let at = (own + t * 16 + lane % 16) * pitch + s * 2 + lane / 16;
                    query.push(def.load_matrix::<_, NF>(
                        &q_tile[at..at + 1],
                        MatrixIdent::A,
                        4usize,
                        false,
                    ));
                }
                #[unroll]
                for n in 0..comptime!(shape.keys / 16) {
                    let at = base
                        + (n * 16 + (lane / 16) * 8 + lane % 8) * pitch
                        + s * 2
                        + (lane / 8) % 2;
                    let key = def.load_matrix::<_, NF>(
                        &k_tile[at..at + 1],
                        MatrixIdent::B,
                        4usize,
                        false,
                    );
                    #[unroll]
                    for j in 0..2usize {
                        let mut b = Array::<Vector<E, NF>>::new(2usize);
                        b[0] = key[j * 2];
                        b[1] = key[j * 2 + 1];
                        #[unroll]
                        for t in 0..m_tiles {
                            let c = (t * key_tiles + n * 2 + j) * 2;
                            let mut acc = Array::<Vector<f32, NC>>::new(2usize);
                            acc[0] = scores[c];
                            acc[1] = scores[c + 1];
                            let acc = def.execute::<NF, NF, NC>(&query[t], &b, &acc);
                            scores[c] = acc[0];
                            scores[c + 1] = acc[1];
                        }
                    }
                }
            }

            // Keys after a query, or past the end of the sequence.
            let last = start + tile_keys;
            if last > first + 1 {
                #[unroll]
                for t in 0..m_tiles {
                    #[unroll]
                    for n in 0..key_tiles {
                        #[unroll]
                        for h in 0..2usize {
                            let position = first + own + t * 16 + h * 8 + lane / 4;
                            let key = start + n * 8 + (lane % 4) * 2;
                            let c = (t * key_tiles + n) * 2 + h;
                            let pair = scores[c];
                            let mut masked = Vector::<f32, NC>::new(nothing());
                            masked.insert(
                                0usize,
                                select(key <= position, pair.extract(0usize), nothing()),
                            );
                            masked.insert(
                                1usize,
                                select(key < position, pair.extract(1usize), nothing()),
                            );
                            scores[c] = masked;
                        }
                    }
                }
            }
            // Blocks that don't end on a tile: the next block's keys aren't this one's.
            if comptime!(block % shape.keys != 0) {
                let limit = (start / block + 1) * block;
                if last > limit {
                    #[unroll]
                    for c in 0..halves * key_tiles {
                        let n = comptime!((c / 2) % key_tiles);
                        let key = start + n * 8 + (lane % 4) * 2;
                        let pair = scores[c];
                        let mut masked = Vector::<f32, NC>::new(nothing());
                        masked.insert(0usize, select(key < limit, pair.extract(0usize), nothing()));
                        masked.insert(
                            1usize,
                            select(key + 1 < limit, pair.extract(1usize), nothing()),
                        );
                        scores[c] = masked;
                    }
                }
            }

            // Online softmax; the output is rescaled only where a maximum rose.
            #[unroll]
            for r in 0..halves {
                let t = comptime!(r / 2);
                let h = comptime!(r % 2);
                let mut highest = max[r];
                #[unroll]
                for n in 0..key_tiles {
                    let pair = scores[(t * key_tiles + n) * 2 + h];
                    highest = highest.max(pair.extract(0usize).max(pair.extract(1usize)));
                }
                highest = highest.max(plane_shuffle_xor(highest, 1u32));
                highest = highest.max(plane_shuffle_xor(highest, 2u32));
                if plane_any(highest > max[r]) {
                    let risen = (reference(max[r]) - reference(highest)) * factor;
                    // Nothing yet, and 2^risen may be infinite: 0 · ∞.
                    let first_seen = max[r] == nothing();
                    let shrink = select(first_seen, 0.0f32, exp2(risen, asynchronous));
                    total[r] *= shrink;
                    #[unroll]
                    for n in 0..dim_tiles {
                        sum[(t * dim_tiles + n) * 2 + h] *= Vector::new(shrink);
                    }
                    max[r] = highest;
                }
                let base = -reference(max[r]) * factor;
                #[unroll]
                for n in 0..key_tiles {
                    let c = (t * key_tiles + n) * 2 + h;
                    let pair = scores[c];
                    let x = exp2(fma(pair.extract(0usize), factor, base), asynchronous);
                    let y = exp2(fma(pair.extract(1usize), factor, base), asynchronous);
                    total[r] += x + y;
                    let mut weights = Vector::<f32, NC>::new(x);
                    weights.insert(1usize, y);
                    scores[c] = weights;
                }
            }

            // O += P V.
            #[unroll]
            for s in 0..comptime!(shape.keys / 16) {
                let mut weights = Sequence::<Array<Vector<E, NF>>>::new();
                #[unroll]
                for t in 0..m_tiles {
                    let mut a = Array::<Vector<E, NF>>::new(4usize);
                    #[unroll]
                    for part in 0..4usize {
                        let c = (t * key_tiles + s * 2 + part / 2) * 2 + part % 2;
                        a[part] =
                            round_pair::<E, NF, NC>(scores[c], asynchronous, comptime!(shape.bf16));
                    }
                    weights.push(a);
                }
                #[unroll]
                for n in 0..comptime!(shape.dim / 16) {
                    let at = base + (s * 16 + lane % 16) * pitch + n * 2 + lane / 16;
                    let value =
                        def.load_matrix::<_, NF>(&v_tile[at..at + 1], MatrixIdent::B, 4usize, true);
                    #[unroll]
                    for j in 0..2usize {
                        let mut b = Array::<Vector<E, NF>>::new(2usize);
                        b[0] = value[j * 2];
                        b[1] = value[j * 2 + 1];
                        #[unroll]
                        for t in 0..m_tiles {
                            let c = (t * dim_tiles + n * 2 + j) * 2;
                            let mut acc = Array::<Vector<f32, NC>>::new(2usize);
                            acc[0] = sum[c];
                            acc[1] = sum[c + 1];
                            let acc = def.execute::<NF, NF, NC>(&weights[t], &b, &acc);
                            sum[c] = acc[0];
                            sum[c + 1] = acc[1];
                        }
                    }
                }
            }
        }
        if comptime!(!asynchronous) {
            sync_cube();
            if found {
                let from = (k_base + coming * k_stride, v_base + coming * v_stride);
                fill::<E, N>(
                    k, k_tile, offset, from.0, k_stride, rows, unit, units, tile_keys, chunks,
                    false,
                );
                fill::<E, N>(
                    v, v_tile, offset, from.1, v_stride, rows, unit, units, tile_keys, chunks,
                    false,
                );
            }
            sync_cube();
        }
        stage = filling;
        start = coming;
        loaded = found;
        more = found;
        next += tile_keys;
    }

    let bad = spoilt[comptime!(shape.dim)].load() as usize;
    #[unroll]
    for r in 0..halves {
        let t = comptime!(r / 2);
        let h = comptime!(r % 2);
        // Each lane of a quad summed its own columns.
        let mut all = total[r];
        all += plane_shuffle_xor(all, 1u32);
        all += plane_shuffle_xor(all, 2u32);
        let query = own + t * 16 + h * 8 + lane / 4;
        if first + query < end {
            let place = tile.place + query;
            let share = inverse(all);
            if first + query >= bad {
                #[unroll]
                for n in 0..dim_tiles {
                    let pair = sum[(t * dim_tiles + n) * 2 + h];
                    sum[(t * dim_tiles + n) * 2 + h] =
                        spoil(pair, spoilt, n * 8 + (lane % 4) * 2, first + query);
                }
            }
            #[unroll]
            for n in 0..dim_tiles {
                let pair = sum[(t * dim_tiles + n) * 2 + h] * Vector::new(share);
                let mut rounded = Vector::<E, P>::new(E::from_int(0));
                rounded.insert(0usize, E::cast_from(pair.extract(0usize)));
                rounded.insert(1usize, E::cast_from(pair.extract(1usize)));
                out[place * comptime!(shape.dim / 2) + n * 4 + lane % 4] = rounded;
            }
            if comptime!(walk.lse) {
                if lane % 4 == 0 {
                    lse[place] = log_sum_exp(max[r] * numbers.scale, all);
                }
            }
        }
    }
}

/// Two weights rounded to the element type, in the order of a fragment's register.
#[cube]
fn round_pair<E: Float, NF: Size, NC: Size>(
    pair: Vector<f32, NC>,
    #[comptime] ptx: bool,
    #[comptime] bf16: bool,
) -> Vector<E, NF> {
    if comptime!(ptx) {
        let name = comptime!(if bf16 { "bf16x2" } else { "f16x2" });
        let low = pair.extract(0usize);
        let high = pair.extract(1usize);
        let packed: u32;
        gpu_asm!(
            "cvt.rn.{name}.f32 {d}, {h}, {l};",
            d = out(_) packed, h = in(_) high, l = in(_) low, options(pure, nomem)
        );
        Vector::<E, NF>::reinterpret(packed)
    } else {
        let mut rounded = Vector::<E, NF>::new(E::from_int(0));
        rounded.insert(0usize, E::cast_from(pair.extract(0usize)));
        rounded.insert(1usize, E::cast_from(pair.extract(1usize)));
        rounded
    }
}
