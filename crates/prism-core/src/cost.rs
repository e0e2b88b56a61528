//! What a call costs, known before it runs.

use crate::grid::BlockGrid;
use crate::scores::Scoring;
use crate::selection::{WORD_BITS, extent};
use crate::shape::AttentionShape;

/// Work and scratch memory of one attention call.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Cost {
    /// Floating-point operations of dense causal attention: 4 · head_dim a (query, key) pair.
    pub dense_flops: f64,
    /// The same for a selection of the given density, block granularity included.
    pub sparse_flops: f64,
    /// Pooling and block scores, by bands unless [`with_scoring`](Self::with_scoring) says otherwise.
    pub select_flops: f64,
    /// Bytes of the pooled Q and K in f32.
    pub pooled_bytes: u64,
    /// Bytes of the selection's words and counts.
    pub selection_bytes: u64,
    /// Bytes of the output, for elements of the given size, and of the LSE.
    pub output_bytes: u64,
}

impl Cost {
    /// Costs of a call on `grids`, one a sequence, with elements of `element_bytes` and a
    /// selection of `density` (selected over causal blocks).
    pub fn estimate(
        shape: &AttentionShape,
        grids: &[BlockGrid],
        density: f64,
        element_bytes: usize,
    ) -> Self {
        let heads = shape.q_heads as f64;
        let d = shape.head_dim as f64;
        let visible: f64 = grids
            .iter()
            .map(|grid| {
                let seeing = (grid.q_len() - grid.blind_queries().min(grid.q_len())) as f64;
                seeing * grid.first_position() as f64 + seeing * (seeing + 1.0) / 2.0
            })
            .sum();
        let pairs: f64 = grids.iter().map(|grid| grid.causal_pairs() as f64).sum();
        let area = grids.first().map_or(0.0, |grid| (grid.block() as f64).powi(2));
        let (rows, key_blocks) = extent(grids);
        let blocks = (shape.q_heads * rows + shape.kv_heads * key_blocks) * shape.batch;
        let lines = (shape.batch * shape.q_heads * rows) as u64;
        Self {
            dense_flops: 4.0 * d * heads * visible,
            sparse_flops: 4.0 * d * heads * (pairs * area * density).min(visible),
            select_flops: heads * pairs * 4.0 * d
                + (shape.q_heads * shape.q_len + shape.kv_heads * shape.kv_len) as f64
                    * d
                    * shape.batch as f64,
            pooled_bytes: (blocks * shape.head_dim * size_of::<f32>()) as u64,
            selection_bytes: lines * 4 * (key_blocks.div_ceil(WORD_BITS) as u64 + 1),
            output_bytes: (shape.batch * shape.q_heads * shape.q_len) as u64
                * (shape.head_dim * element_bytes + size_of::<f32>()) as u64,
        }
    }

    /// The costs with scores of another kind. Second order keeps means of query sub-blocks and
    /// means and variances of key sub-blocks, and multiplies 2 · head_dim a pair of them.
    pub fn with_scoring(
        self,
        shape: &AttentionShape,
        grids: &[BlockGrid],
        scoring: Scoring,
    ) -> Self {
        let Scoring::SecondOrder { query_sub, key_sub } = scoring else {
            return self;
        };
        let subdivided = |sub| grids.iter().map(|grid| grid.subdivided(sub)).collect::<Vec<_>>();
        let (rows, _) = extent(&subdivided(query_sub));
        let (_, keys) = extent(&subdivided(key_sub));
        let AttentionShape { batch, q_heads, kv_heads, head_dim: d, .. } = *shape;
        let vectors = batch * (q_heads * rows + 2 * kv_heads * keys);
        let pairs: f64 = grids.iter().map(|grid| grid.causal_pairs() as f64).sum();
        let area = grids.first().map_or(0.0, |grid| (grid.block() as f64).powi(2));
        let sub_pairs = pairs * area / (query_sub * key_sub) as f64;
        let elements = batch * d * (q_heads * shape.q_len + 4 * kv_heads * shape.kv_len);
        Self {
            select_flops: q_heads as f64 * sub_pairs * 4.0 * d as f64 + elements as f64,
            pooled_bytes: (vectors * d * size_of::<f32>()) as u64,
            ..self
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn selection_at_128k_takes_4_mib() {
        let n = 131_072;
        let shape = AttentionShape::new([1, 32, n, 128], [1, 8, n, 128], [1, 8, n, 128]).unwrap();
        let cost = Cost::estimate(&shape, &[BlockGrid::new(128, n, n).unwrap()], 0.1, 2);
        assert_eq!(cost.selection_bytes, 4 * 1024 * 1024 + 32 * 1024 * 4);
        assert!((cost.dense_flops / 1.4075e14 - 1.0).abs() < 1e-3);
        assert!((cost.sparse_flops / cost.dense_flops / 0.1 - 1.0).abs() < 1e-2);
    }
    #[test]
    fn second_order_keeps_more_and_multiplies_more() {
        let n = 131_072;
        let shape = AttentionShape::new([1, 32, n, 128], [1, 8, n, 128], [1, 8, n, 128]).unwrap();
        let grids = [BlockGrid::new(128, n, n).unwrap()];
        let bands = Cost::estimate(&shape, &grids, 0.1, 2);
        assert_eq!(bands.with_scoring(&shape, &grids, Scoring::Bands), bands);
        let cost = bands.with_scoring(&shape, &grids, Scoring::second_order());
        assert_eq!(cost.pooled_bytes, 4 * 128 * (32 * 4096 + 2 * 8 * 8192));
        // A pair of blocks is 4 · 8 pairs of sub-blocks.
        assert!((cost.select_flops / bands.select_flops / 32.0 - 1.0).abs() < 0.1);
    }
}
