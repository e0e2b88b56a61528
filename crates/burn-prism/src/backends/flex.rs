//! Flex: native CPU kernels.

use burn::backend::Flex;
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::tensor::{DType, Element as BurnElement, TensorData};
use burn_flex::FlexTensor;
use half::{bf16, f16};
use prism_core::BlockGrid;
use prism_core::scores::{BandEnergy, PooledHead};
use prism_core::second_order::HeadMoments;
use prism_core::selection::extent;
use rayon::prelude::*;

use crate::flex::attend::{AttendProblem, Blocks, attend};
use crate::flex::pool::{pool, pool_moments};
use crate::flex::view::{Element, View};
use crate::ops::{AttendParams, PrismBackend, SecondOrderParams, SelectParams, Side};
use crate::selected::SelectedBlocks;

/// Calls `$run` with the element type of a tensor as `$T`.
macro_rules! with_element {
    ($tensor:expr, $T:ident => $run:expr) => {
        match $tensor.dtype() {
            DType::F32 => {
                type $T = f32;
                $run
            }
            DType::F16 => {
                type $T = f16;
                $run
            }
            DType::BF16 => {
                type $T = bf16;
                $run
            }
            dtype => unchecked(format!("element type {dtype:?}")),
        }
    };
}

impl PrismBackend for Flex {
    fn prism_pool(x: FloatTensor<Self>, grids: Vec<BlockGrid>, side: Side) -> FloatTensor<Self> {
        let (rows, key_blocks) = extent(&grids);
        let blocks = match side {
            Side::Queries => rows,
            Side::Keys => key_blocks,
        };
        let [batch, heads, _, head_dim] = dims(&x);
        let means = with_element!(x, T => pool(&view::<T>(&x), &grids, side));
        let means = means.unwrap_or_else(unchecked);
        FlexTensor::from_data(TensorData::new(means, [batch, heads, blocks, head_dim]))
    }

    fn prism_select(
        pooled_q: FloatTensor<Self>,
        pooled_k: FloatTensor<Self>,
        history: FloatTensor<Self>,
        params: SelectParams,
    ) -> (IntTensor<Self>, IntTensor<Self>) {
        let [_, q_heads, rows, d] = dims(&pooled_q);
        let [_, kv_heads, key_blocks, _] = dims(&pooled_k);
        let contiguous = [pooled_q, pooled_k, history].map(|x| x.to_contiguous());
        let [q, k, history] = contiguous.each_ref().map(elements::<f32>);
        select(q_heads, &params.grids, |line, words| {
            let (b, kv_head) = (line / q_heads, line * kv_heads / q_heads);
            let energy = &history[line * 4..][..4];
            let head = PooledHead {
                q: &q[line * rows * d..][..rows * d],
                k: &k[kv_head * key_blocks * d..][..key_blocks * d],
                history: BandEnergy {
                    high: energy[0].into(),
                    low: energy[1].into(),
                    all: energy[2].into(),
                    blocks: energy[3].into(),
                },
            };
            params.rule.select_head(
                head,
                &params.grids[b],
                &params.bands,
                params.calibration,
                params.more_follows,
                words,
            );
        })
    }

    fn prism_pool_moments(
        x: FloatTensor<Self>,
        grids: Vec<BlockGrid>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let [batch, heads, _, head_dim] = dims(&x);
        let shape = [batch, heads, extent(&grids).1, head_dim];
        let moments = with_element!(x, T => pool_moments(&view::<T>(&x), &grids));
        let (means, variances) = moments.unwrap_or_else(unchecked);
        (
            FlexTensor::from_data(TensorData::new(means, shape)),
            FlexTensor::from_data(TensorData::new(variances, shape)),
        )
    }

