//! Attention as functions on tensors.
//!
//! Q is `[batch, q_heads, q_len, head_dim]`; K and V are `[batch, kv_heads, kv_len, head_dim]`,
//! where kv_heads divides q_heads. f32, f16 or bf16, any strides. Causal, bottom-right: query `i`
//! sits at position `kv_len − q_len + i`. Queries that see no key get 0, and LSE −∞.

use burn::backend::Dispatch;
use burn::tensor::{DType, Tensor};
use prism_core::error::{PrismError, Result};
use prism_core::{AttentionShape, BlockGrid, SequenceLengths};

use crate::check;
use crate::config::{PrismConfig, resolve_scale};
use crate::ops::{AttendParams, PrismBackend};
use crate::plan;
use crate::report::{Path, Report};
use crate::select::is_empty;
use crate::selected::SelectedBlocks;

pub use crate::select::select_blocks;

/// What differs from call to call.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct AttentionOptions {
    /// Lengths of the sequences of a right-padded batch; all as long as the tensors unless given.
    pub lengths: Option<SequenceLengths>,
    /// Whether to return the LSE.
    pub lse: bool,
    /// Whether this is a chunk of a prompt that goes on, so that its last query blocks aren't the
    /// prompt's and `dense_last_blocks` doesn't apply.
    pub more_follows: bool,
    /// Factor on the scores; the config's, or 1/√head_dim, unless given.
    pub scale: Option<f64>,
}

impl AttentionOptions {
    /// Sets the lengths of the sequences.
    pub fn with_lengths(mut self, lengths: SequenceLengths) -> Self {
        self.lengths = Some(lengths);
        self
    }

    /// Asks for the LSE.
    pub fn with_lse(mut self) -> Self {
        self.lse = true;
        self
    }

    /// Says that the prompt goes on after this chunk.
    pub fn with_more_follows(mut self, more_follows: bool) -> Self {
        self.more_follows = more_follows;
        self
    }

    /// Sets the factor on the scores.
    pub fn with_scale(mut self, scale: f64) -> Self {
        self.scale = Some(scale);
        self
    }
}

/// Result of attention.
#[derive(Debug, Clone)]
pub struct AttentionOutput {
    /// `[batch, q_heads, q_len, head_dim]`, in the element type of Q.
    pub output: Tensor<4>,
    /// `[batch, q_heads, q_len]` in f32, natural log; only if asked for.
    pub lse: Option<Tensor<3>>,
}

/// Result of [`prism_attention`].
#[derive(Debug, Clone)]
pub struct PrismOutput {
    /// `[batch, q_heads, q_len, head_dim]`, in the element type of Q.
    pub output: Tensor<4>,
    /// `[batch, q_heads, q_len]` in f32, natural log; only if asked for.
    pub lse: Option<Tensor<3>>,
    /// Which path ran, why, and what it read.
    pub report: Report,
}

/// Block size of the dense path, which no result depends on.
pub(crate) const DENSE_BLOCK: usize = 128;

/// Exact causal attention.
///
/// # Errors
/// Shapes, element types, devices, lengths or a scale that don't fit; nothing has run then.
pub fn dense_attention(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    options: &AttentionOptions,
) -> Result<AttentionOutput> {
    let shape = check::inputs(&q, &k, &v)?;
    let grids = check::grids(DENSE_BLOCK, &shape, options.lengths.as_ref())?;
    let scale = resolve_scale(options.scale, shape.head_dim)?;
    Ok(attend_dense(q, k, v, &shape, AttendParams::new(grids, scale), options))
}

/// [`dense_attention`] of checked inputs.
pub(crate) fn attend_dense(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    shape: &AttentionShape,
    params: AttendParams,
    options: &AttentionOptions,
) -> AttentionOutput {
    if is_empty(&params.grids) {
        return empty_output(&q, shape, options);
    }
    let (output, lse) = <Dispatch as PrismBackend>::prism_attend_dense(
        q.into_dispatch(),
        k.into_dispatch(),
        v.into_dispatch(),
        params,
    );
    let lse = options.lse.then(|| Tensor::from_dispatch(lse));
    AttentionOutput { output: Tensor::from_dispatch(output), lse }
}

