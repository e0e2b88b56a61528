//! Fusion: the shapes and element types of results, known before anything runs. The operations
//! themselves wait in Fusion's stream and then run on the backend that it wraps.

use burn::backend::fusion::custom::TensorSpec;
use burn::tensor::{DType, Shape};
use prism_core::BlockGrid;
use prism_core::selection::extent;

use crate::ops::{
    AntidiagonalParams, ChooseParams, OutliersParams, SecondOrderParams, SelectParams, Side,
};
use crate::selected::SelectedBlocks;

/// Of block means.
pub fn pooled(x: &TensorSpec, grids: &[BlockGrid], side: Side) -> TensorSpec {
    let (rows, key_blocks) = extent(grids);
    let blocks = match side {
        Side::Queries => rows,
        Side::Keys => key_blocks,
    };
    spec([x.shape[0], x.shape[1], blocks, x.shape[3]], DType::F32)
}

/// Of rotated Q and K, and of their block means.
pub fn rotated(
    q: &TensorSpec,
    k: &TensorSpec,
    grids: &[BlockGrid],
) -> (TensorSpec, TensorSpec, TensorSpec, TensorSpec) {
    (q.clone(), k.clone(), pooled(q, grids, Side::Queries), pooled(k, grids, Side::Keys))
}

/// Of the means and variances of key blocks.
pub fn moments(x: &TensorSpec, grids: &[BlockGrid]) -> (TensorSpec, TensorSpec) {
    let spec = pooled(x, grids, Side::Keys);
    (spec.clone(), spec)
}

/// Of the words and counts of a selection.
pub fn selected(q: &TensorSpec, params: &SelectParams) -> (TensorSpec, TensorSpec) {
    selection(q, &params.grids)
}

/// Likewise by second-order scores.
pub fn selected_by_second_order(
    q_means: &TensorSpec,
    params: &SecondOrderParams,
) -> (TensorSpec, TensorSpec) {
    selection(q_means, &params.grids)
}

/// Likewise with outlier keys apart.
pub fn selected_outliers(q: &TensorSpec, params: &OutliersParams) -> (TensorSpec, TensorSpec) {
    selection(q, &params.grids)
}

/// Of the sums of probabilities by key and by distance.
pub fn lines(scores: &TensorSpec) -> (TensorSpec, TensorSpec) {
    let sums = spec([scores.shape[0], scores.shape[1], 1, scores.shape[3]], DType::F32);
    (sums.clone(), sums)
}

/// Of the masses of some rows.
pub fn antidiagonal(q: &TensorSpec, params: &AntidiagonalParams) -> TensorSpec {
    let AntidiagonalParams { grid, rows, .. } = params;
    spec([q.shape[0], q.shape[1], rows.len(), grid.causal_blocks_of(rows)], DType::I32)
}

/// Of the words and counts of some rows, by their masses.
pub fn chosen(masses: &TensorSpec, params: &ChooseParams) -> (TensorSpec, TensorSpec) {
    let (batch, heads, rows) = (masses.shape[0], masses.shape[1], masses.shape[2]);
    (
        spec([batch, heads, rows, params.words_per_row], DType::I32),
        spec([batch, heads, rows, 1], DType::I32),
    )
}

fn selection(q: &TensorSpec, grids: &[BlockGrid]) -> (TensorSpec, TensorSpec) {
    let (batch, heads) = (q.shape[0], q.shape[1]);
    let (rows, _) = extent(grids);
    let width = SelectedBlocks::words_per_row(grids);
    (spec([batch, heads, rows, width], DType::I32), spec([batch, heads, rows], DType::I32))
}

/// Of attention's output and LSE.
pub fn attended(q: &TensorSpec) -> (TensorSpec, TensorSpec) {
    (q.clone(), spec([q.shape[0], q.shape[1], q.shape[2]], DType::F32))
}

/// Of a product of `x` and a weight, with `columns` in place of the last dim of `x`.
pub fn product(x: &TensorSpec, columns: usize) -> TensorSpec {
    let mut shape = x.shape.to_vec();
    if let Some(last) = shape.last_mut() {
        *last = columns;
    }
    TensorSpec::new(Shape::from(shape), x.dtype)
}

fn spec<const D: usize>(dims: [usize; D], dtype: DType) -> TensorSpec {
    TensorSpec::new(Shape::new(dims), dtype)
}
