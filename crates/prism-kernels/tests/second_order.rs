//! Do the kernels of second-order scoring pool and select what `prism_core` does? On whole numbers,
//! whose sums no order changes, bit for bit.

mod support;

use prism_core::second_order::SubBlocks;
use prism_core::selection::extent;
use prism_core::{BlockGrid, BlockSelection, Budget, SelectionRule, oracle};
use prism_kernels::moments::pool_moments;
use prism_kernels::select::{SecondOrderProblem, SelectRung, select_by_second_order_on};
use support::*;

fn divided(problem: &Problem, sub: usize) -> Vec<BlockGrid> {
    problem.grids.iter().map(|grid| grid.subdivided(sub)).collect()
}

#[test]
fn do_moments_agree_with_the_definition() {
    for Bench { client, capabilities, name } in &devices() {
        for problem in problems() {
            let shape = &problem.shape;
            let (len, d) = (shape.kv_len, shape.head_dim);
            // Off centre, where a variance from sums of squares would lose its digits.
            let k: Vec<f32> = random(7, shape.batch * shape.kv_heads * len * d)
                .into_iter()
                .map(|x| x + 100.0)
                .collect();
            let x = operand(client, &k, [shape.batch, shape.kv_heads, len, d]);
            let grids = divided(&problem, 16);
            let got = pool_moments(client, capabilities, &x, &grids);
            let (means, variances) =
                oracle::pool_moments(&widened(&k), shape.kv_heads, len, d, &grids);
            for (got, want) in [(&got.means, means), (&got.variances, variances)] {
                let got = floats(client, got);
                assert_eq!(got.len(), want.len().max(1));
                for (i, (got, want)) in got.iter().zip(&want).enumerate() {
                    let close = (got - want).abs() < 2e-5 * want.abs().max(1.0);
                    assert!(close, "{name}, {}: {i}: {got} {want}", problem.name);
                }
            }
        }
    }
}

fn whole(seed: u64, len: usize, by: f32) -> Vec<f32> {
    random(seed, len).into_iter().map(|x| (x * by).round()).collect()
}

#[test]
fn do_kernels_select_by_second_order_what_the_rule_selects() {
    let plain = SelectionRule::default();
    let bare = SelectionRule { sink_blocks: 0, recent_blocks: 0, dense_last_blocks: 0, ..plain };
    let rules = [
        plain,
        SelectionRule { budget: Budget::Mass(0.6), ..bare },
        SelectionRule { budget: Budget::TopK(2), min_blocks: 3, ..bare },
        SelectionRule { budget: Budget::Mass(0.9), max_blocks: Some(2), ..bare },
    ];
    // A power of 4, so that the scale of a score is exact.
    let chunk = [1, 4, 2, 150, 430, 64];
    let lengths = [(150, 430), (1, 77), (99, 99)];
    let problems = [
        problem("one token", [1, 1, 1, 1, 1, 64], 16, None),
        problem("a chunk", chunk, 128, None),
        problem("ragged", [3, 2, 1, 150, 430, 64], 64, Some(&lengths)),
        problem("more queries than keys", [1, 2, 2, 60, 40, 64], 32, None),
        problem("many sub-blocks", [1, 1, 1, 300, 2000, 16], 256, None),
    ];
    for Bench { client, capabilities, name } in &devices() {
        for problem in &problems {
            let (shape, grids) = (&problem.shape, &problem.grids);
            let (block, d) = (grids[0].block(), shape.head_dim);
            for subs in [[16, 16], [32, 16], [16, 64]] {
                if subs.iter().any(|sub| block % sub != 0) {
                    continue;
                }
                let q_subs = extent(&divided(problem, subs[0])).0;
                let k_subs = extent(&divided(problem, subs[1])).1;
                let q = whole(3, shape.batch * shape.q_heads * q_subs * d, 3.0);
                let k = whole(4, shape.batch * shape.kv_heads * k_subs * d, 2.0);
                let variances: Vec<f32> =
                    whole(5, k.len(), 2.0).into_iter().map(|x| x.abs() * 2.0).collect();
                let (q_means, k_means) = (upload(client, &q), upload(client, &k));
                let k_variances = upload(client, &variances);
                let sub_blocks: Vec<SubBlocks> =
                    grids.iter().map(|&grid| SubBlocks::new(grid, subs[0], subs[1])).collect();
                for rule in &rules {
                    let want =
                        oracle::select_second_order(&q, (&k, &variances), shape, &sub_blocks, rule);
                    let problem_on = SecondOrderProblem::new(
                        &q_means,
                        &k_means,
                        &k_variances,
                        [shape.q_heads, shape.kv_heads, d],
                        grids,
                        subs,
                        rule,
                        false,
                    );
                    let mut rungs = vec![SelectRung::Unit];
                    rungs.extend(capabilities.plane.map(|_| SelectRung::Plane));
                    for rung in rungs {
                        let got =
                            select_by_second_order_on(client, capabilities, &problem_on, rung);
                        let (rows, key_blocks) = extent(grids);
                        let got = BlockSelection::from_words(
                            [shape.batch, shape.q_heads, rows, key_blocks],
                            integers(client, &got.words),
                            integers(client, &got.counts),
                        )
                        .unwrap();
                        let what = format!("{name} {rung:?}, {}, {subs:?}, {rule:?}", problem.name);
                        assert_eq!(got.words(), want.words(), "{what}");
                        assert_eq!(got.counts(), want.counts(), "{what}");
                    }
                }
            }
        }
    }
}
