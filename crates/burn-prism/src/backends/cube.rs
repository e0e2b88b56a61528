//! Every CubeCL runtime: the CPU runtime, CUDA, ROCm, WebGPU, Vulkan and Metal are one backend, and
//! a tensor's device says which of them it is on. The kernels are those of `prism_kernels`, the
//! rung chosen from what the device can do.
//!
//! Heads wider than the kernels take go through tensor ops, as `plan` says.

use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::tensor::{DType, Shape};
use burn_cubecl::tensor::CubeTensor;
use burn_cubecl::{CubeBackend, CubeDevice};
use cubecl::server::Handle;
use prism_core::selection::extent;
use prism_core::{BlockGrid, SelectionRule};
use prism_kernels::attend::{AttendProblem, AttendRung, attend_on};
use prism_kernels::band_mask::{BandMask, MAX_HEAD_DIM};
use prism_kernels::calibrate::calibrate;
use prism_kernels::moments::pool_moments;
use prism_kernels::pool::{Pooled, energies, pool, pool_one};
use prism_kernels::rotate::{RotaryTable, RotateProblem, rotate_and_pool};
use prism_kernels::schedule::{count_blocks, schedule};
use prism_kernels::select::antidiagonal::{AntidiagonalProblem, antidiagonal_masses, takes};
use prism_kernels::select::outliers::{OutliersError, OutliersProblem, select_outliers};
use prism_kernels::select::{
    self, MassesProblem, SecondOrderProblem, SelectProblem, Selection, select_blocks,
    select_by_second_order, select_from_masses,
};
use prism_kernels::{Capabilities, Element, Operand};

use super::cube_linear;
use crate::fallback;
use crate::ops::{
    AntidiagonalParams, AttendParams, ChooseParams, OutliersParams, Prefix, PrismBackend,
    RotateParams, RotatedTensors, SecondOrderParams, SelectParams, Side,
};
use crate::plan::{Kernel, Refused};
use crate::selected::SelectedBlocks;

/// What computes for heads of a type and width in blocks of a size on a device, and which quicker
/// kernels can't.
pub fn kernel(
    device: &CubeDevice,
    dtype: DType,
    dim: usize,
    block: usize,
) -> (Kernel, Vec<Refused>) {
    let name = |rung| match rung {
        AttendRung::Unit => Kernel::CubeUnit,
        AttendRung::Plane => Kernel::CubePlane,
        AttendRung::Mma => Kernel::CubeMma,
        AttendRung::Hopper => Kernel::CubeHopper,
    };
    let refused = |kernel, reason| Refused { kernel, reason };
    let Some(element) = element(dtype) else {
        let reason = format!("takes f32, f16 and bf16, got {dtype:?}");
        return (Kernel::TensorOps, vec![refused(Kernel::CubeUnit, reason)]);
    };
    if dim > MAX_HEAD_DIM {
        let reason = format!("takes head_dim up to {MAX_HEAD_DIM}, got {dim}");
        return (Kernel::TensorOps, vec![refused(Kernel::CubeUnit, reason)]);
    }
    let capabilities = Capabilities::of(&device.client());
    let (rung, slower) = AttendRung::plan(&capabilities, element, dim, block);
    let slower = slower.into_iter().map(|(rung, error)| refused(name(rung), error.to_string()));
    (name(rung), slower.collect())
}

/// Whether the kernels select outliers by a rule; tensor ops do by the others, as `plan` says.
pub fn takes_outliers(rule: &SelectionRule) -> bool {
    OutliersError::check(rule).is_ok()
}

/// Whether the kernels sum along antidiagonals of heads of a type and width; tensor ops do otherwise.
pub fn takes_antidiagonals(
    device: &CubeDevice,
    dtype: DType,
    dim: usize,
    block: usize,
    stride: usize,
) -> bool {
    let capabilities = Capabilities::of(&device.client());
    element(dtype).is_some_and(|element| takes(&capabilities, element, dim, block, stride))
}

impl PrismBackend for CubeBackend {
    fn prism_pool(x: FloatTensor<Self>, grids: Vec<BlockGrid>, side: Side) -> FloatTensor<Self> {
        let Some(operand) = operand(&x) else { return fallback::pool::<Self>(x, &grids, side) };
        let pooled = pool_one(&x.client, &Capabilities::of(&x.client), &operand, &grids, side);
        let [batch, heads, _, dim] = operand.shape;
        output(&x, pooled.means, [batch, heads, pooled.blocks, dim], DType::F32)
    }

