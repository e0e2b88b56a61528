//! The softmax mass that each query block gives each key block: what a selection should find.

use burn::tensor::activation::softmax;
use burn::tensor::{DType, Tensor, TensorData};
use prism_core::BlockGrid;
use prism_models::ModelError;

use crate::error::Result;

/// True masses of one sequence, `[q_heads, rows, key_blocks]`: of each key block the mean over the queries
/// of a row. Those of a row sum to 1.
#[derive(Debug, Clone)]
pub struct TrueMasses {
    rows: usize,
    key_blocks: usize,
    masses: Vec<f32>,
}

impl TrueMasses {
    /// Of rotated Q `[1, q_heads, q_len, head_dim]` and K `[1, kv_heads, kv_len, head_dim]`, in f32, a row
    /// at a time: q_len × kv_len scores never exist at once.
    ///
    /// # Errors
    /// The device failed.
    pub fn new(q: &Tensor<4>, k: &Tensor<4>, grid: &BlockGrid) -> Result<Self> {
        let [_, q_heads, _, dim] = q.dims();
        let kv_heads = k.dims()[1];
        let (rows, key_blocks, block) = (grid.rows(), grid.key_blocks(), grid.block());
        let scale = 1.0 / (dim as f64).sqrt();
        let mut masses = vec![0.0; q_heads * rows * key_blocks];
        for row in 0..rows {
            let queries = grid.queries(row);
            let count = queries.len();
            let group = q_heads / kv_heads * count;
            let keys = grid.visible_keys(queries.end - 1);
            let blocks = grid.causal_blocks(row);
            let q = q.clone().slice_dim(2, queries.clone()).cast(DType::F32) * scale;
            let k = k.clone().slice_dim(2, 0..keys).cast(DType::F32);
            let q = q.reshape([kv_heads, group, dim]);
            let k = k.reshape([kv_heads, keys, dim]);
            let scores = q.matmul(k.swap_dims(1, 2)).reshape([q_heads, count, keys]);
            // Only the last keys, up to as many as there are queries, are hidden from some.
            let seen = grid.visible_keys(queries.start);
            let hidden: Vec<f32> = queries
                .clone()
                .flat_map(|query| {
                    let visible = grid.visible_keys(query);
                    (seen..keys).map(move |key| if key < visible { 0.0 } else { f32::NEG_INFINITY })
                })
                .collect();
            let device = scores.device();
            let scores = if seen < keys {
                let mask = TensorData::new(hidden, [1, count, keys - seen]);
                let mask = Tensor::<3>::from_data(mask, (&device, DType::F32));
                let last = scores.clone().slice_dim(2, seen..keys) + mask;
                Tensor::cat(vec![scores.slice_dim(2, 0..seen), last], 2)
            } else {
                scores
            };
            let shares = softmax(scores, 2).mean_dim(1);
            let missing = blocks * block - keys;
            let rest = Tensor::zeros([q_heads, 1, missing], (&device, DType::F32));
            let shares = if missing > 0 { Tensor::cat(vec![shares, rest], 2) } else { shares };
            let sums = shares.reshape([q_heads, blocks, block]).sum_dim(2);
            for (head, sums) in read(sums)?.chunks(blocks).enumerate() {
                let start = (head * rows + row) * key_blocks;
                masses[start..start + blocks].copy_from_slice(sums);
            }
        }
        Ok(Self { rows, key_blocks, masses })
    }

    /// The masses of the key blocks of one row.
    pub fn row(&self, head: usize, row: usize) -> &[f32] {
        &self.masses[(head * self.rows + row) * self.key_blocks..][..self.key_blocks]
    }
}

pub(super) fn read<const D: usize>(tensor: Tensor<D>) -> Result<Vec<f32>> {
    let failed = |reason: String| ModelError::Read { reason };
    let data = tensor.try_into_data_dtype(DType::F32).map_err(|e| failed(e.to_string()))?;
    Ok(data.try_into_vec::<f32>().map_err(|e| failed(format!("{e:?}")))?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::{Device, Distribution};

    /// Against f64 loops, with shared kv heads, a partial last block, and a chunk that starts in a block.
    #[test]
    fn are_the_masses_those_of_plain_loops() {
        let (dim, block) = (4, 8);
        for (q_len, kv_len) in [(21, 21), (13, 29), (8, 8)] {
            let device = Device::flex();
            device.seed(7);
            let normal = Distribution::Normal(0.0, 2.0);
            let q = Tensor::<4>::random([1, 4, q_len, dim], normal, &device);
            let k = Tensor::<4>::random([1, 2, kv_len, dim], normal, &device);
            let grid = BlockGrid::new(block, q_len, kv_len).unwrap();
            let masses = TrueMasses::new(&q, &k, &grid).unwrap();
            let (q, k) = (read(q).unwrap(), read(k).unwrap());
            for head in 0..4 {
                for row in 0..grid.rows() {
                    let mut right = vec![0.0; grid.key_blocks()];
                    for query in grid.queries(row) {
                        let q = &q[(head * q_len + query) * dim..][..dim];
                        let weights: Vec<f64> = (0..grid.visible_keys(query))
                            .map(|key| {
                                let k = &k[(head / 2 * kv_len + key) * dim..][..dim];
                                let dot: f64 = q.iter().zip(k).map(|(a, b)| f64::from(a * b)).sum();
                                (dot / (dim as f64).sqrt()).exp()
                            })
                            .collect();
                        let total: f64 = weights.iter().sum();
                        let count = grid.queries(row).len() as f64;
                        for (key, weight) in weights.iter().enumerate() {
                            right[key / block] += weight / total / count;
                        }
                    }
                    let got = masses.row(head, row);
                    for (got, right) in got.iter().zip(&right) {
                        assert!((f64::from(*got) - right).abs() < 1e-5, "{got}, not {right}");
                    }
                }
            }
        }
    }
}
