//! Prism attention as a Burn module without weights.

use burn::module::Module;
use burn::tensor::Tensor;
use prism_core::error::{PrismError, Result};
use prism_core::{Calibration, Scoring};

use crate::attention::{
    self, AttentionOptions, PrismOutput, block_sparse_attention, dense_attention, prism_attention,
};
use crate::cache::PrismCache;
use crate::check;
use crate::config::PrismConfig;
use crate::packed::{PackedOutput, prism_attention_packed};
use crate::plan;
use crate::report::{Path, Report};
use crate::rotary::RotaryTable;
use crate::rotated::{prism_attention_rotated, rotate_and_pool};
use crate::select;
use crate::selectors;

/// Causal attention that reads only the blocks that matter: goes where a model's own
/// scaled-dot-product attention was, after RoPE and before the output projection.
///
/// ```
/// use burn::tensor::{Device, Tensor};
/// use burn_prism::PrismConfig;
///
/// let attention = PrismConfig::smollm2().init();
/// let q = Tensor::<4>::zeros([1, 9, 16, 64], &Device::flex());
/// let kv = Tensor::<4>::zeros([1, 3, 16, 64], &Device::flex());
/// assert_eq!(attention.forward(q, kv.clone(), kv)?.dims(), [1, 9, 16, 64]);
/// # Ok::<(), burn_prism::PrismError>(())
/// ```
#[derive(Module, Debug)]
pub struct PrismAttention {
    #[module(skip)]
    config: PrismConfig,
}

impl PrismAttention {
    /// A module with the given settings.
    pub fn new(config: PrismConfig) -> Self {
        Self { config }
    }

    /// The settings.
    pub fn config(&self) -> &PrismConfig {
        &self.config
    }

    /// Attention of Q `[batch, q_heads, q_len, head_dim]` over K and V
    /// `[batch, kv_heads, kv_len, head_dim]`, all rotated; the output has the shape of Q.
    ///
    /// # Errors
    /// As [`prism_attention`].
    pub fn forward(&self, q: Tensor<4>, k: Tensor<4>, v: Tensor<4>) -> Result<Tensor<4>> {
        Ok(self.forward_with(q, k, v, &AttentionOptions::default())?.output)
    }

    /// [`forward`](Self::forward) with options, and with a report of what was done.
    ///
    /// # Errors
    /// As [`prism_attention`].
    pub fn forward_with(
        &self,
        q: Tensor<4>,
        k: Tensor<4>,
        v: Tensor<4>,
        options: &AttentionOptions,
    ) -> Result<PrismOutput> {
        prism_attention(q, k, v, &self.config, options)
    }

    /// Attention of sequences that lie end to end, each by itself: Q is `[queries, q_heads, head_dim]`, K and V
    /// `[keys, kv_heads, head_dim]`, offsets as in [`prism_attention_packed`].
    ///
    /// # Errors
    /// As [`prism_attention_packed`].
    pub fn forward_packed(
        &self,
        q: Tensor<3>,
        k: Tensor<3>,
        v: Tensor<3>,
        q_offsets: &[usize],
        kv_offsets: &[usize],
        options: &AttentionOptions,
    ) -> Result<PackedOutput> {
        prism_attention_packed(q, k, v, q_offsets, kv_offsets, &self.config, options)
    }

