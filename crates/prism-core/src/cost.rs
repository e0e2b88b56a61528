//! What a call costs, known before it runs.

use crate::grid::BlockGrid;
use crate::selection::{WORD_BITS, extent};
use crate::shape::AttentionShape;

/// Work and scratch memory of one attention call.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Cost {
    /// Floating-point operations of dense causal attention: 4 · head_dim a (query, key) pair.
    pub dense_flops: f64,
    /// The same for a selection of the given density, block granularity included.
    pub sparse_flops: f64,
    /// Pooling and block scores, both bands.
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
}
