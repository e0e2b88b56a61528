//! Autodiff: the inner backend's kernels as long as nothing is tracked, differentiable tensor ops
//! otherwise. Pooling and selection carry no gradient: which blocks are read is a choice, not a
//! function to differentiate.

use burn::backend::AutodiffBackend;
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn_autodiff::Autodiff;
use burn_autodiff::checkpoint::strategy::CheckpointStrategy;
use prism_core::BlockGrid;

use crate::fallback;
use crate::ops::{
    AntidiagonalParams, AttendParams, ChooseParams, OutliersParams, Prefix, PrismBackend,
    RotateParams, RotatedTensors, SecondOrderParams, SelectParams, Side,
};

type Tensor<B, C> = FloatTensor<Autodiff<B, C>>;

impl<B: PrismBackend, C: CheckpointStrategy> PrismBackend for Autodiff<B, C> {
    fn prism_pool(x: Tensor<B, C>, grids: Vec<BlockGrid>, side: Side) -> Tensor<B, C> {
        untracked::<B, C>(B::prism_pool(x.into_primitive(), grids, side))
    }

    fn prism_rotate_and_pool(
        q: Tensor<B, C>,
        k: Tensor<B, C>,
        cos: Tensor<B, C>,
        sin: Tensor<B, C>,
        params: RotateParams,
    ) -> RotatedTensors<Self> {
        if q.is_tracked() || k.is_tracked() {
            return fallback::rotate_and_pool::<Self>(q, k, cos, sin, &params);
        }
        let [q, k, cos, sin] = [q, k, cos, sin].map(|x| x.into_primitive());
        let (q, k, pooled_q, pooled_k) = B::prism_rotate_and_pool(q, k, cos, sin, params);
        (
            untracked::<B, C>(q),
            untracked::<B, C>(k),
            untracked::<B, C>(pooled_q),
            untracked::<B, C>(pooled_k),
        )
    }

    fn prism_select(
        pooled_q: Tensor<B, C>,
        pooled_k: Tensor<B, C>,
        history: Tensor<B, C>,
        params: SelectParams,
    ) -> (IntTensor<Self>, IntTensor<Self>) {
        B::prism_select(
            pooled_q.into_primitive(),
            pooled_k.into_primitive(),
            history.into_primitive(),
            params,
        )
    }

    fn prism_select_blocks(
        q: Tensor<B, C>,
        k: Tensor<B, C>,
        params: SelectParams,
    ) -> (IntTensor<Self>, IntTensor<Self>) {
        B::prism_select_blocks(q.into_primitive(), k.into_primitive(), params)
    }

    fn prism_pool_moments(x: Tensor<B, C>, grids: Vec<BlockGrid>) -> (Tensor<B, C>, Tensor<B, C>) {
        let (means, variances) = B::prism_pool_moments(x.into_primitive(), grids);
        (untracked::<B, C>(means), untracked::<B, C>(variances))
    }

    fn prism_select_second_order(
        q_means: Tensor<B, C>,
        k_means: Tensor<B, C>,
        k_variances: Tensor<B, C>,
        params: SecondOrderParams,
    ) -> (IntTensor<Self>, IntTensor<Self>) {
        B::prism_select_second_order(
            q_means.into_primitive(),
            k_means.into_primitive(),
            k_variances.into_primitive(),
            params,
        )
    }

    fn prism_select_outliers(
        q: Tensor<B, C>,
        k: Tensor<B, C>,
        params: OutliersParams,
    ) -> (IntTensor<Self>, IntTensor<Self>) {
        B::prism_select_outliers(q.into_primitive(), k.into_primitive(), params)
    }

    fn prism_antidiagonal_masses(
        q: Tensor<B, C>,
        k: Tensor<B, C>,
        params: AntidiagonalParams,
    ) -> IntTensor<Self> {
        B::prism_antidiagonal_masses(q.into_primitive(), k.into_primitive(), params)
    }

    fn prism_line_sums(scores: Tensor<B, C>, first: usize) -> (Tensor<B, C>, Tensor<B, C>) {
        let (vertical, slash) = B::prism_line_sums(scores.into_primitive(), first);
        (untracked::<B, C>(vertical), untracked::<B, C>(slash))
    }

    fn prism_choose(
        masses: IntTensor<Self>,
        params: ChooseParams,
    ) -> (IntTensor<Self>, IntTensor<Self>) {
        B::prism_choose(masses, params)
    }

    fn prism_heaviest(
        masses: IntTensor<Self>,
        limits: IntTensor<Self>,
        prefix: Prefix,
    ) -> IntTensor<Self> {
        B::prism_heaviest(masses, limits, prefix)
    }

    fn prism_attend(
        q: Tensor<B, C>,
        k: Tensor<B, C>,
        v: Tensor<B, C>,
        words: IntTensor<Self>,
        params: AttendParams,
    ) -> (Tensor<B, C>, Tensor<B, C>) {
        if q.is_tracked() || k.is_tracked() || v.is_tracked() {
            return fallback::attend::<Self>(q, k, v, Some(words), &params);
        }
        let [q, k, v] = [q, k, v].map(|x| x.into_primitive());
        let (out, lse) = B::prism_attend(q, k, v, words, params);
        (untracked::<B, C>(out), untracked::<B, C>(lse))
    }

    fn prism_attend_dense(
        q: Tensor<B, C>,
        k: Tensor<B, C>,
        v: Tensor<B, C>,
        params: AttendParams,
    ) -> (Tensor<B, C>, Tensor<B, C>) {
        if q.is_tracked() || k.is_tracked() || v.is_tracked() {
            return fallback::attend::<Self>(q, k, v, None, &params);
        }
        let [q, k, v] = [q, k, v].map(|x| x.into_primitive());
        let (out, lse) = B::prism_attend_dense(q, k, v, params);
        (untracked::<B, C>(out), untracked::<B, C>(lse))
    }

    fn prism_linear(x: Tensor<B, C>, weight: Tensor<B, C>) -> Tensor<B, C> {
        if x.is_tracked() || weight.is_tracked() {
            return fallback::linear::<Self>(x, weight);
        }
        untracked::<B, C>(B::prism_linear(x.into_primitive(), weight.into_primitive()))
    }

    fn prism_linear_residual(
        x: Tensor<B, C>,
        weight: Tensor<B, C>,
        residual: Tensor<B, C>,
    ) -> Tensor<B, C> {
        if x.is_tracked() || weight.is_tracked() || residual.is_tracked() {
            return fallback::linear_residual::<Self>(x, weight, residual);
        }
        let [x, weight, residual] = [x, weight, residual].map(|x| x.into_primitive());
        untracked::<B, C>(B::prism_linear_residual(x, weight, residual))
    }

    fn prism_swiglu(x: Tensor<B, C>, weight: Tensor<B, C>) -> Tensor<B, C> {
        if x.is_tracked() || weight.is_tracked() {
            return fallback::swiglu::<Self>(x, weight);
        }
        untracked::<B, C>(B::prism_swiglu(x.into_primitive(), weight.into_primitive()))
    }
}

fn untracked<B: PrismBackend, C: CheckpointStrategy>(x: FloatTensor<B>) -> Tensor<B, C> {
    <Autodiff<B, C> as AutodiffBackend>::from_inner(x)
}
