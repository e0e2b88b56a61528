//! The tensor-op fallback against the f64 oracle, on every CPU backend.

#![cfg(all(feature = "flex", feature = "ndarray", feature = "autodiff"))]
#![allow(deprecated)] // NdArray

use burn::backend::tensor::{Device, FloatTensor, IntTensor};
use burn::backend::{
    Autodiff, AutodiffBackend, Backend, Flex, FloatDType, NdArray, TensorMetadata,
};
use burn::tensor::{DType, TensorData, read_sync};
use burn_prism::fallback;
use burn_prism::ops::{AttendParams, PrismBackend, SecondOrderParams, SelectParams, Side};
use prism_core::scores::{BandEnergy, PooledHead};
use prism_core::second_order::SubBlocks;
use prism_core::selection::{WORD_BITS, extent, set_bits};
use prism_core::{
    AttentionShape, BandRule, Bands, BlockGrid, BlockSelection, Budget, Calibration, Rope,
    SelectionRule, oracle,
};

const NEG_INFINITY: f64 = f64::NEG_INFINITY;

/// Uniform in [-1, 1), the same on every run.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    fn list(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.next()).collect()
    }
}

/// A batch whose padding is NaN.
struct Problem {
    shape: AttentionShape,
    grids: Vec<BlockGrid>,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
}

impl Problem {
    fn new(heads: [usize; 2], d: usize, block: usize, lengths: &[(usize, usize)]) -> Self {
        let grids: Vec<BlockGrid> =
            lengths.iter().map(|&(q, kv)| BlockGrid::new(block, q, kv).unwrap()).collect();
        let q_len = lengths.iter().map(|&(q, _)| q).max().unwrap();
        let kv_len = lengths.iter().map(|&(_, kv)| kv).max().unwrap();
        let [q_heads, kv_heads] = heads;
        let batch = lengths.len();
        let shape = AttentionShape { batch, q_heads, kv_heads, q_len, kv_len, head_dim: d };
        let mut noise = Noise((q_len * 31 + kv_len * 7 + d) as u64);
        let mut padded = |heads: usize, len: usize, own: &dyn Fn(&BlockGrid) -> usize, by: f32| {
            let mut x = noise.list(batch * heads * len * d);
            for (i, x) in x.iter_mut().enumerate() {
                let (b, token) = (i / d / len / heads, i / d % len);
                *x = if token < own(&grids[b]) { *x * by } else { f32::NAN };
            }
            x
        };
        let q = padded(q_heads, q_len, &BlockGrid::q_len, 4.0);
        let k = padded(kv_heads, kv_len, &BlockGrid::kv_len, 4.0);
        let v = padded(kv_heads, kv_len, &BlockGrid::kv_len, 1.0);
        Self { shape, grids, q, k, v }
    }

    fn dims(&self) -> [[usize; 4]; 2] {
        let AttentionShape { batch, q_heads, kv_heads, q_len, kv_len, head_dim } = self.shape;
        [[batch, q_heads, q_len, head_dim], [batch, kv_heads, kv_len, head_dim]]
    }

    fn scale(&self) -> f64 {
        1.0 / (self.shape.head_dim as f64).sqrt()
    }

    fn oracle(&self, selection: Option<&BlockSelection>) -> oracle::Attended {
        let [q, k, v] = [&self.q, &self.k, &self.v].map(|x| wide(x));
        oracle::attend(&q, &k, &v, &self.shape, &self.grids, selection, self.scale())
    }

    fn pooled(&self) -> [Vec<f32>; 2] {
        let AttentionShape { q_heads, kv_heads, q_len, kv_len, head_dim: d, .. } = self.shape;
        [
            oracle::pool_queries(&wide(&self.q), q_heads, q_len, d, &self.grids),
            oracle::pool_keys(&wide(&self.k), kv_heads, kv_len, d, &self.grids),
        ]
    }

    /// About half of the causal blocks, and always the diagonal.
    fn some_blocks(&self) -> BlockSelection {
        let (rows, key_blocks) = extent(&self.grids);
        let heads = self.shape.q_heads;
        let mut selection = BlockSelection::empty(self.shape.batch, heads, rows, key_blocks);
        let mut noise = Noise(5);
        for (b, grid) in self.grids.iter().enumerate() {
            for h in 0..heads {
                for row in 0..grid.rows() {
                    let last = grid.causal_blocks(row) - 1;
                    let blocks: Vec<usize> =
                        (0..=last).filter(|&v| noise.next() > 0.0 || v == last).collect();
                    selection.set_row(b, h, row, blocks);
                }
            }
        }
        selection
    }

