//! What right means: the method in f64, plainly, from the definition. Slow on purpose.

use crate::bands::Bands;
use crate::grid::BlockGrid;
use crate::scores::{BandEnergy, Calibration, PooledHead};
use crate::second_order::{HeadMoments, SubBlocks};
use crate::select::SelectionRule;
use crate::selection::{BlockSelection, extent, set_bits};
use crate::shape::AttentionShape;

/// Output of [`attend`].
#[derive(Debug, Clone, PartialEq)]
pub struct Attended {
    /// `[batch, q_heads, q_len, head_dim]`, 0 where a row reads no key.
    pub out: Vec<f64>,
    /// Log-sum-exp of each row's scaled scores, natural log, `[batch, q_heads, q_len]`; −∞ where
    /// a row reads no key.
    pub lse: Vec<f64>,
}

/// Softmax attention of contiguous Q `[batch, q_heads, q_len, head_dim]` and K, V
/// `[batch, kv_heads, kv_len, head_dim]` over the keys that are causal, within their sequence,
/// and in a selected block (`None`: every block).
pub fn attend(
    q: &[f64],
    k: &[f64],
    v: &[f64],
    shape: &AttentionShape,
    grids: &[BlockGrid],
    selection: Option<&BlockSelection>,
    scale: f64,
) -> Attended {
    let AttentionShape { batch, q_heads, kv_heads, q_len, kv_len, head_dim: d } = *shape;
    let mut out = vec![0.0; batch * q_heads * q_len * d];
    let mut lse = vec![f64::NEG_INFINITY; batch * q_heads * q_len];
    for (b, grid) in grids.iter().enumerate().take(batch) {
        for h in 0..q_heads {
            let kv = (b * kv_heads + h / shape.group()) * kv_len;
            for row in 0..grid.rows() {
                for i in grid.queries(row) {
                    let at = (b * q_heads + h) * q_len + i;
                    let query = &q[at * d..][..d];
                    let reads = |j: &usize| {
                        selection.is_none_or(|s| s.contains(b, h, row, j / grid.block()))
                    };
                    let keys: Vec<usize> = (0..grid.visible_keys(i)).filter(reads).collect();
                    let scores: Vec<f64> =
                        keys.iter().map(|j| scale * dot(query, &k[(kv + j) * d..][..d])).collect();
                    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                    let total: f64 = scores.iter().map(|s| (s - max).exp()).sum();
                    if keys.is_empty() {
                        continue;
                    }
                    lse[at] = max + total.ln();
                    for (j, score) in keys.iter().zip(scores) {
                        let weight = (score - max).exp() / total;
                        let value = &v[(kv + j) * d..][..d];
                        for (o, x) in out[at * d..][..d].iter_mut().zip(value) {
                            *o += weight * x;
                        }
                    }
                }
            }
        }
    }
    Attended { out, lse }
}

/// Means of query blocks, `[batch, heads, rows, head_dim]`, of a contiguous
/// `[batch, heads, q_len, head_dim]`.
pub fn pool_queries(
    q: &[f64],
    heads: usize,
    q_len: usize,
    d: usize,
    grids: &[BlockGrid],
) -> Vec<f32> {
    let rows = extent(grids).0;
    pool(q, heads, q_len, d, grids.len(), rows, |b, row| {
        if row < grids[b].rows() { grids[b].queries(row) } else { 0..0 }
    })
}

/// Means of key blocks, `[batch, heads, key_blocks, head_dim]`, of a contiguous
/// `[batch, heads, kv_len, head_dim]`.
pub fn pool_keys(
    k: &[f64],
    heads: usize,
    kv_len: usize,
    d: usize,
    grids: &[BlockGrid],
) -> Vec<f32> {
    let blocks = extent(grids).1;
    pool(k, heads, kv_len, d, grids.len(), blocks, |b, v| grids[b].keys(v))
}

/// Means and variances (population) of the key blocks of `grids`, each
/// `[batch, heads, key_blocks, head_dim]`, of a contiguous `[batch, heads, kv_len, head_dim]`.
pub fn pool_moments(
    k: &[f64],
    heads: usize,
    kv_len: usize,
    d: usize,
    grids: &[BlockGrid],
) -> (Vec<f32>, Vec<f32>) {
    let blocks = extent(grids).1;
    let keys = |b: usize, v: usize| grids[b].keys(v);
    let means = pool_wide(k, heads, kv_len, d, grids.len(), blocks, keys);
    let mut deviations = vec![0.0; k.len()];
    for (line, mean) in means.chunks_exact(d).enumerate() {
        let (head, block) = (line / blocks, line % blocks);
        for at in keys(head / heads, block).map(|i| (head * kv_len + i) * d) {
            for (c, mean) in mean.iter().enumerate() {
                deviations[at + c] = (k[at + c] - mean).powi(2);
            }
        }
    }
    let narrow = |x: Vec<f64>| x.into_iter().map(|x| x as f32).collect();
    (narrow(means), pool(&deviations, heads, kv_len, d, grids.len(), blocks, keys))
}

