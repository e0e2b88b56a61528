//! Selection by bands.

use crate::support::*;
use burn::backend::TensorMetadata;
use burn::backend::tensor::Device;
use burn_prism::fallback;
use burn_prism::ops::{PrismBackend, SelectParams};
use prism_core::scores::{BandEnergy, PooledHead};
use prism_core::selection::{WORD_BITS, extent, set_bits};
use prism_core::{AttentionShape, BlockSelection, Budget, Calibration, SelectionRule};

/// The oracle's rule on given pooled vectors, history and all.
fn expected_selection(
    q: &[f32],
    k: &[f32],
    history: &[f32],
    shape: &AttentionShape,
    params: &SelectParams,
) -> BlockSelection {
    let (rows, key_blocks) = extent(&params.grids);
    let d = shape.head_dim;
    let mut selection = BlockSelection::empty(shape.batch, shape.q_heads, rows, key_blocks);
    let width = selection.words_per_row();
    for (b, grid) in params.grids.iter().enumerate() {
        for h in 0..shape.q_heads {
            let line = b * shape.q_heads + h;
            let kv_line = b * shape.kv_heads + h / shape.group();
            let past: Vec<f64> = wide(&history[line * 4..][..4]);
            let head = PooledHead {
                q: &q[line * rows * d..][..rows * d],
                k: &k[kv_line * key_blocks * d..][..key_blocks * d],
                history: BandEnergy { high: past[0], low: past[1], all: past[2], blocks: past[3] },
            };
            let mut words = vec![0; rows * width];
            params.rule.select_head(
                head,
                grid,
                &params.bands,
                params.calibration,
                params.more_follows,
                (&mut words, width),
            );
            for row in 0..grid.rows() {
                selection.set_row(b, h, row, set_bits(&words[row * width..][..width]));
            }
        }
    }
    selection
}

/// How far off the sum of a row's masses may be in f32.
const MASS_TOLERANCE: f64 = 1e-6;

#[track_caller]
pub fn check_selection<B: PrismBackend>(
    [q, k, history]: [&[f32]; 3],
    shape: &AttentionShape,
    params: &SelectParams,
) {
    let device = Device::<B>::default();
    let (rows, key_blocks) = extent(&params.grids);
    let AttentionShape { batch, q_heads, kv_heads, head_dim: d, .. } = *shape;
    let (words, counts) = fallback::select::<B>(
        float::<B>(q, &[batch, q_heads, rows, d], &device),
        float::<B>(k, &[batch, kv_heads, key_blocks, d], &device),
        float::<B>(history, &[batch, q_heads, 4], &device),
        params,
    );
    let width = key_blocks.div_ceil(WORD_BITS);
    assert_eq!(words.shape().to_vec(), [batch, q_heads, rows, width]);
    assert_eq!(counts.shape().to_vec(), [batch, q_heads, rows]);
    let dims = [batch, q_heads, rows, key_blocks];
    let (words, counts) = (read_words::<B>(words), read_words::<B>(counts));
    let got = BlockSelection::from_words(dims, words, counts).unwrap();
    // Masses in floats instead of fixed point: a row may come out as with a budget this close.
    let near = [0.0, -MASS_TOLERANCE, MASS_TOLERANCE].map(|off| {
        let mut params = params.clone();
        if let Budget::Mass(mass) = &mut params.rule.budget
            && *mass < 1.0
        {
            *mass += off;
        }
        expected_selection(q, k, history, shape, &params)
    });
    for b in 0..batch {
        for h in 0..q_heads {
            for row in 0..rows {
                let blocks = |s: &BlockSelection| s.blocks(b, h, row).collect::<Vec<_>>();
                let at = format!("batch {b}, head {h}, row {row}, {:?}", params.rule);
                if near[1..].iter().all(|near| blocks(&got) != blocks(near)) {
                    assert_eq!(blocks(&got), blocks(&near[0]), "{at}, {:?}", params.calibration);
                }
            }
        }
    }
}

