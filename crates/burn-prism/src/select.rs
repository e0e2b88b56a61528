//! From Q and K to the blocks that each query block reads, by either way of scoring; other methods are
//! in [`crate::selectors`].

use burn::backend::Dispatch;
use burn::backend::tensor::IntTensor;
use burn::tensor::{DType, Device, Tensor};
use prism_core::error::Result;
use prism_core::selection::extent;
use prism_core::{AttentionShape, BlockGrid, Scoring};

use crate::attention::AttentionOptions;
use crate::check;
use crate::config::PrismConfig;
use crate::heads::{HeadGroup, indices, places};
use crate::ops::{PrismBackend, SecondOrderParams, SelectParams, Side};
use crate::selected::SelectedBlocks;
use crate::selectors;

/// The key blocks that Prism lets each query block read (paper §3), or the config's other method.
///
/// # Errors
/// Shapes, element types, devices, lengths or settings that don't fit; nothing has run then.
pub fn select_blocks(
    q: Tensor<4>,
    k: Tensor<4>,
    config: &PrismConfig,
    options: &AttentionOptions,
) -> Result<SelectedBlocks> {
    let shape = check::inputs(&q, &k, &k)?;
    config.validate_for(shape.q_heads, shape.head_dim)?;
    let grids = check::grids(config.block, &shape, options.lengths.as_ref())?;
    check::selectable(config, grids.iter().map(BlockGrid::kv_len).max().unwrap_or(0))?;
    if is_empty(&grids) {
        return Ok(nothing(&q.device(), &shape, grids));
    }
    if let Some(selector) = &config.selector {
        return selectors::select(q, k, None, selector, &shape, grids, config, options);
    }
    match config.scoring {
        Scoring::Bands => {
            let groups = config.head_groups(shape.q_heads);
            let [group] = groups.as_slice() else {
                let (pooled_q, means) =
                    (pool_queries(q, &grids, config), pool(k, &grids, Side::Keys));
                let history = [shape.batch, shape.q_heads, 4];
                let history = Tensor::zeros(history, (&means.device(), DType::F32));
                let pooled_k = PooledKeys::Bands { means, history };
                let more_follows = options.more_follows;
                return select_pooled(pooled_q, pooled_k, &shape, grids, config, more_follows);
            };
            let params = select_params(&grids, config, group, &shape, options.more_follows)?;
            let (q, k) = (q.into_dispatch(), k.into_dispatch());
            let selected = <Dispatch as PrismBackend>::prism_select_blocks(q, k, params);
            Ok(wrap(selected, grids))
        }
        Scoring::SecondOrder { query_sub, key_sub } => {
            let pooled_q = pool_queries(q, &grids, config);
            let (means, variances) = pool_moments(k, &subdivided(&grids, key_sub));
            let pooled_k = PooledKeys::SecondOrder { query_sub, key_sub, means, variances };
            select_pooled(pooled_q, pooled_k, &shape, grids, config, options.more_follows)
        }
    }
}

/// What keys leave behind, all in f32.
pub(crate) enum PooledKeys {
    /// Of blocks.
    Bands {
        /// `[batch, kv_heads, key_blocks, head_dim]`.
        means: Tensor<4>,
        /// Energy of earlier query blocks, `[batch, q_heads, 4]`.
        history: Tensor<3>,
    },
    /// Of sub-blocks.
    SecondOrder {
        /// Positions a query sub-block.
        query_sub: usize,
        /// Positions a key sub-block.
        key_sub: usize,
        /// `[batch, kv_heads, key sub-blocks, head_dim]`.
        means: Tensor<4>,
        /// `[batch, kv_heads, key sub-blocks, head_dim]`.
        variances: Tensor<4>,
    },
}

impl PooledKeys {
    /// What some query heads are scored against, as if each had a kv head of its own; `group` query
    /// heads share one.
    fn of(&self, heads: &[usize], group: usize) -> Self {
        let pick = |x: &Tensor<4>| {
            let kv_heads = heads.iter().map(|head| head / group);
            x.clone().select(1, indices(kv_heads, &x.device()))
        };
        match self {
            Self::Bands { means, history } => {
                let heads = indices(heads.iter().copied(), &history.device());
                Self::Bands { means: pick(means), history: history.clone().select(1, heads) }
            }
            Self::SecondOrder { query_sub, key_sub, means, variances } => Self::SecondOrder {
                query_sub: *query_sub,
                key_sub: *key_sub,
                means: pick(means),
                variances: pick(variances),
            },
        }
    }
}

/// Means of what queries are scored by in f32: blocks `[batch, q_heads, rows, head_dim]`, or
/// sub-blocks.
pub(crate) fn pool_queries(q: Tensor<4>, grids: &[BlockGrid], config: &PrismConfig) -> Tensor<4> {
    match config.scoring {
        Scoring::Bands => pool(q, grids, Side::Queries),
        Scoring::SecondOrder { query_sub, .. } => {
            pool(q, &subdivided(grids, query_sub), Side::Queries)
        }
    }
}

