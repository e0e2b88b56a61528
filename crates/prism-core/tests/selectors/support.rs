//! Problems, and softmax from the definition.

use prism_core::selectors::{Selector, SelectorInput};
use prism_core::{AttentionShape, BlockGrid, BlockSelection, SelectionRule, SelectorConfig};

/// Q and K of some sequences.
#[derive(Clone)]
pub struct Problem {
    pub shape: AttentionShape,
    pub grids: Vec<BlockGrid>,
    pub q: Vec<f32>,
    pub k: Vec<f32>,
}

/// Numbers that look normal, the same for the same seed.
pub fn noise(len: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2) + 1;
    let mut next = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    };
    (0..len).map(|_| (0..4).map(|_| next()).sum::<f32>() * 1.7).collect()
}

impl Problem {
    /// `lengths` are (queries, keys) of each sequence; heads are (query heads, kv heads).
    pub fn new(
        block: usize,
        lengths: &[(usize, usize)],
        (q_heads, kv_heads): (usize, usize),
        d: usize,
        seed: u64,
    ) -> Self {
        let longest = |f: fn(&(usize, usize)) -> usize| lengths.iter().map(f).max().unwrap();
        let (q_len, kv_len) = (longest(|x| x.0), longest(|x| x.1));
        let batch = lengths.len();
        let shape = AttentionShape { batch, q_heads, kv_heads, q_len, kv_len, head_dim: d };
        let grid = |&(q, kv): &(usize, usize)| BlockGrid::new(block, q, kv).unwrap();
        let q = noise(batch * q_heads * q_len * d, seed);
        let k = noise(batch * kv_heads * kv_len * d, seed + 1);
        Self { shape, grids: lengths.iter().map(grid).collect(), q, k }
    }

    pub fn input(&self, rule: SelectionRule) -> SelectorInput<'_> {
        SelectorInput { rule, ..SelectorInput::new(&self.q, &self.k, self.shape, &self.grids) }
    }

    /// The selection without anything forced.
    pub fn select(&self, selector: &impl Selector) -> BlockSelection {
        selector.select(&self.input(bare())).unwrap()
    }

    pub fn query(&self, b: usize, h: usize, i: usize) -> &[f32] {
        let AttentionShape { q_heads, q_len, head_dim, .. } = self.shape;
        &self.q[((b * q_heads + h) * q_len + i) * head_dim..][..head_dim]
    }

    pub fn key(&self, b: usize, h: usize, j: usize) -> &[f32] {
        let AttentionShape { kv_heads, kv_len, head_dim, .. } = self.shape;
        let h = h / self.shape.group();
        &self.k[((b * kv_heads + h) * kv_len + j) * head_dim..][..head_dim]
    }

    /// Causal probabilities of query `i`, `[visible keys]`.
    pub fn probabilities(&self, b: usize, h: usize, i: usize) -> Vec<f64> {
        let visible = self.grids[b].visible_keys(i);
        let scale = 1.0 / (self.shape.head_dim as f64).sqrt();
        let query = self.query(b, h, i);
        softmax((0..visible).map(|j| dot(query, self.key(b, h, j)) * scale).collect())
    }
}

/// Nothing forced, nothing limited.
pub fn bare() -> SelectionRule {
    SelectionRule {
        sink_blocks: 0,
        recent_blocks: 0,
        dense_last_blocks: 0,
        min_blocks: 0,
        ..SelectionRule::default()
    }
}

pub fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
}

pub fn softmax(scores: Vec<f64>) -> Vec<f64> {
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = scores.into_iter().map(|score| (score - max).exp()).collect();
    let total: f64 = weights.iter().sum();
    weights.into_iter().map(|weight| weight / total).collect()
}

/// Indices, heaviest first.
pub fn heaviest(values: &[f64]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&a, &b| values[b].partial_cmp(&values[a]).unwrap());
    order
}

/// Every method, with options that fit sequences of some hundred tokens in blocks of 16.
pub fn small() -> Vec<SelectorConfig> {
    let of = |name: &str, settings: &[(&str, &str)]| {
        SelectorConfig::from_settings(name, settings).unwrap()
    };
    let all = vec![
        of("prism", &[("mass", "0.7"), ("calibration", "causal")]),
        of("second_order", &[("mass", "0.7")]),
        of("outliers", &[("threshold", "0.05")]),
        of("mean_pool", &[("mass", "0.7")]),
        of("xattention", &[("stride", "4"), ("threshold", "0.7")]),
        of("flexprefill", &[("min_budget", "32"), ("gamma", "0.6"), ("tau", "0.1")]),
        of("flexprefill", &[("min_budget", "16"), ("gamma", "0.6"), ("tau", "1")]),
        of("minference", &[("adaptive", "0.2"), ("last_queries", "8")]),
        of("streaming", &[("sink", "16"), ("window", "32")]),
        of("dilated", &[("segments", "64,128"), ("strides", "1,2")]),
        of("lsh", &[("buckets", "8"), ("rounds", "1")]),
        of("top_k", &[("blocks", "3")]),
        of("oracle", &[("mass", "0.7")]),
    ];
    let names: std::collections::BTreeSet<_> = all.iter().map(|one| one.name()).collect();
    assert_eq!(names.len(), SelectorConfig::names().len());
    all
}
