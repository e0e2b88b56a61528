//! Every CubeCL runtime: the CPU runtime, CUDA, ROCm, WebGPU, Vulkan and Metal are one backend, and
//! a tensor's device says which of them it is on. The kernels are those of `prism_kernels`, the
//! rung chosen from what the device can do.
//!
//! Heads wider than the kernels take, and second-order scores, go through tensor ops.

use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::tensor::{DType, Shape};
use burn_cubecl::tensor::CubeTensor;
use burn_cubecl::{CubeBackend, CubeDevice};
use cubecl::server::Handle;
use prism_core::BlockGrid;
use prism_core::selection::extent;
use prism_kernels::attend::{AttendProblem, AttendRung, attend_on};
use prism_kernels::band_mask::{BandMask, MAX_HEAD_DIM};
use prism_kernels::calibrate::calibrate;
use prism_kernels::pool::{Pooled, energies, pool_one};
use prism_kernels::schedule::{count_blocks, schedule};
use prism_kernels::select::{SelectProblem, Selection, select_blocks};
use prism_kernels::{Capabilities, Element, Operand};

use crate::fallback;
use crate::ops::{AttendParams, PrismBackend, SelectParams, Side};
use crate::plan::Kernel;
use crate::selected::SelectedBlocks;

/// What computes on a device.
pub fn kernel(device: &CubeDevice) -> Kernel {
    let capabilities = Capabilities::of(&device.client());
    match AttendRung::plan(&capabilities, Element::BF16, 128).0 {
        AttendRung::Unit => Kernel::CubeUnit,
        AttendRung::Plane => Kernel::CubePlane,
        AttendRung::Mma => Kernel::CubeMma,
    }
}

impl PrismBackend for CubeBackend {
    fn prism_pool(x: FloatTensor<Self>, grids: Vec<BlockGrid>, side: Side) -> FloatTensor<Self> {
        let Some(operand) = operand(&x) else { return fallback::pool::<Self>(x, &grids, side) };
        let pooled = pool_one(&x.client, &Capabilities::of(&x.client), &operand, &grids, side);
        let [batch, heads, _, dim] = operand.shape;
        output(&x, pooled.means, [batch, heads, pooled.blocks, dim], DType::F32)
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
        let (client, grids, rule) = (&q.client, &params.grids, &params.rule);
        let capabilities = Capabilities::of(client);
        let bands = BandMask::new(&params.bands);
        let pooled = |x: &CubeTensor, lines: usize, blocks: usize| Pooled {
            means: x.handle.clone(),
            energy: energies(client, &x.handle, [lines * blocks, dim], &bands),
            blocks,
        };
        let (pooled_q, pooled_k) =
            (pooled(&q, batch * q_heads, rows), pooled(&k, batch * kv_heads, key_blocks));
        let heads = [q_heads, kv_heads, dim];
        let factors = calibrate(
            client,
            &capabilities,
            &pooled_q,
            &pooled_k,
            Some(&history.handle),
            grids,
            heads,
            &bands,
            params.calibration,
        );
        let problem = SelectProblem::new(
            &q.handle,
            &k.handle,
            &factors,
            heads,
            grids,
            &bands,
            rule,
            params.more_follows,
        );
        let Selection { words, counts, words_per_row, .. } =
            select_blocks(client, &capabilities, &problem);
        (
            output(&q, words, [batch, q_heads, rows, words_per_row], DType::I32),
            output(&q, counts, [batch, q_heads, rows], DType::I32),
        )
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
    let rung = AttendRung::best(&capabilities, &problem);
    let attended = attend_on(client, &capabilities, &problem, rung);
    // Asked for above.
    let lse = attended.lse.unwrap_or_else(|| attended.out.clone());
    let lse = output(&q, lse, [batch, q_heads, q_len], DType::F32);
    (output(&q, attended.out, shape, q.dtype), lse)
}

/// The tensor as the kernels read it; `None` for heads wider than they take.
fn operand(x: &CubeTensor) -> Option<Operand> {
    let element = match x.dtype {
        DType::F32 => Element::F32,
        DType::F16 => Element::F16,
        DType::BF16 => Element::BF16,
        _ => return None,
    };
    let (shape, strides) = (dims(x), x.meta.strides());
    let strides = [strides[0], strides[1], strides[2], strides[3]];
    (shape[3] <= MAX_HEAD_DIM).then(|| Operand::new(x.handle.clone(), shape, strides, element))
}

/// A new contiguous tensor beside `like`.
fn output<const D: usize>(
    like: &CubeTensor,
    handle: Handle,
    dims: [usize; D],
    dtype: DType,
) -> CubeTensor {
    let (client, device) = (like.client.clone(), like.device.clone());
    CubeTensor::new_contiguous(client, device, Shape::new(dims), handle, dtype)
}

fn contiguous(x: CubeTensor) -> CubeTensor {
    burn_cubecl::kernel::into_contiguous(x)
}

fn dims(x: &CubeTensor) -> [usize; 4] {
    let shape = x.meta.shape();
    [shape[0], shape[1], shape[2], shape[3]]
}
