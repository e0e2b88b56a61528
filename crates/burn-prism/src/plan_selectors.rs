//! What choosing blocks runs as, and what it needs, before anything runs.

use burn::tensor::{DType, Device};
use prism_core::selectors::{Prism, XAttention};
use prism_core::{AttentionShape, SelectionRule, SelectorConfig};

use crate::config::PrismConfig;
use crate::fallback::selectors::{LAST_QUERIES_AT_ONCE, TILE_BYTES, kv_heads_at_once};
use crate::heads::HeadGroup;
use crate::plan::Kernel;
use crate::selectors::scores_means;

/// Bytes of sums that kernels hold at once, about.
const SUMS: u64 = 64 << 20;

/// A call as far as kernels depend on it.
#[derive(Clone, Copy)]
pub(crate) struct Place<'a> {
    pub shape: &'a AttentionShape,
    pub dtype: DType,
    pub device: &'a Device,
    /// What computes attention.
    pub attention: Kernel,
}

/// Whether a method has kernels: `outliers` has CubeCL's, for rules that neither fill rows beyond one block
/// nor cut them, and `xattention` on tensor cores.
pub(crate) fn has_kernels(config: &PrismConfig, place: Place) -> bool {
    match &config.selector {
        Some(SelectorConfig::Outliers(_)) => {
            let takes = |group: &HeadGroup| kernels_take_outliers(&group.rule);
            place.attention.is_cube() && config.head_groups(place.shape.q_heads).iter().all(takes)
        }
        Some(SelectorConfig::XAttention(options)) => {
            kernels_take_antidiagonals(place, config.block, options.stride)
        }
        Some(selector) => scores_means(selector),
        None => true,
    }
}

fn kernels_take_antidiagonals(place: Place, block: usize, stride: usize) -> bool {
    #[cfg(any(feature = "cpu", feature = "cuda", feature = "rocm", feature = "wgpu"))]
    if let burn::backend::DispatchDevice::Cube(device) = place.device.clone().inner().as_dispatch()
    {
        let Place { shape, dtype, .. } = place;
        return crate::backends::cube_select::takes_antidiagonals(
            device,
            dtype,
            shape.head_dim,
            block,
            stride,
        );
    }
    let _ = (place.device, block, stride);
    false
}

fn kernels_take_outliers(rule: &SelectionRule) -> bool {
    #[cfg(any(feature = "cpu", feature = "cuda", feature = "rocm", feature = "wgpu"))]
    return crate::backends::cube_select::takes_outliers(rule);
    #[cfg(not(any(feature = "cpu", feature = "cuda", feature = "rocm", feature = "wgpu")))]
    {
        let _ = rule;
        false
    }
}

/// About what a method needs beside pooled vectors and the selection.
pub(crate) fn scratch_bytes(config: &PrismConfig, place: Place) -> u64 {
    let Some(selector) = config.selector.as_ref().filter(|&selector| !scores_means(selector))
    else {
        return 0;
    };
    let AttentionShape { batch, q_heads, kv_heads, q_len, kv_len, head_dim } = *place.shape;
    let blocks = kv_len.div_ceil(config.block) as u64;
    // Query sub-blocks of some positions, each with a number for every block.
    let sums = |sub: usize| (batch * q_heads * q_len.div_ceil(sub)) as u64 * blocks * 4;
    let map = sums(config.block);
    if has_kernels(config, place) {
        match selector {
            SelectorConfig::Outliers(options) => {
                let [query_sub, key_sub] = options.subs(config.block);
                let queries = q_heads * q_len.div_ceil(query_sub);
                // Means, variances and outliers.
                let keys = 3 * kv_heads * kv_len.div_ceil(key_sub);
                // As they are, and as the kernel reads them.
                let parts = 2 * (batch * (queries + keys) * head_dim) as u64 * 4;
                return parts + sums(query_sub).min(SUMS);
            }
            SelectorConfig::XAttention(XAttention { stride, .. }) => {
                // Masses of a run of rows, and sums of the heads that have room, of one at least.
                let masses = map.min(TILE_BYTES / 6);
                let one = masses * (config.block / stride) as u64 / (batch * q_heads).max(1) as u64;
                return masses + sums(*stride).min(SUMS.max(one));
            }
            _ => {}
        }
    }
    let keys = (batch * kv_heads * kv_len * head_dim) as u64;
    let wide = if place.dtype.size() == 4 { 0 } else { keys * 4 };
    let lines = (batch * q_heads * kv_len) as u64 * 4;
    // Keys of some heads in f32, and scores of the last queries: in tensor ops their probabilities in as many
    // temporaries as those of rows.
    let last = |queries: usize| {
        let group = q_heads / kv_heads.max(1);
        let heads = kv_heads_at_once(batch * group * queries, kv_len).min(kv_heads);
        let temporaries = if place.attention.is_cube() { 1 } else { 6 };
        let scores = (batch * heads * group * queries * kv_len).min(LAST_QUERIES_AT_ONCE) as u64;
        wide / kv_heads.max(1) as u64 * heads as u64 + temporaries * 4 * scores
    };
    TILE_BYTES
        + match selector {
            // Means of parts in f32, and each band's dims of them.
            SelectorConfig::Prism(Prism { pool_block: Some(pool), .. }) => {
                let parts = q_heads * q_len.div_ceil(*pool) + kv_heads * kv_len.div_ceil(*pool);
                3 * (batch * parts * head_dim) as u64 * 4
            }
            SelectorConfig::XAttention(_) | SelectorConfig::Oracle(_) => wide,
            // Keys in f32 and their squares, and then those that are outliers.
            SelectorConfig::Outliers(_) => wide + 8 * keys,
            SelectorConfig::MInference(options) => 4 * lines + last(options.last_queries),
            SelectorConfig::FlexPrefill(options) => {
                let maps = if options.tau > 0.0 { 4 * map } else { 0 };
                4 * lines + last(config.block) + maps
            }
            _ => 0,
        }
}
