//! What the last queries of every head read, by column and by diagonal.

use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, FloatDType};
use prism_core::BlockGrid;

use crate::fallback::softmax::{probabilities, scores};
use crate::fallback::tensor::{Float, Int};
use crate::fallback::{TILE, steps};
use crate::ops::PrismBackend;

/// About how many probabilities there are at once: those of many queries even of long prompts, since each step
/// reads all keys of its heads.
pub const AT_ONCE: usize = 4 * TILE;

/// Key heads at once, where the queries of one are `queries` in all sequences: few heads rather than few of their
/// queries, each of which would read all keys of all heads.
pub fn kv_heads_at_once(queries: usize, len: usize) -> usize {
    (AT_ONCE / (queries * len).max(1)).max(1)
}

/// Probabilities of the last queries over their number, `[batch, q_heads, 1, kv_len]` each.
pub struct LastQueries<B: Backend> {
    /// Of each key.
    pub vertical: Float<B>,
    /// Of each distance from the query's own position.
    pub slash: Float<B>,
    /// Those queries, `[batch, q_heads, queries, head_dim]` in f32, the last one first.
    pub q: Float<B>,
}

impl<B: PrismBackend> LastQueries<B> {
    /// Of the last `count` queries, as far as there are that many that see a key; Q and K are those of
    /// sequences on one grid.
    pub fn new(q: Float<B>, k: &Float<B>, grid: &BlockGrid, scale: f32, count: usize) -> Self {
        let ([batch, heads, ..], [_, kv_heads, ..]) = (q.dims::<4>(), k.dims::<4>());
        let (device, group, len) = (q.device(), heads / kv_heads, grid.kv_len());
        let queries = count.min(grid.q_len() - grid.blind_queries());
        let newest_first = (0..queries).map(|r| (grid.q_len() - 1 - r) as i32).collect();
        let q = q.select(2, Int::from_list(newest_first, &device)).cast(FloatDType::F32);
        let some = kv_heads_at_once(batch * group * queries, len);
        let (vertical, slash) = steps(kv_heads, some)
            .map(|own| {
                let q = q.clone().slice(1, own.start * group..own.end * group);
                lines(q * scale, k.clone().slice(1, own), len)
            })
            .unzip();
        let join = |parts| Float::join(parts, 1, [batch, heads, 1, len], 0.0, &device);
        let share = 1.0 / queries.max(1) as f32;
        Self { vertical: join(vertical) * share, slash: join(slash) * share, q }
    }
}

/// Sums of the probabilities of some heads by column and by distance; `q` are scaled, the last one first.
fn lines<B: PrismBackend>(q: Float<B>, k: Float<B>, len: usize) -> (Float<B>, Float<B>) {
    let device = q.device();
    let [batch, heads, queries, _] = q.dims::<4>();
    let keys = k.slice(2, 0..len).cast(FloatDType::F32).transpose();
    let none = || Float::full([batch, heads, 1, len], 0.0, &device);
    let some = (AT_ONCE / (batch * heads * len)).max(1);
    steps(queries, some).fold((none(), none()), |(vertical, slash), rows| {
        let scores = scores(q.clone().slice(2, rows.clone()), keys.clone());
        let (columns, distances) = B::prism_line_sums(scores.0, rows.start);
        (vertical + Float(columns), slash + Float(distances))
    })
}

/// Softmax of scores, added up by column and by distance; see
/// [`prism_line_sums`](crate::ops::PrismBackend::prism_line_sums).
pub fn line_sums<B: Backend>(
    scores: FloatTensor<B>,
    first: usize,
) -> (FloatTensor<B>, FloatTensor<B>) {
    let scores = Float::<B>(scores);
    let (device, [batch, heads, count, len]) = (scores.device(), scores.dims());
    let visible = (first..first + count).map(|r| (len - r) as i32).collect();
    let visible = Int::from_list(visible, &device).reshape([1, 1, count, 1]);
    let unseen = Int::range(0..len, &device).reshape([1, 1, 1, len]).ge(&visible);
    let p = probabilities(scores, &unseen);
    let vertical = p.clone().sum(2);
    // Row r shifts right by r, so that diagonals become columns: rows of one element less begin
    // one element earlier each. Column c holds distance len − first − 1 − c.
    let (wide, narrow) = (len + count, len + count - 1);
    let diagonals = Float::join(vec![p], 3, [batch, heads, count, wide], 0.0, &device)
        .reshape([batch, heads, 1, count * wide])
        .slice(3, 0..count * narrow)
        .reshape([batch, heads, count, narrow])
        .sum(2);
    let nearest_first = (0..(len - first) as i32).rev().collect();
    let slash = diagonals.select(3, Int::from_list(nearest_first, &device));
    let slash = Float::join(vec![slash], 3, [batch, heads, 1, len], 0.0, &device);
    (vertical.0, slash.0)
}