    fn attend<B: Backend>(&self, selection: Option<&BlockSelection>) -> (Vec<f64>, Vec<f64>) {
        let device = Device::<B>::default();
        let [q_dims, k_dims] = self.dims();
        let (out, lse) = fallback::attend::<B>(
            float::<B>(&self.q, &q_dims, &device),
            float::<B>(&self.k, &k_dims, &device),
            float::<B>(&self.v, &k_dims, &device),
            selection.map(|selection| words::<B>(selection, &device)),
            &AttendParams::new(self.grids.clone(), self.scale()),
        );
        assert_eq!(out.shape().to_vec(), q_dims);
        assert_eq!(lse.shape().to_vec(), q_dims[..3]);
        (read::<B>(out), read::<B>(lse))
    }
}

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().copied().map(f64::from).collect()
}

fn float<B: Backend>(x: &[f32], dims: &[usize], device: &Device<B>) -> FloatTensor<B> {
    B::float_from_data(TensorData::new(x.to_vec(), dims.to_vec()), device)
}

fn words<B: Backend>(selection: &BlockSelection, device: &Device<B>) -> IntTensor<B> {
    let [batch, heads, rows, _] = selection.shape();
    let words: Vec<i32> = selection.words().iter().map(|&word| word as i32).collect();
    let dims = [batch, heads, rows, selection.words_per_row()];
    B::int_from_data(TensorData::new(words, dims), device)
}

fn read<B: Backend>(x: FloatTensor<B>) -> Vec<f64> {
    let data = read_sync(B::float_into_data(x)).unwrap();
    data.convert::<f64>().to_vec().unwrap()
}

fn read_words<B: Backend>(x: IntTensor<B>) -> Vec<u32> {
    assert_eq!(x.dtype(), DType::I32);
    let data = read_sync(B::int_into_data(x)).unwrap();
    data.to_vec::<i32>().unwrap().into_iter().map(|word| word as u32).collect()
}

#[track_caller]
fn close(got: &[f64], expected: &[f64], tolerance: f64) {
    assert_eq!(got.len(), expected.len());
    for (i, (&got, &expected)) in got.iter().zip(expected).enumerate() {
        let error = (got - expected).abs();
        let same = got == expected || (got.is_nan() && expected.is_nan());
        assert!(
            same || error <= tolerance * expected.abs().max(1.0),
            "element {i}: got {got}, expected {expected}"
        );
    }
}

const LENGTHS: [usize; 5] = [1, 16, 31, 64, 100];

/// Every pair of lengths as a uniform batch of 2, and all of them as one ragged batch.
fn batches() -> Vec<Vec<(usize, usize)>> {
    let pairs: Vec<(usize, usize)> =
        LENGTHS.iter().flat_map(|&q| LENGTHS.map(|kv| (q, kv))).collect();
    let mut batches: Vec<_> = pairs.iter().map(|&pair| vec![pair; 2]).collect();
    batches.push(pairs);
    batches.push(vec![(0, 20), (20, 0), (40, 40), (0, 0), (40, 40), (40, 40)]);
    batches
}

fn problems() -> impl Iterator<Item = Problem> {
    let shapes = [([2, 2], 8), ([6, 2], 33)];
    batches()
        .into_iter()
        .flat_map(move |lengths| shapes.map(|(heads, d)| Problem::new(heads, d, 16, &lengths)))
}