    /// Attention of the next chunk of a prompt: appends K and V to the cache and attends over all
    /// it holds. With [`Calibration::Causal`] or [`Scoring::SecondOrder`], and chunks that end on
    /// block boundaries, chunks select exactly what the whole prompt selects.
    ///
    /// # Errors
    /// As [`prism_attention`], and a cache that is full or was made for another shape, block size
    /// or band; the cache is unchanged then.
    pub fn forward_cached(
        &self,
        q: Tensor<4>,
        k: Tensor<4>,
        v: Tensor<4>,
        cache: &mut PrismCache,
        options: &AttentionOptions,
    ) -> Result<PrismOutput> {
        self.config.validate_for(q.dims()[1], q.dims()[3])?;
        let options = attention::with_scale_of(options, &self.config);
        crate::config::resolve_scale(options.scale, q.dims()[3])?;
        cache.check_call(&q, &self.config, &options)?;
        let (queries, keys) = (q.dims()[2], cache.len() + k.dims()[2]);
        let (kernel, _) =
            plan::choose_kernel(&q.device(), q.dtype(), q.dims()[3], self.config.block);
        let (path, reason) = plan::choose_path(&self.config, &[(queries, keys)], kernel);
        if path == Path::Sparse {
            check::selectable(&self.config, keys)?;
        }
        cache.append(k, v)?;
        let (keys, values) = (cache.keys(), cache.values());
        let shape = check::inputs(&q, &keys, &values)?;
        let grids = check::grids(self.config.block, &shape, None)?;
        let pooled_q = || select::pool_queries(q.clone(), &grids, &self.config);
        // Band statistics that later chunks are calibrated by. Decoding needs none: nothing sparse
        // follows it in the same prompt.
        let causal = self.config.calibration == Calibration::Causal && queries > 1;
        let banded = self.config.is_banded();
        let other = self.config.selector.clone();
        let pools = path == Path::Sparse && other.is_none() || banded && causal;
        let pooled_q = pools.then(pooled_q);
        let (result, selected) = match (path, &pooled_q) {
            (Path::Sparse, Some(pooled_q)) => {
                let selected = select::select_pooled(
                    pooled_q.clone(),
                    cache.pooled_keys(self.config.scoring),
                    &shape,
                    grids,
                    &self.config,
                    options.more_follows,
                )?;
                (block_sparse_attention(q, keys, values, &selected, &options)?, Some(selected))
            }
            (Path::Sparse, None) if let Some(selector) = &other => {
                let pooled_k =
                    selectors::scores_means(selector).then(|| cache.pooled_keys(Scoring::Bands));
                let selected = selectors::select(
                    q.clone(),
                    keys.clone(),
                    pooled_k,
                    selector,
                    &shape,
                    grids,
                    &self.config,
                    &options,
                )?;
                (block_sparse_attention(q, keys, values, &selected, &options)?, Some(selected))
            }
            _ => (dense_attention(q, keys, values, &options)?, None),
        };
        if let Some(pooled_q) = pooled_q.filter(|_| banded) {
            cache.record_queries(pooled_q, &self.config)?;
        }
        let report = Report { path, reason, selected };
        Ok(PrismOutput { output: result.output, lse: result.lse, report })
    }

    /// [`forward_cached`](Self::forward_cached) of Q and K as the projections make them, of one length and
    /// before their rotary embedding. The start of a prompt is rotated and pooled by one operation, as in
    /// [`rotate_and_pool`].
    ///
    /// # Errors
    /// As [`forward_cached`](Self::forward_cached), and a table with fewer positions than the cache then
    /// holds, for wider heads or on another device; the cache is unchanged then.
    pub fn forward_with_rope(
        &self,
        q: Tensor<4>,
        k: Tensor<4>,
        v: Tensor<4>,
        table: &RotaryTable,
        cache: &mut PrismCache,
        options: &AttentionOptions,
    ) -> Result<PrismOutput> {
        let (queries, keys) = (q.dims()[2], k.dims()[2]);
        if queries != keys {
            return Err(PrismError::DimMismatch {
                name: "length",
                left: "q",
                left_len: queries,
                right: "k",
                right_len: keys,
            });
        }
        let first = cache.len();
        if first > 0 {
            check::inputs(&q, &k, &v)?;
            let (q, k) = table.rotate_both(q, k, first)?;
            return self.forward_cached(q, k, v, cache, options);
        }
        cache.check_call(&q, &self.config, options)?;
        self.config.validate_for(q.dims()[1], q.dims()[3])?;
        let rotated = rotate_and_pool(q, k, table, &self.config, options)?;
        // As of a call that finds them rotated: see there.
        let banded = self.config.is_banded();
        let causal = self.config.calibration == Calibration::Causal && queries > 1;
        let pooled_q = (banded && (rotated.path() == Path::Sparse || causal))
            .then(|| rotated.pooled_queries())
            .transpose()?;
        cache.append(rotated.keys(), v.clone())?;
        let output = prism_attention_rotated(rotated, v)?;
        if let Some(pooled_q) = pooled_q {
            cache.record_queries(pooled_q, &self.config)?;
        }
        Ok(output)
    }
}