/// Block means of a tensor in f32, `[batch, heads, blocks, head_dim]`.
pub(crate) fn pool(x: Tensor<4>, grids: &[BlockGrid], side: Side) -> Tensor<4> {
    let blocks = match side {
        Side::Queries => extent(grids).0,
        Side::Keys => extent(grids).1,
    };
    let [batch, heads, len, head_dim] = x.dims();
    if blocks == 0 || len == 0 {
        return Tensor::zeros([batch, heads, blocks, head_dim], (&x.device(), DType::F32));
    }
    let means = <Dispatch as PrismBackend>::prism_pool(x.into_dispatch(), grids.to_vec(), side);
    Tensor::from_dispatch(means)
}

/// Means and variances of the key blocks of a tensor in f32, each
/// `[batch, kv_heads, blocks, head_dim]`.
pub(crate) fn pool_moments(x: Tensor<4>, grids: &[BlockGrid]) -> (Tensor<4>, Tensor<4>) {
    let [batch, heads, len, head_dim] = x.dims();
    let blocks = extent(grids).1;
    if blocks == 0 || len == 0 {
        let none = Tensor::zeros([batch, heads, blocks, head_dim], (&x.device(), DType::F32));
        return (none.clone(), none);
    }
    let (means, variances) =
        <Dispatch as PrismBackend>::prism_pool_moments(x.into_dispatch(), grids.to_vec());
    (Tensor::from_dispatch(means), Tensor::from_dispatch(variances))
}

/// [`select_blocks`] from pooled queries and keys.
pub(crate) fn select_pooled(
    pooled_q: Tensor<4>,
    pooled_k: PooledKeys,
    shape: &AttentionShape,
    grids: Vec<BlockGrid>,
    config: &PrismConfig,
    more_follows: bool,
) -> Result<SelectedBlocks> {
    if is_empty(&grids) {
        return Ok(nothing(&pooled_q.device(), shape, grids));
    }
    let groups = config.head_groups(shape.q_heads);
    if let [group] = groups.as_slice() {
        return select_group(group, pooled_q, pooled_k, shape, grids, config, more_follows);
    }
    let device = pooled_q.device();
    let (mut words, mut counts) = (Vec::new(), Vec::new());
    for group in &groups {
        let q = pooled_q.clone().select(1, indices(group.heads.iter().copied(), &device));
        let k = pooled_k.of(&group.heads, shape.group());
        let selected = select_group(group, q, k, shape, grids.clone(), config, more_follows)?;
        words.push(selected.words);
        counts.push(selected.counts);
    }
    let places = indices(places(&groups), &device);
    let words = Tensor::cat(words, 1).select(1, places.clone());
    let counts = Tensor::cat(counts, 1).select(1, places);
    Ok(SelectedBlocks { words, counts, grids })
}

/// Selects for heads that select alike.
fn select_group(
    group: &HeadGroup,
    pooled_q: Tensor<4>,
    pooled_k: PooledKeys,
    shape: &AttentionShape,
    grids: Vec<BlockGrid>,
    config: &PrismConfig,
    more_follows: bool,
) -> Result<SelectedBlocks> {
    let q = pooled_q.into_dispatch();
    let selected = match pooled_k {
        PooledKeys::Bands { means, history } => <Dispatch as PrismBackend>::prism_select(
            q,
            means.into_dispatch(),
            history.into_dispatch(),
            select_params(&grids, config, group, shape, more_follows)?,
        ),
        PooledKeys::SecondOrder { query_sub, key_sub, means, variances } => {
            <Dispatch as PrismBackend>::prism_select_second_order(
                q,
                means.into_dispatch(),
                variances.into_dispatch(),
                SecondOrderParams::new(grids.clone(), query_sub, key_sub, group.rule, more_follows),
            )
        }
    };
    Ok(wrap(selected, grids))
}

fn select_params(
    grids: &[BlockGrid],
    config: &PrismConfig,
    group: &HeadGroup,
    shape: &AttentionShape,
    more_follows: bool,
) -> Result<SelectParams> {
    let bands = config.bands_by(group.bands, shape.head_dim)?;
    Ok(SelectParams::new(grids.to_vec(), bands, config.calibration, group.rule, more_follows))
}

pub(crate) fn wrap(
    (words, counts): (IntTensor<Dispatch>, IntTensor<Dispatch>),
    grids: Vec<BlockGrid>,
) -> SelectedBlocks {
    let (words, counts) = (Tensor::from_dispatch(words), Tensor::from_dispatch(counts));
    SelectedBlocks { words, counts, grids }
}

/// The selection where no query sees a key.
fn nothing(device: &Device, shape: &AttentionShape, grids: Vec<BlockGrid>) -> SelectedBlocks {
    let (rows, width) = (extent(&grids).0, SelectedBlocks::words_per_row(&grids));
    let options = (device, DType::I32);
    SelectedBlocks {
        words: Tensor::zeros([shape.batch, shape.q_heads, rows, width], options),
        counts: Tensor::zeros([shape.batch, shape.q_heads, rows], options),
        grids,
    }
}

/// Whether no sequence has a query that sees a key.
pub(crate) fn is_empty(grids: &[BlockGrid]) -> bool {
    grids.iter().all(|grid| grid.rows() == 0)
}

fn subdivided(grids: &[BlockGrid], sub: usize) -> Vec<BlockGrid> {
    grids.iter().map(|grid| grid.subdivided(sub)).collect()
}