/// Attention over selected blocks: Prism's, or one's own.
///
/// # Errors
/// Shapes, element types, devices, lengths or a scale that don't fit, or a selection made for
/// another shape or other lengths; nothing has run then.
pub fn block_sparse_attention(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    selected: &SelectedBlocks,
    options: &AttentionOptions,
) -> Result<AttentionOutput> {
    let shape = check::inputs(&q, &k, &v)?;
    let block = selected.grids.first().map_or(DENSE_BLOCK, BlockGrid::block);
    let grids = check::grids(block, &shape, options.lengths.as_ref())?;
    let scale = resolve_scale(options.scale, shape.head_dim)?;
    let [_, heads, ..] = selected.words.dims();
    if selected.grids != grids || heads != shape.q_heads {
        let reason = format!(
            "made for {} sequences and {heads} heads with lengths (queries, keys) {:?}, but the \
             call has {} heads and {:?}",
            selected.grids.len(),
            lengths(&selected.grids),
            shape.q_heads,
            lengths(&grids),
        );
        return Err(PrismError::Selection { reason });
    }
    if selected.words.device() != q.device() {
        return Err(PrismError::Device { left: "q", right: "selection" });
    }
    Ok(attend_selected(q, k, v, selected, &shape, AttendParams::new(grids, scale), options))
}

/// [`block_sparse_attention`] of checked inputs and a selection made for them.
pub(crate) fn attend_selected(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    selected: &SelectedBlocks,
    shape: &AttentionShape,
    params: AttendParams,
    options: &AttentionOptions,
) -> AttentionOutput {
    if is_empty(&params.grids) {
        return empty_output(&q, shape, options);
    }
    let (output, lse) = <Dispatch as PrismBackend>::prism_attend(
        q.into_dispatch(),
        k.into_dispatch(),
        v.into_dispatch(),
        selected.words.clone().into_dispatch(),
        params,
    );
    let lse = options.lse.then(|| Tensor::from_dispatch(lse));
    AttentionOutput { output: Tensor::from_dispatch(output), lse }
}

/// Prism attention: selects blocks and attends over them, or attends densely where that is
/// quicker; the report says which and why.
///
/// # Errors
/// Shapes, element types, devices, lengths or settings that don't fit; nothing has run then.
pub fn prism_attention(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    config: &PrismConfig,
    options: &AttentionOptions,
) -> Result<PrismOutput> {
    let shape = check::inputs(&q, &k, &v)?;
    config.validate_for(shape.q_heads, shape.head_dim)?;
    let lengths = SequenceLengths::resolve(options.lengths.as_ref(), &shape)?;
    let (kernel, _) = plan::choose_kernel(&q.device(), q.dtype(), shape.head_dim, config.block);
    let (path, reason) = plan::choose_path(config, &lengths, kernel);
    let options = with_scale_of(options, config);
    let (result, selected) = match path {
        Path::Dense => (dense_attention(q, k, v, &options)?, None),
        Path::Sparse => {
            let selected = select_blocks(q.clone(), k.clone(), config, &options)?;
            (block_sparse_attention(q, k, v, &selected, &options)?, Some(selected))
        }
    };
    let report = Report { path, reason, selected };
    Ok(PrismOutput { output: result.output, lse: result.lse, report })
}

/// The options with the config's scale where the call gives none.
pub(crate) fn with_scale_of(options: &AttentionOptions, config: &PrismConfig) -> AttentionOptions {
    AttentionOptions { scale: options.scale.or(config.scale), ..options.clone() }
}

fn lengths(grids: &[BlockGrid]) -> Vec<(usize, usize)> {
    grids.iter().map(|grid| (grid.q_len(), grid.kv_len())).collect()
}

fn empty_output(
    q: &Tensor<4>,
    shape: &AttentionShape,
    options: &AttentionOptions,
) -> AttentionOutput {
    let device = q.device();
    let lse = || {
        let dims = [shape.batch, shape.q_heads, shape.q_len];
        Tensor::full(dims, f32::NEG_INFINITY, (&device, DType::F32))
    };
    AttentionOutput {
        output: Tensor::zeros(q.dims(), (&device, q.dtype())),
        lse: options.lse.then(lse),
    }
}
