//! Attention of Q and K that come without their rotary embedding.
//!
//! Both are rotated, and pooled on the way, by one operation: CubeCL's kernels read them once for it.
//! Where attention runs on Hopper's kernel, Q takes the scale of attention along, which saves that an
//! instruction a score. The selection is that of rotating first and pooling then, but for the order of
//! sums.

use std::f64::consts::LN_2;

use burn::backend::Dispatch;
use burn::tensor::{DType, Tensor};
use prism_core::error::{PrismError, Result};
use prism_core::{AttentionShape, BlockGrid, SequenceLengths};

use crate::attention::{
    AttentionOptions, DENSE_BLOCK, PrismOutput, attend_dense, attend_selected, with_scale_of,
};
use crate::check;
use crate::config::{PrismConfig, resolve_scale};
use crate::fallback;
use crate::ops::{AttendParams, PrismBackend, RotateParams};
use crate::plan::{self, Kernel};
use crate::report::{Path, Reason, Report};
use crate::rotary::RotaryTable;
use crate::select::{self, PooledKeys, is_empty, select_blocks};

/// Rotated Q and K, and what a selection needs of them: of [`rotate_and_pool`], for
/// [`prism_attention_rotated`].
#[derive(Debug, Clone)]
pub struct Rotated {
    q: Tensor<4>,
    k: Tensor<4>,
    /// Block means of both in f32, of Q without the scale, where they were made: they are what bands are
    /// scored by.
    pooled: Option<(Tensor<4>, Tensor<4>)>,
    shape: AttentionShape,
    config: PrismConfig,
    options: AttentionOptions,
    path: (Path, Reason),
    scale: f64,
    prescaled: bool,
}

impl Rotated {
    /// Rotated keys `[batch, kv_heads, kv_len, head_dim]`; 0 past the end of their sequence.
    pub fn keys(&self) -> Tensor<4> {
        self.k.clone()
    }

    /// Rotated queries `[batch, q_heads, q_len, head_dim]`; 0 outside of their sequence. Times scale ·
    /// log2 e if [`prescaled`](Self::prescaled).
    pub fn queries(&self) -> Tensor<4> {
        self.q.clone()
    }

    /// The path that attention will take.
    pub(crate) fn path(&self) -> Path {
        self.path.0
    }

    /// Block means of the queries, without the scale, in f32.
    pub(crate) fn pooled_queries(&self) -> Result<Tensor<4>> {
        if let Some((pooled_q, _)) = &self.pooled {
            return Ok(pooled_q.clone());
        }
        let grids = check::grids(self.config.block, &self.shape, self.options.lengths.as_ref())?;
        Ok(select::pool_queries(self.q.clone(), &grids, &self.config))
    }

    /// Whether the queries carry the scale of attention.
    pub fn prescaled(&self) -> bool {
        self.prescaled
    }
}

