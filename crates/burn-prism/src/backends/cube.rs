//! Every CubeCL runtime: the CPU runtime, CUDA, ROCm, WebGPU, Vulkan and Metal are one backend, and
//! a tensor's device says which of them it is on. The kernels are those of `prism_kernels`, the
//! rung chosen from what the device can do.
//!
//! Heads wider than the kernels take go through tensor ops, as `plan` says. What chooses blocks is in
//! [`cube_select`].

use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::tensor::{DType, Shape};
use burn_cubecl::tensor::CubeTensor;
use burn_cubecl::{CubeBackend, CubeDevice};
use cubecl::server::Handle;
use prism_core::BlockGrid;
use prism_core::selection::extent;
use prism_kernels::attend::{AttendProblem, AttendRung, attend_on};
use prism_kernels::band_mask::{BandMask, MAX_HEAD_DIM};
use prism_kernels::moments::pool_moments;
use prism_kernels::pool::{Pooled, pool_one};
use prism_kernels::rotate::{RotaryTable, RotateProblem, rotate_and_pool};
use prism_kernels::schedule::{count_blocks, schedule};
use prism_kernels::select::Selection;
use prism_kernels::{Capabilities, Element, Operand};

use super::{cube_linear, cube_select};
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
        cube_select::select(pooled_q, pooled_k, history, params)
    }

    fn prism_select_blocks(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        params: SelectParams,
    ) -> (IntTensor<Self>, IntTensor<Self>) {
        cube_select::select_blocks(q, k, params)
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
        cube_select::select_second_order(q_means, k_means, k_variances, params)
    }

    fn prism_select_outliers(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        params: OutliersParams,
    ) -> (IntTensor<Self>, IntTensor<Self>) {
        cube_select::select_outliers(q, k, params)
    }

    fn prism_antidiagonal_masses(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        params: AntidiagonalParams,
    ) -> IntTensor<Self> {
        cube_select::antidiagonal_masses(q, k, params)
    }

    fn prism_line_sums(
        scores: FloatTensor<Self>,
        first: usize,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        cube_select::line_sums(scores, first)
    }

    fn prism_choose(
        masses: IntTensor<Self>,
        params: ChooseParams,
    ) -> (IntTensor<Self>, IntTensor<Self>) {
        cube_select::choose(masses, params)
    }

    fn prism_heaviest(
        masses: IntTensor<Self>,
        limits: IntTensor<Self>,
        prefix: Prefix,
    ) -> IntTensor<Self> {
        cube_select::heaviest(masses, limits, prefix)
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
pub(super) fn operand(x: &CubeTensor) -> Option<Operand> {
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

pub(super) fn contiguous(x: CubeTensor) -> CubeTensor {
    burn_cubecl::kernel::into_contiguous(x)
}

pub(super) fn dims(x: &CubeTensor) -> [usize; 4] {
    let shape = x.meta.shape();
    [shape[0], shape[1], shape[2], shape[3]]
}