fn pool(
    x: &[f64],
    heads: usize,
    len: usize,
    d: usize,
    batch: usize,
    blocks: usize,
    range: impl Fn(usize, usize) -> std::ops::Range<usize>,
) -> Vec<f32> {
    let means = pool_wide(x, heads, len, d, batch, blocks, range);
    means.into_iter().map(|mean| mean as f32).collect()
}

fn pool_wide(
    x: &[f64],
    heads: usize,
    len: usize,
    d: usize,
    batch: usize,
    blocks: usize,
    range: impl Fn(usize, usize) -> std::ops::Range<usize>,
) -> Vec<f64> {
    let mut means = vec![0.0; batch * heads * blocks * d];
    for (line, mean) in means.chunks_exact_mut(d).enumerate() {
        let (head, block) = (line / blocks, line % blocks);
        let tokens = range(head / heads, block);
        let count = tokens.len() as f64;
        for (c, mean) in mean.iter_mut().enumerate() {
            let sum: f64 = tokens.clone().map(|i| x[(head * len + i) * d + c]).sum();
            *mean = if count > 0.0 { sum / count } else { 0.0 };
        }
    }
    means
}

/// The selection of a whole batch from pooled Q `[batch, q_heads, rows, head_dim]` and pooled K
/// `[batch, kv_heads, key_blocks, head_dim]`.
pub fn select(
    pooled_q: &[f32],
    pooled_k: &[f32],
    shape: &AttentionShape,
    grids: &[BlockGrid],
    bands: &Bands,
    calibration: Calibration,
    rule: &SelectionRule,
) -> BlockSelection {
    let (rows, key_blocks) = extent(grids);
    let d = shape.head_dim;
    each_head(shape, grids, |b, line, kv_line, words| {
        let head = PooledHead {
            q: &pooled_q[line * rows * d..][..rows * d],
            k: &pooled_k[kv_line * key_blocks * d..][..key_blocks * d],
            history: BandEnergy::default(),
        };
        rule.select_head(head, &grids[b], bands, calibration, false, words);
    })
}

/// The selection of a whole batch by second-order scores, from means of query sub-blocks
/// `[batch, q_heads, query sub-blocks, head_dim]` and means and variances of key sub-blocks
/// `[batch, kv_heads, key sub-blocks, head_dim]`, with one entry of `grids` a sequence.
pub fn select_second_order(
    q_means: &[f32],
    (k_means, k_variances): (&[f32], &[f32]),
    shape: &AttentionShape,
    grids: &[SubBlocks],
    rule: &SelectionRule,
) -> BlockSelection {
    let most = |count: fn(&SubBlocks) -> usize| grids.iter().map(count).max().unwrap_or(0);
    let rows = most(|grid| grid.queries().rows()) * shape.head_dim;
    let keys = most(|grid| grid.keys().key_blocks()) * shape.head_dim;
    let blocks: Vec<BlockGrid> = grids.iter().map(|grid| *grid.blocks()).collect();
    each_head(shape, &blocks, |b, line, kv_line, words| {
        let head = HeadMoments {
            q_means: &q_means[line * rows..][..rows],
            k_means: &k_means[kv_line * keys..][..keys],
            k_variances: &k_variances[kv_line * keys..][..keys],
            head_dim: shape.head_dim,
        };
        rule.select_head_second_order(head, &grids[b], false, words);
    })
}

/// Selects head by head: `select` gets the sequence, the line of the query head and of the kv head
/// in the batch, and the words to write with their number a row.
fn each_head(
    shape: &AttentionShape,
    grids: &[BlockGrid],
    select: impl Fn(usize, usize, usize, (&mut [u32], usize)),
) -> BlockSelection {
    let (rows, key_blocks) = extent(grids);
    let mut selection = BlockSelection::empty(shape.batch, shape.q_heads, rows, key_blocks);
    let width = selection.words_per_row();
    for (b, grid) in grids.iter().enumerate() {
        for h in 0..shape.q_heads {
            let mut words = vec![0; rows * width];
            let kv_line = b * shape.kv_heads + h / shape.group();
            select(b, b * shape.q_heads + h, kv_line, (&mut words, width));
            for row in 0..grid.rows() {
                selection.set_row(b, h, row, set_bits(&words[row * width..][..width]));
            }
        }
    }
    selection
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}