/// Applies the rotary embedding to Q `[batch, q_heads, q_len, head_dim]` and K
/// `[batch, kv_heads, kv_len, head_dim]`, and pools both for the selection. K holds all keys of its
/// sequences, from position 0 on; query `i` sits at position `kv_len − q_len + i`.
///
/// ```
/// use burn::tensor::{Device, Distribution, Tensor};
/// use burn_prism::{AttentionOptions, PrismConfig, RotaryTable};
/// use burn_prism::{prism_attention_rotated, rotate_and_pool};
///
/// let device = Device::flex();
/// let random = |heads| Tensor::<4>::random([1, heads, 300, 64], Distribution::Default, &device);
/// let config = PrismConfig::llama3().with_dense_below(0);
/// let table = RotaryTable::new(&config.rope, 64, 300, &device)?;
/// let rotated =
///     rotate_and_pool(random(6), random(2), &table, &config, &AttentionOptions::default())?;
/// let result = prism_attention_rotated(rotated, random(2))?;
/// assert_eq!(result.output.dims(), [1, 6, 300, 64]);
/// # Ok::<(), burn_prism::PrismError>(())
/// ```
///
/// # Errors
/// Shapes, element types, devices, lengths or settings that don't fit, as of
/// [`prism_attention`](crate::prism_attention), or a table with fewer positions than keys or for wider
/// heads; nothing has run then.
pub fn rotate_and_pool(
    q: Tensor<4>,
    k: Tensor<4>,
    table: &RotaryTable,
    config: &PrismConfig,
    options: &AttentionOptions,
) -> Result<Rotated> {
    let shape = check::inputs(&q, &k, &k)?;
    let bands = config.validate_for(shape.q_heads, shape.head_dim)?;
    let options = with_scale_of(options, config);
    let scale = resolve_scale(options.scale, shape.head_dim)?;
    let lengths = SequenceLengths::resolve(options.lengths.as_ref(), &shape)?;
    let longest = lengths.iter().map(|&(_, keys)| keys).max().unwrap_or(0);
    table.check(shape.head_dim, longest)?;
    let (device, dtype) = (q.device(), q.dtype());
    if table.cos.device() != device {
        return Err(PrismError::Device { left: "q", right: "the rotary table" });
    }
    let kernel = |block| plan::choose_kernel(&device, dtype, shape.head_dim, block).0;
    let path = plan::choose_path(config, &lengths, kernel(config.block));
    if path.0 == Path::Sparse {
        check::selectable(config, longest)?;
    }
    let grids = check::grids(config.block, &shape, options.lengths.as_ref())?;
    let kernel = kernel(if path.0 == Path::Sparse { config.block } else { DENSE_BLOCK });
    // Second-order scores and other methods take queries from Q itself.
    let banded = config.is_banded();
    let prescaled = kernel == Kernel::CubeHopper && (banded || path.0 == Path::Dense);
    let params = RotateParams::new(
        grids.clone(),
        table.layout,
        table.rotary_dim,
        bands,
        prescaled.then_some(scale),
    );
    let (q, k) = (q.into_dispatch(), k.into_dispatch());
    let (cos, sin) = (table.cos.clone().into_dispatch(), table.sin.clone().into_dispatch());
    let pools = path.0 == Path::Sparse || kernel.is_cube();
    let (q, k, pooled) = if pools && banded && !is_empty(&grids) {
        let (q, k, pooled_q, pooled_k) =
            <Dispatch as PrismBackend>::prism_rotate_and_pool(q, k, cos, sin, params);
        (q, k, Some((Tensor::from_dispatch(pooled_q), Tensor::from_dispatch(pooled_k))))
    } else {
        let (q, k) = fallback::rotate::<Dispatch>(q, k, cos, sin, &params);
        (q, k, None)
    };
    let (q, k) = (Tensor::from_dispatch(q), Tensor::from_dispatch(k));
    Ok(Rotated { q, k, pooled, shape, config: config.clone(), options, path, scale, prescaled })
}

/// [`prism_attention`](crate::prism_attention) of rotated Q and K over V
/// `[batch, kv_heads, kv_len, head_dim]`, with the settings and options of [`rotate_and_pool`].
///
/// # Errors
/// A V of another shape than K, or another element type or device than Q; nothing has run then.
pub fn prism_attention_rotated(rotated: Rotated, v: Tensor<4>) -> Result<PrismOutput> {
    let Rotated { q, k, pooled, shape, config, options, path, scale, prescaled } = rotated;
    check::inputs(&q, &k, &v)?;
    let (path, reason) = path;
    let block = if path == Path::Sparse { config.block } else { DENSE_BLOCK };
    let grids: Vec<BlockGrid> = check::grids(block, &shape, options.lengths.as_ref())?;
    let scale = if prescaled { LN_2 } else { scale };
    let params = AttendParams { prescaled, ..AttendParams::new(grids.clone(), scale) };
    let (result, selected) = match (path, pooled) {
        (Path::Dense, _) => (attend_dense(q, k, v, &shape, params, &options), None),
        (Path::Sparse, Some((pooled_q, means))) => {
            let history = [shape.batch, shape.q_heads, 4];
            let history = Tensor::zeros(history, (&q.device(), DType::F32));
            let pooled_k = PooledKeys::Bands { means, history };
            let more_follows = options.more_follows;
            let selected =
                select::select_pooled(pooled_q, pooled_k, &shape, grids, &config, more_follows)?;
            let result = attend_selected(q, k, v, &selected, &shape, params, &options);
            (result, Some(selected))
        }
        (Path::Sparse, None) => {
            let selected = select_blocks(q.clone(), k.clone(), &config, &options)?;
            let result = attend_selected(q, k, v, &selected, &shape, params, &options);
            (result, Some(selected))
        }
    };
    let report = Report { path, reason, selected };
    Ok(PrismOutput { output: result.output, lse: result.lse, report })
}
