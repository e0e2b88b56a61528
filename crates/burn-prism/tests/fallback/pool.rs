//! Means and moments.

use crate::support::*;
use burn::backend::tensor::Device;
use burn::backend::{Backend, TensorMetadata};
use burn_prism::fallback;
use burn_prism::ops::{PrismBackend, Side};
use prism_core::BlockGrid;
use prism_core::selection::extent;

pub fn pools<B: Backend>() {
    let device = Device::<B>::default();
    for problem in problems() {
        let [q_dims, k_dims] = problem.dims();
        let q = float::<B>(&problem.q, &q_dims, &device);
        let k = float::<B>(&problem.k, &k_dims, &device);
        let q = fallback::pool::<B>(q, &problem.grids, Side::Queries);
        let k = fallback::pool::<B>(k, &problem.grids, Side::Keys);
        let (rows, key_blocks) = extent(&problem.grids);
        let d = problem.shape.head_dim;
        assert_eq!(q.shape().to_vec(), [q_dims[0], q_dims[1], rows, d]);
        assert_eq!(k.shape().to_vec(), [k_dims[0], k_dims[1], key_blocks, d]);
        let [expected_q, expected_k] = problem.pooled();
        close(&read::<B>(q), &wide(&expected_q), 1e-5);
        close(&read::<B>(k), &wide(&expected_k), 1e-5);
    }
}

pub fn pools_moments<B: PrismBackend>() {
    let device = Device::<B>::default();
    for problem in problems() {
        let [_, k_dims] = problem.dims();
        for sub in [4, 16] {
            let subs = problem.sub_blocks(sub, sub);
            let grids: Vec<BlockGrid> = subs.iter().map(|sub| *sub.keys()).collect();
            if extent(&grids).1 == 0 {
                continue;
            }
            let [_, expected_means, expected_variances] = problem.moments(&subs);
            let k = float::<B>(&problem.k, &k_dims, &device);
            let dims = [k_dims[0], k_dims[1], extent(&grids).1, k_dims[3]];
            for (means, variances) in [
                fallback::pool_moments::<B>(k.clone(), &grids),
                B::prism_pool_moments(k, grids.clone()),
            ] {
                assert_eq!(means.shape().to_vec(), dims);
                assert_eq!(variances.shape().to_vec(), dims);
                close(&read::<B>(means), &wide(&expected_means), 1e-5);
                close(&read::<B>(variances), &wide(&expected_variances), 1e-5);
            }
        }
    }
}