    fn prism_select_second_order(
        q_means: FloatTensor<Self>,
        k_means: FloatTensor<Self>,
        k_variances: FloatTensor<Self>,
        params: SecondOrderParams,
    ) -> (IntTensor<Self>, IntTensor<Self>) {
        let [_, q_heads, q_subs, d] = dims(&q_means);
        let [_, kv_heads, k_subs, _] = dims(&k_means);
        let contiguous = [q_means, k_means, k_variances].map(|x| x.to_contiguous());
        let [q, means, variances] = contiguous.each_ref().map(elements::<f32>);
        select(q_heads, &params.grids, |line, words| {
            let kv_head = line * kv_heads / q_heads;
            let head = HeadMoments {
                q_means: &q[line * q_subs * d..][..q_subs * d],
                k_means: &means[kv_head * k_subs * d..][..k_subs * d],
                k_variances: &variances[kv_head * k_subs * d..][..k_subs * d],
                head_dim: d,
            };
            let grid = params.sub_blocks(line / q_heads);
            params.rule.select_head_second_order(head, &grid, params.more_follows, words);
        })
    }

    fn prism_attend(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        words: IntTensor<Self>,
        params: AttendParams,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let [_, _, rows, words_per_row] = dims(&words);
        let words = words.to_contiguous();
        let bits: Vec<u32> = elements::<i32>(&words).iter().map(|&word| word as u32).collect();
        let blocks = Blocks::Selected { words: &bits, words_per_row, rows };
        with_element!(q, T => run::<T>(&q, &k, &v, blocks, &params))
    }

    fn prism_attend_dense(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        params: AttendParams,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        with_element!(q, T => run::<T>(&q, &k, &v, Blocks::Dense, &params))
    }
}

/// Selects the heads of a batch in parallel: `select_head` gets the line of the head in the batch,
/// and the words to write with their number a row.
fn select(
    q_heads: usize,
    grids: &[BlockGrid],
    select_head: impl Fn(usize, (&mut [u32], usize)) + Sync,
) -> (FlexTensor, FlexTensor) {
    let (batch, (rows, _)) = (grids.len(), extent(grids));
    let width = SelectedBlocks::words_per_row(grids);
    let mut words = vec![0u32; batch * q_heads * rows * width];
    words
        .par_chunks_mut((rows * width).max(1))
        .enumerate()
        .for_each(|(line, words)| select_head(line, (words, width)));
    let counts: Vec<i32> = words
        .chunks_exact(width)
        .map(|row| row.iter().map(|word| word.count_ones() as i32).sum())
        .collect();
    let words: Vec<i32> = words.into_iter().map(|word| word as i32).collect();
    (
        FlexTensor::from_data(TensorData::new(words, [batch, q_heads, rows, width])),
        FlexTensor::from_data(TensorData::new(counts, [batch, q_heads, rows])),
    )
}

fn run<T: Element + BurnElement + bytemuck::Pod>(
    q: &FlexTensor,
    k: &FlexTensor,
    v: &FlexTensor,
    blocks: Blocks<'_>,
    params: &AttendParams,
) -> (FlexTensor, FlexTensor) {
    let shape = dims(q);
    let problem = AttendProblem {
        q: view::<T>(q),
        k: view::<T>(k),
        v: view::<T>(v),
        grids: &params.grids,
        blocks,
        scale: params.scale as f32,
        want_lse: true,
    };
    let (out, lse) = attend(&problem).unwrap_or_else(unchecked);
    let lse = lse.unwrap_or_default();
    let [batch, heads, q_len, _] = shape;
    (
        FlexTensor::from_data(TensorData::new(out, shape)),
        FlexTensor::from_data(TensorData::new(lse, [batch, heads, q_len])),
    )
}

/// Elements of a contiguous tensor.
fn elements<T: BurnElement + bytemuck::Pod>(x: &FlexTensor) -> &[T] {
    let start = x.layout().start_offset();
    &x.storage::<T>()[start..start + x.layout().num_elements()]
}

fn view<T: Element + BurnElement + bytemuck::Pod>(x: &FlexTensor) -> View<'_, T> {
    let strides = x.layout().strides();
    let strides = [strides[0], strides[1], strides[2], strides[3]];
    View::new(x.storage::<T>(), dims(x), strides, x.layout().start_offset())
        .unwrap_or_else(|| unchecked("a layout outside its storage"))
}

fn dims(x: &FlexTensor) -> [usize; 4] {
    let shape = x.layout().shape();
    [shape[0], shape[1], shape[2], shape[3]]
}

/// The public functions check every input, so this is a bug of ours: better loud than wrong.
fn unchecked<T>(what: impl std::fmt::Display) -> T {
    unreachable!("burn-prism let an unchecked input through: {what}")
}
