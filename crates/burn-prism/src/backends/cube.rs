//! Every CubeCL runtime: the CPU runtime, CUDA, ROCm, WebGPU, Vulkan and Metal are one backend, and
//! a tensor's device says which of them it is on. Tensor ops throughout.

use burn::backend::tensor::{FloatTensor, IntTensor};
use burn_cubecl::CubeBackend;
use prism_core::BlockGrid;

use crate::fallback;
use crate::ops::{AttendParams, PrismBackend, SelectParams, Side};

impl PrismBackend for CubeBackend {
    fn prism_pool(x: FloatTensor<Self>, grids: Vec<BlockGrid>, side: Side) -> FloatTensor<Self> {
        fallback::pool::<Self>(x, &grids, side)
    }

    fn prism_select(
        pooled_q: FloatTensor<Self>,
        pooled_k: FloatTensor<Self>,
        history: FloatTensor<Self>,
        params: SelectParams,
    ) -> (IntTensor<Self>, IntTensor<Self>) {
        fallback::select::<Self>(pooled_q, pooled_k, history, &params)
    }

    fn prism_attend(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        words: IntTensor<Self>,
        params: AttendParams,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        fallback::attend::<Self>(q, k, v, Some(words), &params)
    }

    fn prism_attend_dense(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        params: AttendParams,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        fallback::attend::<Self>(q, k, v, None, &params)
    }
}
