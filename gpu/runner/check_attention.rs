//! Every rung against the definition in f64 on sampled rows, with outputs poisoned beforehand.

use cubecl::prelude::*;
use prism_bench::report::{Check, Run};
use prism_core::BlockGrid;
use prism_core::selection::extent;
use prism_kernels::attend::{AttendProblem, AttendRung, Attended, attend_into};
use prism_kernels::schedule::schedule;
use prism_kernels::{Element, Operand};
use rayon::prelude::*;

use crate::check::values;
use prism_bench::Gpu;
use prism_bench::inputs::{
    Dims, exact, poisoned, random_selection, tensor, upload, upload_values, value,
};

pub(super) const ELEMENTS: [Element; 3] = [Element::F32, Element::F16, Element::BF16];

pub(super) fn grids(
    dims: Dims,
    block: usize,
    lengths: Option<&[(usize, usize)]>,
) -> Vec<BlockGrid> {
    let [batch, _, _, q_len, kv_len, _] = dims;
    let uniform = vec![(q_len, kv_len); batch];
    let pairs = lengths.unwrap_or(&uniform).iter();
    pairs.map(|&(q, kv)| BlockGrid::new(block, q, kv).expect("a block size in range")).collect()
}

pub(super) fn attention(
    gpu: &Gpu,
    dims: Dims,
    block: usize,
    lengths: Option<&[(usize, usize)]>,
    element: Element,
    (sharpness, prescaled): (f64, bool),
    run: &mut Run,
) {
    let [batch, q_heads, kv_heads, q_len, kv_len, dim] = dims;
    let grids = grids(dims, block, lengths);
    let mut q = tensor(gpu, 1, [batch, q_heads, q_len, dim], element);
    let mut scale = sharpness / (dim as f64).sqrt();
    if prescaled {
        // A power of two in Q rounds nothing.
        let power = (scale * std::f64::consts::LOG2_E).log2().round().exp2();
        scale = power * std::f64::consts::LN_2;
        let len = q.shape.iter().product::<usize>();
        let values = (0..len).map(|i| (value(1, i, element) * power) as f32);
        q = upload_values(gpu, &values.collect::<Vec<_>>(), q.shape, element);
    }
    // K and V as a cache of room for more holds them: strided views.
    let room = kv_len + 37;
    let view = |seed| {
        let cache = tensor(gpu, seed, [batch, kv_heads, room, dim], element);
        Operand { shape: [batch, kv_heads, kv_len, dim], ..cache }
    };
    let (k, v) = (view(2), view(3));
    let host = random_selection(&grids, q_heads, 0.3).expect("a selection");
    let selection = upload(gpu, &host);
    let heads = [batch, q_heads, kv_heads];
    let order = schedule(&gpu.client, &gpu.capabilities, &selection, heads, extent(&grids).1);
    let rows = sample(&grids, q_heads, q_len);
    for sparse in [false, true] {
        let want: Vec<(Vec<f64>, f64)> = rows
            .par_iter()
            .map(|&row| exact(dims, room, &grids, sparse.then_some(&host), row, scale, element))
            .collect();
        let chosen = sparse.then_some(&selection);
        let problem =
            AttendProblem::new(&q, &k, &v, &grids, chosen, sparse.then_some(&order), scale, true);
        let problem = AttendProblem { prescaled, ..problem };
        for rung in AttendRung::LADDER {
            // The slow rungs on the long prompts only where nothing quicker is there.
            let skip = rung == AttendRung::Unit && kv_len > 1000
                || rung == AttendRung::Plane && kv_len > 5000 && element != Element::F32;
            if skip || rung.check(&gpu.capabilities, &problem).is_err() {
                continue;
            }
            let lines = batch * q_heads * q_len;
            let attended = Attended {
                out: poisoned(gpu, lines * dim, element),
                lse: Some(poisoned(gpu, lines, Element::F32)),
            };
            attend_into(&gpu.client, &gpu.capabilities, &problem, &attended, rung);
            let out = values(gpu, &attended.out, element);
            let lse = values(gpu, attended.lse.as_ref().expect("asked for"), Element::F32);
            let detail = compare(&rows, &want, &out, &lse, dims, element, sharpness);
            let name = format!(
                "attend {rung} {element:?} {dims:?} block {block} sharpness {sharpness} {} {} {}",
                if sparse { "sparse" } else { "dense" },
                if lengths.is_some() { "ragged" } else { "" },
                if prescaled { "prescaled" } else { "" },
            );
            push(run, name, detail);
        }
    }
}