    fn prism_rotate_and_pool(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        params: RotateParams,
    ) -> RotatedTensors<Self> {
        let [cos, sin] = [cos, sin].map(contiguous);
        let rotated = match (operand(&q), operand(&k)) {
            (Some(queries), Some(keys)) => {
                let (positions, rotary_dim) = (cos.meta.shape()[0], params.rotary_dim);
                let handles = (cos.handle.clone(), sin.handle.clone());
                let table =
                    RotaryTable::new(handles.0, handles.1, positions, rotary_dim, params.layout);
                let bands = BandMask::new(&params.bands);
                let problem = RotateProblem::new(&queries, &keys, &table, &params.grids, &bands);
                let problem = RotateProblem { prescale: params.prescale, ..problem };
                rotate_and_pool(&q.client, &Capabilities::of(&q.client), &problem).ok()
            }
            _ => None,
        };
        let Some(rotated) = rotated else {
            return fallback::rotate_and_pool::<Self>(q, k, cos, sin, &params);
        };
        let means = |like: &CubeTensor, pooled: Pooled| {
            let [batch, heads, _, dim] = dims(like);
            output(like, pooled.means, [batch, heads, pooled.blocks, dim], DType::F32)
        };
        (
            output(&q, rotated.q.handle, dims(&q), q.dtype),
            output(&k, rotated.k.handle, dims(&k), k.dtype),
            means(&q, rotated.pooled_q),
            means(&k, rotated.pooled_k),
        )
    }

    fn prism_select(
        pooled_q: FloatTensor<Self>,
        pooled_k: FloatTensor<Self>,
        history: FloatTensor<Self>,
        params: SelectParams,
    ) -> (IntTensor<Self>, IntTensor<Self>) {
        let [batch, q_heads, rows, dim] = dims(&pooled_q);
        let [_, kv_heads, key_blocks, _] = dims(&pooled_k);
        if dim > MAX_HEAD_DIM || batch * q_heads * rows * key_blocks == 0 {
            return fallback::select::<Self>(pooled_q, pooled_k, history, &params);
        }
        let [q, k, history] = [pooled_q, pooled_k, history].map(contiguous);
        let bands = BandMask::new(&params.bands);
        let pooled = |x: &CubeTensor, lines: usize, blocks: usize| Pooled {
            means: x.handle.clone(),
            energy: energies(&q.client, &x.handle, [lines * blocks, dim], &bands),
            blocks,
        };
        let pooled = (pooled(&q, batch * q_heads, rows), pooled(&k, batch * kv_heads, key_blocks));
        selection(&q, pooled, Some(&history.handle), [q_heads, kv_heads, dim], &params)
    }

    fn prism_select_blocks(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        params: SelectParams,
    ) -> (IntTensor<Self>, IntTensor<Self>) {
        let (Some(queries), Some(keys)) = (operand(&q), operand(&k)) else {
            return fallback::select_blocks::<Self>(q, k, params);
        };
        let capabilities = Capabilities::of(&q.client);
        let bands = BandMask::new(&params.bands);
        let pooled = pool(&q.client, &capabilities, &queries, &keys, &params.grids, &bands);
        let heads = [queries.shape[1], keys.shape[1], queries.shape[3]];
        selection(&q, pooled, None, heads, &params)
    }

    fn prism_pool_moments(
        x: FloatTensor<Self>,
        grids: Vec<BlockGrid>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let Some(operand) = operand(&x) else { return fallback::pool_moments::<Self>(x, &grids) };
        let moments = pool_moments(&x.client, &Capabilities::of(&x.client), &operand, &grids);
        let [batch, heads, _, dim] = operand.shape;
        let shape = [batch, heads, moments.blocks, dim];
        (
            output(&x, moments.means, shape, DType::F32),
            output(&x, moments.variances, shape, DType::F32),
        )
    }

    fn prism_select_second_order(
        q_means: FloatTensor<Self>,
        k_means: FloatTensor<Self>,
        k_variances: FloatTensor<Self>,
        params: SecondOrderParams,
    ) -> (IntTensor<Self>, IntTensor<Self>) {
        let ([_, q_heads, _, dim], [_, kv_heads, ..]) = (dims(&q_means), dims(&k_means));
        if dim > MAX_HEAD_DIM {
            return fallback::select_second_order::<Self>(q_means, k_means, k_variances, &params);
        }
        let [q, means, variances] = [q_means, k_means, k_variances].map(contiguous);
        let problem = SecondOrderProblem::new(
            &q.handle,
            &means.handle,
            &variances.handle,
            [q_heads, kv_heads, dim],
            &params.grids,
            [params.query_sub, params.key_sub],
            &params.rule,
            params.more_follows,
        );
        let capabilities = Capabilities::of(&q.client);
        let selection = select_by_second_order(&q.client, &capabilities, &problem);
        outputs(&q, selection, q_heads, &params.grids)
    }

