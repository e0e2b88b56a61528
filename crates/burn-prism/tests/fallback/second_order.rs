//! Selection by second-order scores.

use crate::support::*;
use burn::backend::tensor::Device;
use burn_prism::fallback;
use burn_prism::ops::{PrismBackend, SecondOrderParams};
use prism_core::selection::extent;
use prism_core::{AttentionShape, BlockSelection, oracle};

/// Both the tensor ops and what the backend supplies, against the oracle's rule.
pub fn selects_by_second_order<B: PrismBackend>() {
    let device = Device::<B>::default();
    let long = Problem::new([4, 2], 12, 16, &[(400, 900), (900, 900), (900, 900)]);
    for (i, problem) in problems().chain([long]).enumerate() {
        let AttentionShape { batch, q_heads, kv_heads, head_dim: d, .. } = problem.shape;
        for (j, mut rule) in rules().into_iter().enumerate() {
            if extent(&problem.grids).0 == 0 {
                continue;
            }
            rule.dense_last_blocks = j % 2;
            let (query_sub, key_sub) = [(8, 4), (16, 8), (4, 16)][(i + j) % 3];
            let subs = problem.sub_blocks(query_sub, key_sub);
            let [q, means, variances] = problem.moments(&subs);
            let expected =
                oracle::select_second_order(&q, (&means, &variances), &problem.shape, &subs, &rule);
            let queries = q.len() / (batch * q_heads * d);
            let keys = means.len() / (batch * kv_heads * d);
            let inputs = || {
                (
                    float::<B>(&q, &[batch, q_heads, queries, d], &device),
                    float::<B>(&means, &[batch, kv_heads, keys, d], &device),
                    float::<B>(&variances, &[batch, kv_heads, keys, d], &device),
                )
            };
            let grids = problem.grids.clone();
            let params = SecondOrderParams::new(grids, query_sub, key_sub, rule, false);
            let (q, means, variances) = inputs();
            let ops = fallback::select_second_order::<B>(q, means, variances, &params);
            let (q, means, variances) = inputs();
            let native = B::prism_select_second_order(q, means, variances, params);
            for (words, counts) in [ops, native] {
                let (words, counts) = (read_words::<B>(words), read_words::<B>(counts));
                let got = BlockSelection::from_words(expected.shape(), words, counts).unwrap();
                assert_eq!(got, expected, "{:?}, {rule:?}, {query_sub}, {key_sub}", problem.grids);
            }
        }
    }
}