/// NaN and infinities reach the queries that see them, in their dims, and change nothing else; nor does
/// what lies behind the end of a shorter sequence.
pub(super) fn bad_values(gpu: &Gpu, run: &mut Run) {
    let (q_len, kv_len, heads) = (300, 400, 2);
    let lengths = [(q_len, kv_len), (200, 250)];
    for dim in [64, 80, 128] {
        // In the first kv head of the first sequence: position, dim, value.
        let bad = [(330, dim - 3, f32::NAN), (345, 5, f32::INFINITY), (20, 6, f32::NEG_INFINITY)];
        for element in ELEMENTS {
            let operand = |seed, heads: usize, len: usize, ends: [usize; 2], spoilt: bool| {
                let shape = [2, heads, len, dim];
                let mut x: Vec<f32> =
                    (0..shape.iter().product()).map(|i| value(seed, i, element) as f32).collect();
                for (line, row) in x.chunks_mut(dim).enumerate() {
                    let (b, position) = (line / heads / len, line % len);
                    if position >= ends[b] {
                        row.fill(if spoilt { f32::NAN } else { 0.0 });
                    }
                    for (at, c, value) in bad {
                        if seed == 3 && line < len && position == at {
                            row[c] = if spoilt { value } else { 0.0 };
                        }
                    }
                }
                upload_values(gpu, &x, shape, element)
            };
            let grids = lengths.map(|(q, kv)| BlockGrid::new(128, q, kv).expect("a grid"));
            for rung in AttendRung::LADDER {
                let results = [false, true].map(|spoilt| {
                    let q = operand(1, heads, q_len, [lengths[0].0, lengths[1].0], spoilt);
                    let [k, v] = [2, 3]
                        .map(|seed| operand(seed, 1, kv_len, [lengths[0].1, lengths[1].1], spoilt));
                    let problem = AttendProblem::new(&q, &k, &v, &grids, None, None, 0.1, true);
                    let lines = 2 * heads * q_len;
                    let attended = Attended {
                        out: poisoned(gpu, lines * dim, element),
                        lse: Some(poisoned(gpu, lines, Element::F32)),
                    };
                    rung.check(&gpu.capabilities, &problem).ok()?;
                    attend_into(&gpu.client, &gpu.capabilities, &problem, &attended, rung);
                    let lse = attended.lse.as_ref().map(|lse| values(gpu, lse, Element::F32));
                    Some((values(gpu, &attended.out, element), lse))
                });
                let [Some((clean, clean_lse)), Some((out, lse))] = results else { continue };
                let wrong = (0..out.len()).find(|&i| {
                    let (line, c) = (i / dim, i % dim);
                    let position = line % q_len + kv_len - q_len;
                    let sees = |&(at, dim, _): &(usize, usize, f32)| dim == c && position >= at;
                    let spoils = line < heads * q_len && bad.iter().any(sees);
                    if spoils { out[i].is_finite() } else { out[i] != clean[i] }
                });
                let name = format!("attend {rung} {element:?} with bad values, head_dim {dim}");
                let result = match wrong {
                    Some(i) => Err(format!("at {i}: {} for {}", out[i], clean[i])),
                    None if lse != clean_lse => Err("LSE differs".into()),
                    None => Ok(String::new()),
                };
                push(run, name, result);
            }
        }
    }
}

pub fn push(run: &mut Run, name: String, result: Result<String, String>) {
    let (passed, detail) = match result {
        Ok(detail) => (true, detail),
        Err(detail) => (false, detail),
    };
    if !passed {
        println!("FAILED {name}: {detail}");
    }
    run.checks.push(Check { name, passed, detail });
}

/// Sampled queries, as (sequence, head, query): edges of blocks, ends, and some between.
fn sample(grids: &[BlockGrid], heads: usize, q_len: usize) -> Vec<(usize, usize, usize)> {
    let mut queries: Vec<usize> = vec![0, 1, 15, 16, 63, 64, 65, 127, 128, 129];
    queries.extend([q_len / 3, q_len / 2, q_len.saturating_sub(2), q_len - 1]);
    queries.retain(|&i| i < q_len);
    queries.sort_unstable();
    queries.dedup();
    let mut rows = Vec::new();
    for b in 0..grids.len() {
        for h in [0, heads / 2, heads - 1] {
            rows.extend(queries.iter().map(|&i| (b, h, i)));
        }
    }
    rows.sort_unstable();
    rows.dedup();
    rows
}