fn pools<B: Backend>() {
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

impl Problem {
    fn sub_blocks(&self, query_sub: usize, key_sub: usize) -> Vec<SubBlocks> {
        self.grids.iter().map(|&grid| SubBlocks::new(grid, query_sub, key_sub)).collect()
    }

    /// Means of the query sub-blocks, and means and variances of the key sub-blocks.
    fn moments(&self, subs: &[SubBlocks]) -> [Vec<f32>; 3] {
        let AttentionShape { q_heads, kv_heads, q_len, kv_len, head_dim: d, .. } = self.shape;
        let queries: Vec<BlockGrid> = subs.iter().map(|sub| *sub.queries()).collect();
        let keys: Vec<BlockGrid> = subs.iter().map(|sub| *sub.keys()).collect();
        let (means, variances) = oracle::pool_moments(&wide(&self.k), kv_heads, kv_len, d, &keys);
        [oracle::pool_queries(&wide(&self.q), q_heads, q_len, d, &queries), means, variances]
    }
}

fn pools_moments<B: PrismBackend>() {
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

/// Both the tensor ops and what the backend supplies, against the oracle's rule.
fn selects_by_second_order<B: PrismBackend>() {
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

fn attends<B: Backend>() {
    for problem in problems() {
        for selection in [None, Some(problem.some_blocks())] {
            let expected = problem.oracle(selection.as_ref());
            let (out, lse) = problem.attend::<B>(selection.as_ref());
            close(&out, &expected.out, 1e-5);
            close(&lse, &expected.lse, 1e-5);
        }
    }
}

/// Long enough for several tiles of heads and queries; blocks longer than the sequence too.
fn attends_in_tiles<B: Backend>() {
    for (block, heads, length) in [(16, [12, 2], 720), (1 << 20, [12, 12], 600), (7, [2, 1], 530)] {
        let problem = Problem::new(heads, 8, block, &[(length, length)]);
        let selection = problem.some_blocks();
        let expected = problem.oracle(Some(&selection));
        let (out, lse) = problem.attend::<B>(Some(&selection));
        close(&out, &expected.out, 1e-5);
        close(&lse, &expected.lse, 1e-5);
    }
}

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
fn check_selection<B: Backend>(
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

fn rules() -> Vec<SelectionRule> {
    let rule = |budget, sink, recent, dense_last, min, max| SelectionRule {
        budget,
        sink_blocks: sink,
        recent_blocks: recent,
        dense_last_blocks: dense_last,
        min_blocks: min,
        max_blocks: max,
    };
    vec![
        SelectionRule::default(),
        rule(Budget::Mass(0.5), 0, 0, 0, 1, None),
        rule(Budget::Mass(0.8), 2, 0, 1, 3, Some(4)),
        rule(Budget::Mass(0.3), 0, 2, 0, 2, Some(2)),
        rule(Budget::Mass(1.0), 1, 1, 0, 1, None),
        rule(Budget::Mass(1.0), 1, 1, 0, 1, Some(3)),
        rule(Budget::TopK(2), 0, 0, 0, 1, None),
        rule(Budget::TopK(1), 1, 1, 1, 4, None),
        rule(Budget::TopK(usize::MAX), 2, 2, 0, 1, Some(1)),
    ]
}

fn bands(d: usize) -> [Bands; 3] {
    let rope = Rope { rotary_dim: Some(8), ..Rope::new(1e4) };
    let split = BandRule::Dims { high: 4, low: d - 4 };
    let high = BandRule::Dims { high: 6, low: 0 };
    [
        Bands::new(split, Some(&rope), d, 16).unwrap(),
        Bands::new(high, Some(&rope), d, 16).unwrap(),
        Bands::new(BandRule::Auto, None, d, 16).unwrap(),
    ]
}

const CALIBRATIONS: [Calibration; 3] = [Calibration::Global, Calibration::Causal, Calibration::Off];

fn selects<B: Backend>() {
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
fn selects_in_tiles<B: Backend>() {
    let problem = Problem::new([8, 4], 12, 1, &[(700, 810)]);
    let [q, k] = problem.pooled();
    let history = vec![0.0; problem.shape.q_heads * 4];
    let rule = SelectionRule { budget: Budget::TopK(5), ..SelectionRule::default() };
    let grids = problem.grids.clone();
    let params = SelectParams::new(grids, bands(12)[0].clone(), Calibration::Causal, rule, false);
    check_selection::<B>([&q, &k, &history], &problem.shape, &params);
}

/// Ties, silent heads and vectors that aren't finite; more than a word of blocks.
fn selects_from_odd_numbers<B: Backend>() {
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
fn bad_keys_stay_where_they_are_read<B: Backend>() {
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

/// A row that reads nothing gives 0 and −∞, and so does one whose scores are all −∞.
fn rows_without_keys_are_zero<B: Backend>() {
    let mut problem = Problem::new([2, 1], 8, 16, &[(40, 40)]);
    problem.q[..8].fill(f32::MAX);
    problem.k[..8].fill(-f32::MAX);
    let mut selection = problem.some_blocks();
    selection.set_row(0, 1, 1, []);
    let (out, lse) = problem.attend::<B>(Some(&selection));
    for i in [0, 40 + 16, 40 + 31] {
        assert!(out[i * 8..][..8].iter().all(|&x| x == 0.0));
        assert_eq!(lse[i], NEG_INFINITY);
    }
}

fn takes_half_precision<B: Backend>() {
    let device = Device::<B>::default();
    for (dtype, tolerance) in [(FloatDType::F16, 1e-3), (FloatDType::BF16, 8e-3)] {
        let mut problem = Problem::new([6, 2], 33, 16, &[(31, 64), (64, 31)]);
        let [q_dims, k_dims] = problem.dims();
        let [q, k, v] = [(&problem.q, q_dims), (&problem.k, k_dims), (&problem.v, k_dims)]
            .map(|(x, dims)| B::float_cast(float::<B>(x, &dims, &device), dtype));
        for (x, rounded) in [(&mut problem.q, &q), (&mut problem.k, &k), (&mut problem.v, &v)] {
            *x = read::<B>(rounded.clone()).into_iter().map(|x| x as f32).collect();
        }
        let pooled = fallback::pool::<B>(k.clone(), &problem.grids, Side::Keys);
        assert_eq!(pooled.dtype(), DType::F32);
        close(&read::<B>(pooled), &wide(&problem.pooled()[1]), 1e-5);
        let params = AttendParams::new(problem.grids.clone(), problem.scale());
        let (out, lse) = fallback::attend::<B>(q, k, v, None, &params);
        assert_eq!((out.dtype(), lse.dtype()), (DType::from(dtype), DType::F32));
        let expected = problem.oracle(None);
        close(&read::<B>(out), &expected.out, tolerance);
        close(&read::<B>(lse), &expected.lse, 1e-5);
    }
}

/// Gradients of Σ a·out + Σ b·lse against central differences of the oracle.
fn gradients_are_right<A: AutodiffBackend>() {
    let mut problem = Problem::new([3, 1], 4, 4, &[(9, 11), (9, 11), (5, 3)]);
    let selection = problem.some_blocks();
    let device = Device::<A>::default();
    let [q_dims, k_dims] = problem.dims();
    let mut noise = Noise(1);
    let a = noise.list(problem.q.len());
    // Rows without a key have no finite LSE to weigh.
    let b: Vec<f32> = problem
        .oracle(Some(&selection))
        .lse
        .iter()
        .map(|lse| if lse.is_finite() { noise.next() } else { 0.0 })
        .collect();
    let leaf =
        |x: &[f32], dims: &[usize]| A::float_set_require_grad(float::<A>(x, dims, &device), true);
    let leaves = [leaf(&problem.q, &q_dims), leaf(&problem.k, &k_dims), leaf(&problem.v, &k_dims)];
    let [q, k, v] = leaves.clone();
    let params = AttendParams::new(problem.grids.clone(), problem.scale());
    let selected = Some(words::<A>(&selection, &device));
    let (out, lse) = fallback::attend::<A>(q, k, v, selected, &params);
    let finite = A::float_clamp_min(lse, (-100.0).into());
    let out = A::float_mul(out, float::<A>(&a, &q_dims, &device));
    let lse = A::float_mul(finite, float::<A>(&b, &q_dims[..3], &device));
    let loss = A::float_add(A::float_sum(out), A::float_sum(lse));
    let grads = A::backward(loss);

    let value = |problem: &Problem| {
        let expected = problem.oracle(Some(&selection));
        let out: f64 = expected.out.iter().zip(&a).map(|(x, &a)| x * f64::from(a)).sum();
        let lse: f64 = expected
            .lse
            .iter()
            .zip(&b)
            .filter(|(lse, _)| lse.is_finite())
            .map(|(x, &b)| x * f64::from(b))
            .sum();
        out + lse
    };
    for (which, leaf) in leaves.iter().enumerate() {
        let grad = read::<A::InnerBackend>(A::grad(leaf, &grads).unwrap());
        assert!(grad.iter().all(|x| x.is_finite()));
        for i in (0..grad.len()).step_by(5) {
            let mut moved = |by: f32| {
                let x = [&mut problem.q, &mut problem.k, &mut problem.v];
                let x = &mut x.into_iter().nth(which).unwrap()[i];
                let before = *x;
                *x = before + by;
                let step = f64::from(*x) - f64::from(before);
                let got = value(&problem);
                let x = [&mut problem.q, &mut problem.k, &mut problem.v];
                x.into_iter().nth(which).unwrap()[i] = before;
                (got, step)
            };
            let ((up, right), (down, left)) = (moved(1e-3), moved(-1e-3));
            let expected = (up - down) / (right - left);
            let expected = if expected.is_nan() { 0.0 } else { expected };
            assert!((grad[i] - expected).abs() < 1e-4, "{which}, {i}: {} {expected}", grad[i]);
        }
    }
}

macro_rules! on {
    ($($name:ident: $Backend:ty => [$($test:ident),* $(,)?];)*) => {$(
        mod $name {
            use super::*;

            $(#[test]
            fn $test() {
                super::$test::<$Backend>();
            })*
        }
    )*};
}

on! {
    flex: Flex => [
        pools, pools_moments, selects_by_second_order, attends, attends_in_tiles, selects, selects_in_tiles, selects_from_odd_numbers,
        bad_keys_stay_where_they_are_read, rows_without_keys_are_zero, takes_half_precision,
    ];
    ndarray: NdArray => [
        pools, pools_moments, selects_by_second_order, attends, attends_in_tiles, selects, selects_in_tiles, selects_from_odd_numbers,
        bad_keys_stay_where_they_are_read, rows_without_keys_are_zero,
    ];
    autodiff: Autodiff<Flex> => [
        pools, pools_moments, selects_by_second_order, attends, selects, gradients_are_right];
    autodiff_ndarray: Autodiff<NdArray> => [gradients_are_right];
}
