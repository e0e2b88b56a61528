//! Do the kernels pool, calibrate and select what `prism_core` does? Pooled vectors to rounding;
//! the selection exactly wherever rounding of the scores leaves no doubt.

mod support;

use prism_core::bands::{BandRule, Bands};
use prism_core::scores::BandEnergy;
use prism_core::selection::extent;
use prism_core::{BlockSelection, Budget, Calibration, Rope, SelectionRule, oracle};
use prism_kernels::band_mask::BandMask;
use prism_kernels::calibrate::calibrate;
use prism_kernels::pool::pool;
use prism_kernels::select::{SelectProblem, SelectRung, select_blocks_on};
use support::*;

fn rules() -> Vec<SelectionRule> {
    let plain = SelectionRule::default();
    let bare = SelectionRule { sink_blocks: 0, recent_blocks: 0, dense_last_blocks: 0, ..plain };
    vec![
        plain,
        SelectionRule { budget: Budget::Mass(0.5), ..bare },
        SelectionRule { budget: Budget::Mass(1.0), dense_last_blocks: 2, ..bare },
        SelectionRule { budget: Budget::TopK(3), sink_blocks: 2, ..bare },
        SelectionRule { budget: Budget::TopK(1), min_blocks: 4, ..bare },
        SelectionRule { budget: Budget::Mass(0.9), max_blocks: Some(2), recent_blocks: 2, ..bare },
    ]
}

#[test]
fn do_pooled_means_agree_with_the_definition() {
    for device in devices() {
        let Bench { client, capabilities, name } = &device;
        for problem in problems() {
            let shape = &problem.shape;
            let (q_len, kv_len, d) = (shape.q_len, shape.kv_len, shape.head_dim);
            let q = random(1, shape.batch * shape.q_heads * q_len * d);
            let k = random(2, shape.batch * shape.kv_heads * kv_len * d);
            let bands = bands(d, problem.grids[0].block());
            let (pooled_q, pooled_k) = pool(
                client,
                capabilities,
                &operand(client, &q, [shape.batch, shape.q_heads, q_len, d]),
                &operand(client, &k, [shape.batch, shape.kv_heads, kv_len, d]),
                &problem.grids,
                &BandMask::new(&bands),
            );
            let want_q =
                oracle::pool_queries(&widened(&q), shape.q_heads, q_len, d, &problem.grids);
            let want_k = oracle::pool_keys(&widened(&k), shape.kv_heads, kv_len, d, &problem.grids);
            for (got, want) in [(&pooled_q, want_q), (&pooled_k, want_k)] {
                let means = floats(client, &got.means);
                let energy = floats(client, &got.energy);
                for (i, mean) in want.iter().enumerate() {
                    assert!((means[i] - mean).abs() < 1e-5, "{name}, {}: {i}", problem.name);
                }
                for (line, mean) in want.chunks_exact(d).enumerate() {
                    let mut sum = BandEnergy::default();
                    sum.add(mean, &bands);
                    let got = &energy[line * 4..][..4];
                    let there = got[3] == 1.0;
                    let want = [sum.high, sum.low, sum.all];
                    for (got, want) in got.iter().zip(want).filter(|_| there) {
                        let close = (f64::from(*got) - want).abs() < 1e-4 * want.max(1e-3);
                        assert!(close, "{name}, {}: {got} {want}", problem.name);
                    }
                    assert!(there || sum.all == 0.0);
                }
            }
        }
    }
}