/// Relative error of all sampled rows, the worst cosine, the worst LSE; `Err` past a limit.
fn compare(
    rows: &[(usize, usize, usize)],
    want: &[(Vec<f64>, f64)],
    out: &[f32],
    lse: &[f32],
    [_, q_heads, _, q_len, _, dim]: Dims,
    element: Element,
    sharpness: f64,
) -> Result<String, String> {
    let (mut error, mut norm, mut cosine, mut worst_lse) = (0.0, 0.0, 1.0f64, 0.0f64);
    for (&(b, h, i), (exact, exact_lse)) in rows.iter().zip(want) {
        let line = (b * q_heads + h) * q_len + i;
        let got = &out[line * dim..][..dim];
        let (mut dot, mut squares, mut own) = (0.0, 0.0, 0.0);
        for (&got, exact) in got.iter().zip(exact) {
            let got = f64::from(got);
            error += (got - exact).powi(2);
            squares += exact * exact;
            dot += got * exact;
            own += got * got;
        }
        norm += squares;
        if squares > 0.0 {
            cosine = cosine.min(dot / (squares * own).sqrt());
        } else if own != 0.0 {
            return Err(format!("row {b} {h} {i} should be 0"));
        }
        let lse = f64::from(lse[line]);
        if lse != *exact_lse {
            worst_lse = worst_lse.max((lse - exact_lse).abs());
        }
        if lse.is_nan() {
            return Err(format!("LSE of row {b} {h} {i} is NaN"));
        }
    }
    let relative = if norm > 0.0 { (error / norm).sqrt() } else { error.sqrt() };
    let (limit, lse_limit) = match element {
        Element::F32 => (1e-5, 1e-4),
        Element::F16 => (1e-3, 1e-3),
        Element::BF16 => (6e-3, 1e-3),
    };
    // Errors of scores grow with them.
    let (limit, lse_limit) = (limit * sharpness.sqrt(), lse_limit * sharpness);
    let detail = format!("error {relative:.2e}, cosine {cosine:.7}, LSE {worst_lse:.1e}");
    if relative < limit && cosine > 0.9999 && worst_lse < lse_limit {
        Ok(detail)
    } else {
        Err(detail)
    }
}

/// Offsets beyond 2³¹ elements: a stride between heads of 2³¹ + 128, within a large but sparse
/// buffer.
pub(super) fn far_strides(gpu: &Gpu, run: &mut Run) {
    let Gpu { client, capabilities } = gpu;
    let (len, dim, element) = (200, 64, Element::BF16);
    let stride = (1usize << 31) + 128;
    let near = tensor(gpu, 2, [1, 2, len, dim], element);
    let far = client.empty((stride + len * dim) * element.size());
    // SAFETY: both heads of `len · dim` elements lie in the buffers.
    unsafe {
        spread::launch_unchecked(
            client,
            CubeCount::Static(len as u32, 2, 1),
            CubeDim::new_1d(dim as u32),
            cubecl::ir::AddressType::U64,
            BufferArg::from_raw_parts(near.handle.clone(), 2 * len * dim),
            BufferArg::from_raw_parts(far.clone(), stride + len * dim),
            len,
            stride,
            element.elem_type(),
        );
    }
    let k = Operand::new(far, [1, 2, len, dim], [2 * stride, stride, dim, 1], element);
    let q = tensor(gpu, 1, [1, 2, len, dim], element);
    let grids = [BlockGrid::new(128, len, len).expect("a grid")];
    for rung in AttendRung::LADDER {
        let run_on = |k: &Operand| {
            let problem = AttendProblem::new(&q, k, k, &grids, None, None, 0.1, false);
            let attended = Attended { out: poisoned(gpu, 2 * len * dim, element), lse: None };
            rung.check(capabilities, &problem).ok()?;
            attend_into(client, capabilities, &problem, &attended, rung);
            Some(values(gpu, &attended.out, element))
        };
        let (near, far) = (run_on(&near), run_on(&k));
        let equal = near == far && near.is_some_and(|x| x.iter().all(|x| x.is_finite()));
        let name = format!("attend {rung} with offsets beyond 2^31");
        push(run, name, if equal { Ok(String::new()) } else { Err("differs".into()) });
    }
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn spread<E: Float>(
    near: &[E],
    far: &mut [E],
    len: usize,
    stride: usize,
    #[define(E)] _element: ElemType,
) {
    let at = CUBE_POS_X as usize * CUBE_DIM as usize + UNIT_POS as usize;
    let head = CUBE_POS_Y as usize;
    far[head * stride + at] = near[head * len * CUBE_DIM as usize + at];
}
