//! Means of blocks of one head, as several methods score by.

use std::ops::Range;

use crate::grid::BlockGrid;
use crate::masses::integer_masses;
use crate::selectors::input::Head;

/// Means of runs of vectors of `d` elements, `[runs, d]`; 0 of an empty run.
pub(super) fn means(x: &[f32], d: usize, runs: impl Iterator<Item = Range<usize>>) -> Vec<f32> {
    let mut means = Vec::new();
    let mut sums = vec![0.0f64; d];
    for run in runs {
        sums.fill(0.0);
        for vector in x[run.start * d..run.end * d].chunks_exact(d) {
            sums.iter_mut().zip(vector).for_each(|(sum, &x)| *sum += f64::from(x));
        }
        let count = run.len().max(1) as f64;
        means.extend(sums.iter().map(|sum| (sum / count) as f32));
    }
    means
}

/// Means of the query blocks of a grid, `[rows, head_dim]`.
pub(super) fn query_means(head: &Head, grid: &BlockGrid) -> Vec<f32> {
    means(head.q, head.head_dim, (0..grid.rows()).map(|row| grid.queries(row)))
}

/// Means of the key blocks of a grid, `[key_blocks, head_dim]`.
pub(super) fn key_means(head: &Head, grid: &BlockGrid) -> Vec<f32> {
    means(head.k, head.head_dim, (0..grid.key_blocks()).map(|v| grid.keys(v)))
}

/// Means and variances of the key blocks of a grid, each `[key_blocks, head_dim]`.
pub(super) fn key_moments(head: &Head, grid: &BlockGrid) -> (Vec<f32>, Vec<f32>) {
    let d = head.head_dim;
    let k_means = key_means(head, grid);
    let mut squares = head.k.to_vec();
    for (mean, v) in k_means.chunks_exact(d).zip(0..) {
        for j in grid.keys(v) {
            let key = &mut squares[j * d..][..d];
            key.iter_mut().zip(mean).for_each(|(x, mean)| *x = (*x - mean).powi(2));
        }
    }
    let k_variances = key_means(&Head { k: &squares, ..*head }, grid);
    (k_means, k_variances)
}

/// Visits the rows of a head with the integer masses of q̄·k̄ · scale over its causal blocks.
pub(super) fn for_each_row(head: &Head, mut visit: impl FnMut(usize, &[u32])) {
    let (q, k) = (query_means(head, &head.grid), key_means(head, &head.grid));
    let d = head.head_dim;
    let (mut scores, mut masses) = (Vec::new(), Vec::new());
    for (row, q) in q.chunks_exact(d).enumerate() {
        let keys = k.chunks_exact(d).take(head.grid.causal_blocks(row));
        scores.clear();
        scores.extend(keys.map(|k| (dot_wide(q, k) * head.scale) as f32));
        integer_masses(&scores, &mut masses);
        visit(row, &masses);
    }
}

/// Dot product of few vectors, in f64.
pub(super) fn dot_wide(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
}

/// Dot product of many vectors: sixteen partial sums in f32, which the processor works on at once.
pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<16>(), b.as_chunks::<16>());
    let mut sums = [0.0f32; 16];
    for (a, b) in a.iter().zip(b) {
        for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
            *sum += a * b;
        }
    }
    let rest: f32 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    sums.iter().sum::<f32>() + rest
}