#[test]
fn do_kernels_select_what_the_rule_selects() {
    for device in devices() {
        let Bench { client, capabilities, name } = &device;
        for problem in problems() {
            let shape = &problem.shape;
            let (d, grids) = (shape.head_dim, &problem.grids);
            let (rows, key_blocks) = extent(grids);
            let q = random(3, shape.batch * shape.q_heads * shape.q_len * d);
            let k = random(4, shape.batch * shape.kv_heads * shape.kv_len * d);
            let bands = bands(d, grids[0].block());
            let mask = BandMask::new(&bands);
            let (pooled_q, pooled_k) = pool(
                client,
                capabilities,
                &operand(client, &q, [shape.batch, shape.q_heads, shape.q_len, d]),
                &operand(client, &k, [shape.batch, shape.kv_heads, shape.kv_len, d]),
                grids,
                &mask,
            );
            let (q_means, k_means) =
                (floats(client, &pooled_q.means), floats(client, &pooled_k.means));
            for calibration in [Calibration::Global, Calibration::Causal, Calibration::Off] {
                let heads = [shape.q_heads, shape.kv_heads, d];
                let factors = calibrate(
                    client,
                    capabilities,
                    &pooled_q,
                    &pooled_k,
                    None,
                    grids,
                    heads,
                    &mask,
                    calibration,
                );
                let _ = floats(client, &factors);
                for rule in rules() {
                    let select = SelectProblem::new(
                        &pooled_q.means,
                        &pooled_k.means,
                        &factors,
                        heads,
                        grids,
                        &mask,
                        &rule,
                        false,
                    );
                    let want = oracle::select(
                        &q_means,
                        &k_means,
                        shape,
                        grids,
                        &bands,
                        calibration,
                        &rule,
                    );
                    let runs = |rung: &SelectRung| rung.runs(capabilities, &select);
                    for rung in SelectRung::LADDER.into_iter().filter(runs) {
                        let got = select_blocks_on(client, capabilities, &select, rung);
                        let got = BlockSelection::from_words(
                            [shape.batch, shape.q_heads, rows, key_blocks],
                            integers(client, &got.words),
                            integers(client, &got.counts),
                        )
                        .unwrap();
                        got.validate(grids, shape.q_heads).unwrap();
                        let differing = differing(&got, &want);
                        let what =
                            format!("{name} {rung:?}, {}, {calibration:?}, {rule:?}", problem.name);
                        // Rounding of scores can move a block across the mass; it rarely does.
                        assert!(
                            differing as usize * 200 <= want.words().len() * 32,
                            "{what}: {differing}"
                        );
                    }
                }
            }
        }
    }
}

/// On whole numbers and factors that are powers of two every order of summation gives the same
/// scores, so the selections must be the same bits.
#[test]
fn do_equal_scores_select_equal_blocks_bit_for_bit() {
    let d = 64;
    let bands =
        Bands::new(BandRule::Dims { high: 16, low: 64 }, Some(&Rope::new(1e4)), d, 16).unwrap();
    let mask = BandMask::new(&bands);
    let problems = [
        problem("one block", [1, 2, 1, 16, 16, d], 16, None),
        problem("33 blocks", [1, 4, 2, 33 * 16, 33 * 16, d], 16, None),
        problem("ragged chunks", [2, 2, 1, 90, 700, d], 16, Some(&[(90, 700), (50, 333)])),
    ];
    let whole = |seed, len| -> Vec<f32> {
        random(seed, len).into_iter().map(|x| (x * 1.2).round()).collect()
    };
    for Bench { client, capabilities, name } in &devices() {
        for problem in &problems {
            let (shape, grids) = (&problem.shape, &problem.grids);
            let (rows, key_blocks) = extent(grids);
            let q = whole(5, shape.batch * shape.q_heads * rows * d);
            let k = whole(6, shape.batch * shape.kv_heads * key_blocks * d);
            let (q_means, k_means) = (upload(client, &q), upload(client, &k));
            // 1/√16 and 1/√64.
            let lines = shape.batch * shape.q_heads * rows;
            let factors = upload(client, &[0.25, 0.125].repeat(lines));
            for rule in rules() {
                let off = Calibration::Off;
                let want = oracle::select(&q, &k, shape, grids, &bands, off, &rule);
                let select = SelectProblem::new(
                    &q_means,
                    &k_means,
                    &factors,
                    [shape.q_heads, shape.kv_heads, d],
                    grids,
                    &mask,
                    &rule,
                    false,
                );
                let runs = |rung: &SelectRung| rung.runs(capabilities, &select);
                for rung in SelectRung::LADDER.into_iter().filter(runs) {
                    let got = select_blocks_on(client, capabilities, &select, rung);
                    let what = format!("{name} {rung:?}, {}, {rule:?}", problem.name);
                    assert_eq!(integers(client, &got.words), want.words(), "{what}");
                    assert_eq!(integers(client, &got.counts), want.counts(), "{what}");
                }
            }
        }
    }
}

fn differing(a: &BlockSelection, b: &BlockSelection) -> u32 {
    a.words().iter().zip(b.words()).map(|(a, b)| (a ^ b).count_ones()).sum()
}