pub fn selects<B: PrismBackend>() {
    for (i, problem) in problems().enumerate() {
        let [q, k] = problem.pooled();
        // Every second sequence is the continuation of a prompt.
        let mut noise = Noise(i as u64);
        let lines = problem.shape.batch * problem.shape.q_heads;
        let history: Vec<f32> = (0..lines)
            .flat_map(|line| {
                let [high, low] = [noise.next().abs(), noise.next().abs()];
                [high, low, high + low, 2.0].map(|x| x * (line % 2) as f32 * 8.0)
            })
            .collect();
        for (j, rule) in rules().into_iter().enumerate() {
            let bands = bands(problem.shape.head_dim);
            for (z, calibration) in CALIBRATIONS.into_iter().enumerate() {
                let (bands, more) = (bands[(i + j + z) % 3].clone(), (i + j) % 2 == 1);
                let grids = problem.grids.clone();
                let params = SelectParams::new(grids, bands, calibration, rule, more);
                check_selection::<B>([&q, &k, &history], &problem.shape, &params);
            }
        }
    }
}

/// Long enough for several tiles of rows.
pub fn selects_in_tiles<B: PrismBackend>() {
    let problem = Problem::new([8, 4], 12, 1, &[(700, 810)]);
    let [q, k] = problem.pooled();
    let history = vec![0.0; problem.shape.q_heads * 4];
    let rule = SelectionRule { budget: Budget::TopK(5), ..SelectionRule::default() };
    let grids = problem.grids.clone();
    let params = SelectParams::new(grids, bands(12)[0].clone(), Calibration::Causal, rule, false);
    check_selection::<B>([&q, &k, &history], &problem.shape, &params);
}

/// Ties, silent heads and vectors that aren't finite; more than a word of blocks.
pub fn selects_from_odd_numbers<B: PrismBackend>() {
    let problem = Problem::new([2, 1], 12, 4, &[(200, 300), (170, 170)]);
    let [noisy_q, noisy_k] = problem.pooled();
    let history = vec![0.0; problem.shape.batch * problem.shape.q_heads * 4];
    let zeros = (vec![0.0; noisy_q.len()], vec![0.0; noisy_k.len()]);
    let ties = (vec![1.0; noisy_q.len()], vec![1.0; noisy_k.len()]);
    let mut broken = (noisy_q.clone(), noisy_k.clone());
    broken.0[12 * 5] = f32::NAN;
    broken.0[12 * 7 + 3] = f32::INFINITY;
    broken.0[12 * 9 + 1] = 1e15;
    broken.1[12 * 2 + 4] = f32::NEG_INFINITY;
    broken.1[12 * 6 + 1] = f32::NAN;
    for (q, k) in [(noisy_q, noisy_k), zeros, ties, broken] {
        for mut rule in rules() {
            // Equal masses must not reach the target up to rounding: no n · 0.953 is integer.
            rule.budget = match rule.budget {
                Budget::Mass(mass) if mass < 1.0 => Budget::Mass(mass + 0.003),
                budget => budget,
            };
            for calibration in CALIBRATIONS {
                let bands = bands(12)[0].clone();
                let params =
                    SelectParams::new(problem.grids.clone(), bands, calibration, rule, false);
                check_selection::<B>([&q, &k, &history], &problem.shape, &params);
            }
        }
    }
}

/// What isn't finite in K or V stays with the rows that read it.
pub fn bad_keys_stay_where_they_are_read<B: PrismBackend>() {
    let mut problem = Problem::new([2, 1], 8, 16, &[(100, 100)]);
    let selection = problem.some_blocks();
    let (out, lse) = problem.attend::<B>(Some(&selection));
    let (bad_block, token, d) = (2, 37, problem.shape.head_dim);
    for (bad, in_keys) in [(f32::NAN, false), (f32::INFINITY, false), (f32::NAN, true)] {
        let before = (problem.k.clone(), problem.v.clone());
        let x = if in_keys { &mut problem.k } else { &mut problem.v };
        x[token * d + 3] = bad;
        let (bad_out, bad_lse) = problem.attend::<B>(Some(&selection));
        for line in 0..2 * 100 {
            let (h, i) = (line / 100, line % 100);
            let hit = i >= token && selection.contains(0, h, i / 16, bad_block);
            if hit {
                assert!(bad_out[line * d..][..d].iter().all(|x| x.is_nan()));
                assert_eq!(bad_lse[line].is_nan(), in_keys);
            } else {
                assert_eq!(bad_out[line * d..][..d], out[line * d..][..d]);
                assert_eq!(bad_lse[line], lse[line]);
            }
        }
        (problem.k, problem.v) = before;
    }
}
