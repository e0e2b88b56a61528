//! Problems, references and tensors that the tests share.

use burn::backend::tensor::{Device, FloatTensor, IntTensor};
use burn::backend::{Backend, TensorMetadata};
use burn::tensor::{DType, TensorData, read_sync};
use burn_prism::fallback;
use burn_prism::ops::AttendParams;
use prism_core::second_order::SubBlocks;
use prism_core::selection::extent;
use prism_core::{
    AttentionShape, BandRule, Bands, BlockGrid, BlockSelection, Budget, Calibration, Rope,
    SelectionRule, oracle,
};

/// Uniform in [-1, 1), the same on every run.
pub struct Noise(pub u64);

impl Noise {
    pub fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    pub fn list(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.next()).collect()
    }
}

/// A batch whose padding is NaN.
pub struct Problem {
    pub shape: AttentionShape,
    pub grids: Vec<BlockGrid>,
    pub q: Vec<f32>,
    pub k: Vec<f32>,
    pub v: Vec<f32>,
}

impl Problem {
    pub fn new(heads: [usize; 2], d: usize, block: usize, lengths: &[(usize, usize)]) -> Self {
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

    pub fn dims(&self) -> [[usize; 4]; 2] {
        let AttentionShape { batch, q_heads, kv_heads, q_len, kv_len, head_dim } = self.shape;
        [[batch, q_heads, q_len, head_dim], [batch, kv_heads, kv_len, head_dim]]
    }

    pub fn scale(&self) -> f64 {
        1.0 / (self.shape.head_dim as f64).sqrt()
    }

    pub fn oracle(&self, selection: Option<&BlockSelection>) -> oracle::Attended {
        let [q, k, v] = [&self.q, &self.k, &self.v].map(|x| wide(x));
        oracle::attend(&q, &k, &v, &self.shape, &self.grids, selection, self.scale())
    }

    pub fn pooled(&self) -> [Vec<f32>; 2] {
        let AttentionShape { q_heads, kv_heads, q_len, kv_len, head_dim: d, .. } = self.shape;
        [
            oracle::pool_queries(&wide(&self.q), q_heads, q_len, d, &self.grids),
            oracle::pool_keys(&wide(&self.k), kv_heads, kv_len, d, &self.grids),
        ]
    }

    /// About half of the causal blocks, and always the diagonal.
    pub fn some_blocks(&self) -> BlockSelection {
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

    pub fn attend<B: Backend>(&self, selection: Option<&BlockSelection>) -> (Vec<f64>, Vec<f64>) {
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

pub fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().copied().map(f64::from).collect()
}

pub fn float<B: Backend>(x: &[f32], dims: &[usize], device: &Device<B>) -> FloatTensor<B> {
    B::float_from_data(TensorData::new(x.to_vec(), dims.to_vec()), device)
}

pub fn words<B: Backend>(selection: &BlockSelection, device: &Device<B>) -> IntTensor<B> {
    let [batch, heads, rows, _] = selection.shape();
    let words: Vec<i32> = selection.words().iter().map(|&word| word as i32).collect();
    let dims = [batch, heads, rows, selection.words_per_row()];
    B::int_from_data(TensorData::new(words, dims), device)
}

pub fn read<B: Backend>(x: FloatTensor<B>) -> Vec<f64> {
    let data = read_sync(B::float_into_data(x)).unwrap();
    data.convert::<f64>().to_vec().unwrap()
}

pub fn read_words<B: Backend>(x: IntTensor<B>) -> Vec<u32> {
    assert_eq!(x.dtype(), DType::I32);
    let data = read_sync(B::int_into_data(x)).unwrap();
    data.to_vec::<i32>().unwrap().into_iter().map(|word| word as u32).collect()
}

#[track_caller]
pub fn close(got: &[f64], expected: &[f64], tolerance: f64) {
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

pub const LENGTHS: [usize; 5] = [1, 16, 31, 64, 100];

/// Every pair of lengths as a uniform batch of 2, and all of them as one ragged batch.
pub fn batches() -> Vec<Vec<(usize, usize)>> {
    let pairs: Vec<(usize, usize)> =
        LENGTHS.iter().flat_map(|&q| LENGTHS.map(|kv| (q, kv))).collect();
    let mut batches: Vec<_> = pairs.iter().map(|&pair| vec![pair; 2]).collect();
    batches.push(pairs);
    batches.push(vec![(0, 20), (20, 0), (40, 40), (0, 0), (40, 40), (40, 40)]);
    batches
}

pub fn problems() -> impl Iterator<Item = Problem> {
    let shapes = [([2, 2], 8), ([6, 2], 33)];
    batches()
        .into_iter()
        .flat_map(move |lengths| shapes.map(|(heads, d)| Problem::new(heads, d, 16, &lengths)))
}

impl Problem {
    pub fn sub_blocks(&self, query_sub: usize, key_sub: usize) -> Vec<SubBlocks> {
        self.grids.iter().map(|&grid| SubBlocks::new(grid, query_sub, key_sub)).collect()
    }

    /// Means of the query sub-blocks, and means and variances of the key sub-blocks.
    pub fn moments(&self, subs: &[SubBlocks]) -> [Vec<f32>; 3] {
        let AttentionShape { q_heads, kv_heads, q_len, kv_len, head_dim: d, .. } = self.shape;
        let queries: Vec<BlockGrid> = subs.iter().map(|sub| *sub.queries()).collect();
        let keys: Vec<BlockGrid> = subs.iter().map(|sub| *sub.keys()).collect();
        let (means, variances) = oracle::pool_moments(&wide(&self.k), kv_heads, kv_len, d, &keys);
        [oracle::pool_queries(&wide(&self.q), q_heads, q_len, d, &queries), means, variances]
    }
}

pub fn rules() -> Vec<SelectionRule> {
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

pub fn bands(d: usize) -> [Bands; 3] {
    let rope = Rope { rotary_dim: Some(8), ..Rope::new(1e4) };
    let split = BandRule::Dims { high: 4, low: d - 4 };
    let high = BandRule::Dims { high: 6, low: 0 };
    [
        Bands::new(split, Some(&rope), d, 16).unwrap(),
        Bands::new(high, Some(&rope), d, 16).unwrap(),
        Bands::new(BandRule::Auto, None, d, 16).unwrap(),
    ]
}

pub const CALIBRATIONS: [Calibration; 3] =
    [Calibration::Global, Calibration::Causal, Calibration::Off];
