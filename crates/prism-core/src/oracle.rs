//! What right means: the method in f64, plainly, from the definition. Slow on purpose.

use crate::bands::Bands;
use crate::grid::BlockGrid;
use crate::scores::{BandEnergy, Calibration, PooledHead};
use crate::select::SelectionRule;
use crate::selection::{BlockSelection, extent};
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

fn pool(
    x: &[f64],
    heads: usize,
    len: usize,
    d: usize,
    batch: usize,
    blocks: usize,
    range: impl Fn(usize, usize) -> std::ops::Range<usize>,
) -> Vec<f32> {
    let mut means = vec![0.0; batch * heads * blocks * d];
    for (line, mean) in means.chunks_exact_mut(d).enumerate() {
        let (head, block) = (line / blocks, line % blocks);
        let tokens = range(head / heads, block);
        let count = tokens.len() as f64;
        for (c, mean) in mean.iter_mut().enumerate() {
            let sum: f64 = tokens.clone().map(|i| x[(head * len + i) * d + c]).sum();
            *mean = if count > 0.0 { (sum / count) as f32 } else { 0.0 };
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
    let mut selection = BlockSelection::empty(shape.batch, shape.q_heads, rows, key_blocks);
    let width = selection.words_per_row();
    for (b, grid) in grids.iter().enumerate() {
        for h in 0..shape.q_heads {
            let kv_head = b * shape.kv_heads + h / shape.group();
            let head = PooledHead {
                q: &pooled_q[(b * shape.q_heads + h) * rows * d..][..rows * d],
                k: &pooled_k[kv_head * key_blocks * d..][..key_blocks * d],
                history: BandEnergy::default(),
            };
            let mut words = vec![0; rows * width];
            rule.select_head(head, grid, bands, calibration, false, (&mut words, width));
            for row in 0..grid.rows() {
                let blocks = crate::selection::set_bits(&words[row * width..][..width]);
                selection.set_row(b, h, row, blocks);
            }
        }
    }
    selection
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}
