//! Ways to choose blocks beside Prism's own settings ([`prism_core::selectors`]), on any device.
//!
//! Means of blocks are scored by the kernels that Prism uses (`mean_pool`, `top_k`), and CubeCL's devices
//! have kernels for `outliers` and, on tensor cores, for `xattention`; the others score in tensor ops on the
//! device of Q and K. None reads anything back to the host.

use burn::backend::Dispatch;
use burn::tensor::{DType, Tensor};
use prism_core::bands::Bands;
use prism_core::error::{PrismError, Result};
use prism_core::{AttentionShape, BlockGrid, Calibration, Scoring, SelectionRule, SelectorConfig};

use crate::attention::AttentionOptions;
use crate::config::{PrismConfig, resolve_scale};
use crate::fallback;
use crate::fallback::selectors::{Call, Words};
use crate::heads::{HeadGroup, indices, places};
use crate::ops::{PrismBackend, SelectParams, Side};
use crate::select::{self, PooledKeys, select_blocks};
use crate::selected::SelectedBlocks;

/// The key blocks that a method lets each query block read; block, forced blocks, limits, scale and RoPE
/// are the config's.
///
/// ```
/// use burn::tensor::{Device, Distribution, Tensor};
/// use burn_prism::{AttentionOptions, PrismConfig, SelectorConfig};
/// use burn_prism::{block_sparse_attention, select_blocks_by};
///
/// let random = |heads| {
///     Tensor::<4>::random([1, heads, 300, 64], Distribution::Default, &Device::flex())
/// };
/// let (q, k, v) = (random(6), random(2), random(2));
/// let selector = SelectorConfig::from_settings("xattention", &[("stride", "8")])?;
/// let (config, options) = (PrismConfig::llama3().with_block(64), AttentionOptions::default());
/// let selected = select_blocks_by(q.clone(), k.clone(), &selector, &config, &options)?;
/// let output = block_sparse_attention(q, k, v, &selected, &options)?.output;
/// assert_eq!(output.dims(), [1, 6, 300, 64]);
/// # Ok::<(), burn_prism::PrismError>(())
/// ```
///
/// # Errors
/// Shapes, element types, devices, lengths or settings that don't fit; nothing has run then.
pub fn select_blocks_by(
    q: Tensor<4>,
    k: Tensor<4>,
    selector: &SelectorConfig,
    config: &PrismConfig,
    options: &AttentionOptions,
) -> Result<SelectedBlocks> {
    select_blocks(q, k, &config.clone().with_selector(selector.clone()), options)
}

/// The name of the method of a config.
pub(crate) fn name(config: &PrismConfig) -> &'static str {
    match (&config.selector, config.scoring) {
        (Some(selector), _) => selector.name(),
        (None, Scoring::Bands) => "prism",
        (None, Scoring::SecondOrder { .. }) => "second_order",
    }
}

/// Whether a method scores means of blocks, which kernels do.
pub(crate) fn scores_means(selector: &SelectorConfig) -> bool {
    matches!(selector, SelectorConfig::MeanPool(_) | SelectorConfig::TopK(_))
}

/// Whether a method takes means of blocks.
pub(crate) fn pools(selector: &SelectorConfig) -> bool {
    let others = matches!(
        selector,
        SelectorConfig::Lsh(_) | SelectorConfig::FlexPrefill(_) | SelectorConfig::Prism(_)
    );
    scores_means(selector) || others
}

/// Selects by a method of checked settings and inputs; some query sees a key. `pooled_k` are means of the
/// key blocks, where a cache holds them.
///
/// # Errors
/// A bad scale, or a method that is settings of Prism.
#[allow(clippy::too_many_arguments)] // What a call is made of.
pub(crate) fn select(
    q: Tensor<4>,
    k: Tensor<4>,
    pooled_k: Option<PooledKeys>,
    selector: &SelectorConfig,
    shape: &AttentionShape,
    grids: Vec<BlockGrid>,
    config: &PrismConfig,
    options: &AttentionOptions,
) -> Result<SelectedBlocks> {
    let scale = resolve_scale(options.scale.or(config.scale), shape.head_dim)?;
    // What is selected has no gradient.
    let (q, k) = (q.detach(), k.detach());
    let more_follows = options.more_follows;
    let means = scores_means(selector).then(|| {
        let means_k = match pooled_k {
            Some(PooledKeys::Bands { means, .. }) => means,
            _ => select::pool(k.clone(), &grids, Side::Keys),
        };
        // The kernels divide by √head_dim.
        let factor = scale * (shape.head_dim as f64).sqrt();
        (select::pool(q.clone(), &grids, Side::Queries) * factor, means_k)
    });
    let bands = config.validate(shape.head_dim)?;
    let select = |rule: SelectionRule| {
        let budget = selector.budget().unwrap_or(rule.budget);
        let rule = SelectionRule { budget, ..rule };
        let selected = match &means {
            Some((q, k)) => Some(select_means(q.clone(), k.clone(), &grids, rule, more_follows)),
            None => {
                let scale = scale as f32;
                let call = Call { grids: &grids, rule, more_follows, scale, bands: &bands };
                let (q, k) = (q.clone().into_dispatch(), k.clone().into_dispatch());
                fallback::selectors::select::<Dispatch>(q, k, selector, &call)
            }
        };
        let selected = selected.map(|selected| select::wrap(selected, grids.clone()));
        // Which is what checking the settings says, too.
        let reason = format!("{} is set by scoring, bands and calibration", selector.name());
        selected.ok_or(PrismError::Selector { reason })
    };
    let groups = config.head_groups(shape.q_heads);
    if let [group] = groups.as_slice() {
        return select(group.rule);
    }
    // Every rule selects for all heads; of each, the heads that have it are kept.
    let device = q.device();
    let (mut words, mut counts) = (Vec::new(), Vec::new());
    for HeadGroup { heads, rule, .. } in &groups {
        let (selected, heads) = (select(*rule)?, indices(heads.iter().copied(), &device));
        words.push(selected.words.select(1, heads.clone()));
        counts.push(selected.counts.select(1, heads));
    }
    let places = indices(places(&groups), &device);
    let words = Tensor::cat(words, 1).select(1, places.clone());
    Ok(SelectedBlocks { words, counts: Tensor::cat(counts, 1).select(1, places), grids })
}

/// Selects by pooled Q and K, each a single band.
fn select_means(
    q: Tensor<4>,
    k: Tensor<4>,
    grids: &[BlockGrid],
    rule: SelectionRule,
    more_follows: bool,
) -> Words<Dispatch> {
    let [batch, q_heads, _, d] = q.dims();
    let history = Tensor::<3>::zeros([batch, q_heads, 4], (&q.device(), DType::F32));
    let params =
        SelectParams::new(grids.to_vec(), Bands::whole(d), Calibration::Off, rule, more_follows);
    let (q, k) = (q.into_dispatch(), k.into_dispatch());
    <Dispatch as PrismBackend>::prism_select(q, k, history.into_dispatch(), params)
}