    fn prism_select_outliers(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        params: OutliersParams,
    ) -> (IntTensor<Self>, IntTensor<Self>) {
        let OutliersParams { grids, options, scale, rule, more_follows } = &params;
        let block = grids.first().map_or(1, BlockGrid::block);
        let selection = match (operand(&q), operand(&k)) {
            (Some(queries), Some(keys)) if q.dtype == k.dtype => {
                let (subs, target) = (options.subs(block), options.target());
                let problem = OutliersProblem::new(
                    &queries,
                    &keys,
                    grids,
                    subs,
                    target,
                    *scale,
                    rule,
                    *more_follows,
                );
                select_outliers(&q.client, &Capabilities::of(&q.client), &problem).ok()
            }
            _ => None,
        };
        match selection {
            Some(selection) => outputs(&q, selection, dims(&q)[1], grids),
            None => fallback::selectors::select_outliers::<Self>(q, k, &params),
        }
    }

    fn prism_antidiagonal_masses(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        params: AntidiagonalParams,
    ) -> IntTensor<Self> {
        let AntidiagonalParams { grid, rows, stride, scale } = &params;
        let capabilities = Capabilities::of(&q.client);
        if let (Some(queries), Some(keys)) = (operand(&q), operand(&k)) {
            let problem =
                AntidiagonalProblem::new(&queries, &keys, grid, rows.clone(), *stride, *scale);
            if problem.runs(&capabilities) {
                let masses = antidiagonal_masses(&q.client, &capabilities, &problem);
                let blocks = rows.end.checked_sub(1).map_or(0, |row| grid.causal_blocks(row));
                let [batch, heads, ..] = queries.shape;
                return output(&q, masses, [batch, heads, rows.len(), blocks], DType::I32);
            }
        }
        fallback::antidiagonal_masses::<Self>(q, k, &params)
    }

    fn prism_line_sums(
        scores: FloatTensor<Self>,
        first: usize,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let scores = contiguous(scores);
        let [batch, heads, rows, len] = dims(&scores);
        let capabilities = Capabilities::of(&scores.client);
        let shape = [batch * heads, rows, len];
        let lines = select::line_sums(&scores.client, &capabilities, &scores.handle, shape, first);
        let sums = |handle| output(&scores, handle, [batch, heads, 1, len], DType::F32);
        (sums(lines.vertical), sums(lines.slash))
    }

    fn prism_choose(
        masses: IntTensor<Self>,
        params: ChooseParams,
    ) -> (IntTensor<Self>, IntTensor<Self>) {
        let ChooseParams { grid, rows, bands, by, rule, more_follows, words_per_row } = &params;
        let [batch, heads, count, all] = dims(&masses);
        let mut masses = contiguous(masses);
        // The kernel overwrites them.
        if !masses.can_mut() {
            masses = masses.copy();
        }
        let problem = MassesProblem::new(
            &masses.handle,
            [batch * heads, count, *bands, all / bands],
            grid,
            rows.start,
            *words_per_row,
            *by,
            rule,
            *more_follows,
        );
        let capabilities = Capabilities::of(&masses.client);
        let chosen = select_from_masses(&masses.client, &capabilities, &problem);
        (
            output(&masses, chosen.words, [batch, heads, count, *words_per_row], DType::I32),
            output(&masses, chosen.counts, [batch, heads, count, 1], DType::I32),
        )
    }

    fn prism_heaviest(
        masses: IntTensor<Self>,
        limits: IntTensor<Self>,
        prefix: Prefix,
    ) -> IntTensor<Self> {
        let capabilities = Capabilities::of(&masses.client);
        if !select::finds_prefixes(&capabilities) {
            return fallback::heaviest_prefix::<Self>(masses, limits, prefix);
        }
        let [masses, limits] = [masses, limits].map(contiguous);
        let shape @ [batch, heads, rows, len] = dims(&masses);
        let prefix = match prefix {
            Prefix::Reaching => select::Prefix::Reaching,
            Prefix::Within => select::Prefix::Within,
            Prefix::Count => select::Prefix::Count,
        };
        let kept = select::heaviest_prefix(
            &masses.client,
            &capabilities,
            &masses.handle,
            &limits.handle,
            [batch * heads * rows, len],
            prefix,
        );
        output(&masses, kept, shape, DType::I32)
    }

    fn prism_attend(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        words: IntTensor<Self>,
        params: AttendParams,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        if operand(&q).is_none() {
            return fallback::attend::<Self>(q, k, v, Some(words), &params);
        }
        attend(q, k, v, Some(words), &params)
    }

    fn prism_attend_dense(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        params: AttendParams,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        if operand(&q).is_none() {
            return fallback::attend::<Self>(q, k, v, None, &params);
        }
        attend(q, k, v, None, &params)
    }

    fn prism_linear(x: FloatTensor<Self>, weight: FloatTensor<Self>) -> FloatTensor<Self> {
        cube_linear::linear(x, weight)
    }

    fn prism_linear_residual(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        residual: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        cube_linear::linear_residual(x, weight, residual)
    }

