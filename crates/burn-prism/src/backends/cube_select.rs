//! Selection on every CubeCL runtime, by the kernels of `prism_kernels`: what [`cube`](super::cube) does of the
//! operations that choose blocks.

use burn::tensor::DType;
use burn_cubecl::tensor::CubeTensor;
use burn_cubecl::{CubeBackend, CubeDevice};
use cubecl::server::Handle;
use prism_core::{BlockGrid, SelectionRule};
use prism_kernels::Capabilities;
use prism_kernels::band_mask::{BandMask, MAX_HEAD_DIM};
use prism_kernels::calibrate::calibrate;
use prism_kernels::pool::{Pooled, energies, pool};
use prism_kernels::select::antidiagonal::{self, AntidiagonalProblem};
use prism_kernels::select::outliers::{self, OutliersError, OutliersProblem};
use prism_kernels::select::{self, MassesProblem, SecondOrderProblem, SelectProblem, Selection};

use super::cube::{contiguous, dims, element, operand, output};
use crate::fallback;
use crate::ops::{
    AntidiagonalParams, ChooseParams, OutliersParams, Prefix, SecondOrderParams, SelectParams,
};

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
    let takes = |element| antidiagonal::takes(&capabilities, element, dim, block, stride);
    dim <= MAX_HEAD_DIM && element(dtype).is_some_and(takes)
}

/// Selects from pooled Q and K.
pub fn select(
    pooled_q: CubeTensor,
    pooled_k: CubeTensor,
    history: CubeTensor,
    params: SelectParams,
) -> (CubeTensor, CubeTensor) {
    let [batch, q_heads, rows, dim] = dims(&pooled_q);
    let [_, kv_heads, key_blocks, _] = dims(&pooled_k);
    if dim > MAX_HEAD_DIM || batch * q_heads * rows * key_blocks == 0 {
        return fallback::select::<CubeBackend>(pooled_q, pooled_k, history, &params);
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

/// Selects from Q and K, which are pooled at once.
pub fn select_blocks(
    q: CubeTensor,
    k: CubeTensor,
    params: SelectParams,
) -> (CubeTensor, CubeTensor) {
    let (Some(queries), Some(keys)) = (operand(&q), operand(&k)) else {
        return fallback::select_blocks::<CubeBackend>(q, k, params);
    };
    let capabilities = Capabilities::of(&q.client);
    let bands = BandMask::new(&params.bands);
    let pooled = pool(&q.client, &capabilities, &queries, &keys, &params.grids, &bands);
    let heads = [queries.shape[1], keys.shape[1], queries.shape[3]];
    selection(&q, pooled, None, heads, &params)
}

/// Selects by second-order scores of pooled sub-blocks.
pub fn select_second_order(
    q_means: CubeTensor,
    k_means: CubeTensor,
    k_variances: CubeTensor,
    params: SecondOrderParams,
) -> (CubeTensor, CubeTensor) {
    let ([_, q_heads, _, dim], [_, kv_heads, ..]) = (dims(&q_means), dims(&k_means));
    if dim > MAX_HEAD_DIM {
        return fallback::select_second_order::<CubeBackend>(
            q_means,
            k_means,
            k_variances,
            &params,
        );
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
    let selection = select::select_by_second_order(&q.client, &capabilities, &problem);
    outputs(&q, selection, q_heads, &params.grids)
}

/// Selects with outlier keys apart.
pub fn select_outliers(
    q: CubeTensor,
    k: CubeTensor,
    params: OutliersParams,
) -> (CubeTensor, CubeTensor) {
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
            outliers::select_outliers(&q.client, &Capabilities::of(&q.client), &problem).ok()
        }
        _ => None,
    };
    match selection {
        Some(selection) => outputs(&q, selection, dims(&q)[1], grids),
        None => fallback::selectors::select_outliers::<CubeBackend>(q, k, &params),
    }
}

/// Masses of some rows by sums along antidiagonals.
pub fn antidiagonal_masses(q: CubeTensor, k: CubeTensor, params: AntidiagonalParams) -> CubeTensor {
    let AntidiagonalParams { grid, rows, stride, scale } = &params;
    let capabilities = Capabilities::of(&q.client);
    if let (Some(queries), Some(keys)) = (operand(&q), operand(&k)) {
        let problem =
            AntidiagonalProblem::new(&queries, &keys, grid, rows.clone(), *stride, *scale);
        if problem.runs(&capabilities) {
            let masses = antidiagonal::antidiagonal_masses(&q.client, &capabilities, &problem);
            let blocks = grid.causal_blocks_of(rows);
            let [batch, heads, ..] = queries.shape;
            return output(&q, masses, [batch, heads, rows.len(), blocks], DType::I32);
        }
    }
    fallback::antidiagonal_masses::<CubeBackend>(q, k, &params)
}

/// Probabilities of the last queries, by key and by distance.
pub fn line_sums(scores: CubeTensor, first: usize) -> (CubeTensor, CubeTensor) {
    let scores = contiguous(scores);
    let [batch, heads, rows, len] = dims(&scores);
    let capabilities = Capabilities::of(&scores.client);
    let shape = [batch * heads, rows, len];
    let lines = select::line_sums(&scores.client, &capabilities, &scores.handle, shape, first);
    let sums = |handle| output(&scores, handle, [batch, heads, 1, len], DType::F32);
    (sums(lines.vertical), sums(lines.slash))
}

/// Selects the blocks of some rows by their masses.
pub fn choose(masses: CubeTensor, params: ChooseParams) -> (CubeTensor, CubeTensor) {
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
    let chosen = select::select_from_masses(&masses.client, &capabilities, &problem);
    (
        output(&masses, chosen.words, [batch, heads, count, *words_per_row], DType::I32),
        output(&masses, chosen.counts, [batch, heads, count, 1], DType::I32),
    )
}

/// The heaviest elements of rows of any length.
pub fn heaviest(masses: CubeTensor, limits: CubeTensor, prefix: Prefix) -> CubeTensor {
    let capabilities = Capabilities::of(&masses.client);
    if !select::finds_prefixes(&capabilities) {
        return fallback::heaviest_prefix::<CubeBackend>(masses, limits, prefix);
    }
    let [masses, limits] = [masses, limits].map(contiguous);
    let shape @ [batch, heads, rows, len] = dims(&masses);
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
    outputs(like, select::select_blocks(client, &capabilities, &problem), heads[0], grids)
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
