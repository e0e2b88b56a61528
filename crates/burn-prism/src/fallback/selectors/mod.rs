//! [`prism_core::selectors`] in tensor ops: nothing is read back to the host.
//!
//! `outliers`, masses by antidiagonals, sums of lines, the heaviest of a row and the choice by masses are
//! operations of the backend, which may have kernels for them.

mod flexprefill;
mod groups;
mod hash;
mod last_queries;
mod lines;
mod minference;
mod outliers;
mod parts;
mod patterns;

pub use groups::antidiagonal_masses;
pub use last_queries::{AT_ONCE as LAST_QUERIES_AT_ONCE, kv_heads_at_once, line_sums};

use burn::backend::tensor::{FloatTensor, IntTensor};
use prism_core::bands::Bands;
use prism_core::{BlockGrid, SelectionRule, SelectorConfig};

use super::TILE;
use super::rule::Rule;
use super::tensor::Float;
use crate::ops::{OutliersParams, PrismBackend};

/// Words `[batch, q_heads, rows, ceil(key_blocks / 32)]` and counts `[batch, q_heads, rows]`.
pub type Words<B> = (IntTensor<B>, IntTensor<B>);

/// How a method is to select.
pub struct Call<'a> {
    /// Block grid of each sequence.
    pub grids: &'a [BlockGrid],
    /// Forced blocks and limits, and the budget of methods without one of their own.
    pub rule: SelectionRule,
    /// Whether this is a chunk of a prompt that goes on.
    pub more_follows: bool,
    /// Factor on the scores of attention.
    pub scale: f32,
    /// What Prism scores parts of blocks within.
    pub bands: &'a Bands,
}

/// Bytes that temporaries of all runs take together, about.
pub const TILE_BYTES: u64 = 6 * 4 * TILE as u64;

/// Selects by a method that doesn't score means of blocks; `None` for the others.
pub fn select<B: PrismBackend>(
    q: FloatTensor<B>,
    k: FloatTensor<B>,
    selector: &SelectorConfig,
    call: &Call,
) -> Option<Words<B>> {
    let (q, k) = (Float::<B>(q), Float::<B>(k));
    let [_, heads, ..] = q.dims::<4>();
    let device = q.device();
    let Call { grids, rule, more_follows, scale, .. } = *call;
    let rule = Rule { grids, rule: &rule, more_follows, heads };
    let of =
        |x: &Float<B>, sequences: &std::ops::Range<usize>| x.clone().slice(0, sequences.clone());
    Some(match selector {
        SelectorConfig::XAttention(options) => rule.select(&device, |sequences, &grid| {
            let (q, k) = (of(&q, &sequences), of(&k, &sequences));
            let (stride, after_forced) = (options.stride, Some(options.threshold));
            groups::Groups { q, k, grid, stride, scale, after_forced }
        }),
        SelectorConfig::Oracle(_) => rule.select(&device, |sequences, &grid| {
            let (q, k) = (of(&q, &sequences), of(&k, &sequences));
            groups::Groups { q, k, grid, stride: 1, scale, after_forced: None }
        }),
        SelectorConfig::Outliers(options) => {
            let scale = scale.into();
            let grids = grids.to_vec();
            let params =
                OutliersParams::new(grids, options.clone(), scale, *rule.rule, more_follows);
            B::prism_select_outliers(q.0, k.0, params)
        }
        SelectorConfig::Streaming(options) => {
            rule.select(&device, |_, grid| patterns::Windows::<B>::new(options, grid, &device))
        }
        SelectorConfig::Dilated(options) => rule
            .select(&device, |_, grid| patterns::Segments::<B>::new(options, grid, heads, &device)),
        SelectorConfig::Lsh(options) => {
            let (q, k) = pooled(&q, &k, grids.to_vec());
            rule.select(&device, |sequences, grid| {
                hash::Buckets::new(of(&q, &sequences), of(&k, &sequences), grid, options)
            })
        }
        SelectorConfig::MInference(options) => rule.select(&device, |sequences, grid| {
            minference::lines(of(&q, &sequences), of(&k, &sequences), grid, scale, options)
        }),
        SelectorConfig::FlexPrefill(options) => {
            let (means_q, means_k) = pooled(&q, &k, grids.to_vec());
            rule.select(&device, |sequences, grid| {
                let (q, k) = (of(&q, &sequences), of(&k, &sequences));
                let means = (of(&means_q, &sequences), of(&means_k, &sequences));
                flexprefill::lines((q, k), means, grid, scale, options)
            })
        }
        SelectorConfig::Prism(options) => {
            let pool = options.pool_block?;
            let parts = grids.iter().map(|grid| grid.subdivided(pool)).collect();
            let (means_q, means_k) = pooled(&q, &k, parts);
            let calibration = options.calibration;
            rule.select(&device, |sequences, grid| {
                let means = (of(&means_q, &sequences), of(&means_k, &sequences));
                parts::Parts::new(means, grid, pool, call.bands, calibration)
            })
        }
        SelectorConfig::SecondOrder(_) | SelectorConfig::MeanPool(_) | SelectorConfig::TopK(_) => {
            return None;
        }
    })
}

/// Selects with outlier keys apart.
pub fn select_outliers<B: PrismBackend>(
    q: FloatTensor<B>,
    k: FloatTensor<B>,
    params: &OutliersParams,
) -> Words<B> {
    let (q, k) = (Float::<B>(q), Float::<B>(k));
    let ([_, heads, ..], device) = (q.dims::<4>(), q.device());
    let OutliersParams { grids, options, scale, rule, more_follows } = params;
    let parts = outliers::Parts::new(&q, &k, grids, options);
    let rule = Rule { grids, rule, more_follows: *more_follows, heads };
    rule.select(&device, |sequences, grid| {
        let k = k.clone().slice(0, sequences.clone());
        parts.heads(k, &sequences, grid, *scale as f32, options)
    })
}

/// Means of the blocks of Q and K in f32.
fn pooled<B: PrismBackend>(
    q: &Float<B>,
    k: &Float<B>,
    grids: Vec<BlockGrid>,
) -> (Float<B>, Float<B>) {
    use crate::ops::Side;
    let pool = |x: &Float<B>, side| Float(B::prism_pool(x.0.clone(), grids.clone(), side));
    (pool(q, Side::Queries), pool(k, Side::Keys))
}