    fn prism_swiglu(x: FloatTensor<Self>, weight: FloatTensor<Self>) -> FloatTensor<Self> {
        cube_linear::swiglu(x, weight)
    }
}

/// Selects from pooled vectors, by the paper's scores; results beside `like`.
fn selection(
    like: &CubeTensor,
    (q, k): (Pooled, Pooled),
    history: Option<&Handle>,
    heads: [usize; 3],
    params: &SelectParams,
) -> (CubeTensor, CubeTensor) {
    let SelectParams { grids, bands, calibration, rule, more_follows } = params;
    let (client, bands) = (&like.client, BandMask::new(bands));
    let capabilities = Capabilities::of(client);
    let factors =
        calibrate(client, &capabilities, &q, &k, history, grids, heads, &bands, *calibration);
    let (q_means, k_means) = (&q.means, &k.means);
    let problem =
        SelectProblem::new(q_means, k_means, &factors, heads, grids, &bands, rule, *more_follows);
    outputs(like, select_blocks(client, &capabilities, &problem), heads[0], grids)
}

/// Words and counts of a selection as tensors beside `like`.
fn outputs(
    like: &CubeTensor,
    selection: Selection,
    q_heads: usize,
    grids: &[BlockGrid],
) -> (CubeTensor, CubeTensor) {
    let Selection { words, counts, rows, words_per_row } = selection;
    let batch = grids.len();
    (
        output(like, words, [batch, q_heads, rows, words_per_row], DType::I32),
        output(like, counts, [batch, q_heads, rows], DType::I32),
    )
}

fn attend(
    q: CubeTensor,
    k: CubeTensor,
    v: CubeTensor,
    words: Option<CubeTensor>,
    params: &AttendParams,
) -> (CubeTensor, CubeTensor) {
    let (shape, grids) = (dims(&q), &params.grids);
    let [batch, q_heads, q_len, _] = shape;
    let (Some(a), Some(b), Some(c)) = (operand(&q), operand(&k), operand(&v)) else {
        return fallback::attend::<CubeBackend>(q, k, v, words, params);
    };
    let client = &q.client;
    let capabilities = Capabilities::of(client);
    let selection = words.map(contiguous).map(|words| {
        let (rows, words_per_row) = (extent(grids).0, SelectedBlocks::words_per_row(grids));
        let counts = count_blocks(client, &words.handle, [batch * q_heads * rows, words_per_row]);
        Selection { words: words.handle, counts, rows, words_per_row }
    });
    // Lines a kv head in order of length: what a GPU hands to its multiprocessors in turn.
    let order = selection.as_ref().filter(|_| capabilities.cores.is_none()).map(|selection| {
        let heads = [batch, q_heads, b.shape[1]];
        schedule(client, &capabilities, selection, heads, extent(grids).1)
    });
    let problem = AttendProblem::new(
        &a,
        &b,
        &c,
        grids,
        selection.as_ref(),
        order.as_ref(),
        params.scale,
        true,
    );
    let problem = AttendProblem { prescaled: params.prescaled, ..problem };
    let rung = AttendRung::best(&capabilities, &problem);
    let attended = attend_on(client, &capabilities, &problem, rung);
    // Asked for above.
    let lse = attended.lse.unwrap_or_else(|| attended.out.clone());
    let lse = output(&q, lse, [batch, q_heads, q_len], DType::F32);
    (output(&q, attended.out, shape, q.dtype), lse)
}

pub(super) fn element(dtype: DType) -> Option<Element> {
    match dtype {
        DType::F32 => Some(Element::F32),
        DType::F16 => Some(Element::F16),
        DType::BF16 => Some(Element::BF16),
        _ => None,
    }
}

/// The tensor as the kernels read it; `None` for heads wider than they take.
fn operand(x: &CubeTensor) -> Option<Operand> {
    let element = element(x.dtype)?;
    let (shape, strides) = (dims(x), x.meta.strides());
    let strides = [strides[0], strides[1], strides[2], strides[3]];
    (shape[3] <= MAX_HEAD_DIM).then(|| Operand::new(x.handle.clone(), shape, strides, element))
}

/// A new contiguous tensor beside `like`.
pub(super) fn output(
    like: &CubeTensor,
    handle: Handle,
    shape: impl Into<Shape>,
    dtype: DType,
) -> CubeTensor {
    let (client, device) = (like.client.clone(), like.device.clone());
    CubeTensor::new_contiguous(client, device, shape.into(), handle, dtype)
}

fn contiguous(x: CubeTensor) -> CubeTensor {
    burn_cubecl::kernel::into_contiguous(x)
}

fn dims(x: &CubeTensor) -> [usize; 4] {
    let shape = x.meta.shape();
    [shape[0], shape[1], shape[2], shape[3]]
}
