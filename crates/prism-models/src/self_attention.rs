//! Grouped-query self-attention with a cache, dense or Prism.

use burn::module::Module;
use burn::tensor::Tensor;
use burn_nn::{Linear, RmsNorm};
use burn_prism::{
    AttentionOptions, Path, PrismAttention, PrismCache, PrismConfig, Reason, Report, Rope,
    RotaryTable, dense_attention,
};
use prism_core::error::Result;

use crate::projection::project;
use crate::stopwatch::PartSeconds;

/// The attention of one decoder layer.
#[derive(Module, Debug)]
pub struct SelfAttention {
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    o_proj: Linear,
    q_norm: Option<RmsNorm>,
    k_norm: Option<RmsNorm>,
    /// Exact attention while `None`.
    prism: Option<PrismAttention>,
    head_dim: usize,
}

/// What attention did in one layer.
#[derive(Debug, Clone)]
pub struct LayerTrace {
    /// Index of the layer.
    pub layer: usize,
    /// Which path ran, why, and what it read.
    pub report: Report,
    /// Seconds in attention: pooling, selection and attention itself, without projections.
    pub seconds: f64,
    /// Seconds in every part of the layer.
    pub parts: PartSeconds,
}

/// The report of a layer that was told to attend exactly.
fn exact() -> Report {
    Report { path: Path::Dense, reason: Reason::Chosen, selected: None }
}

impl SelfAttention {
    /// From projections `[hidden, heads · head_dim]` and `[q_heads · head_dim, hidden]`.
    pub fn new(
        q_proj: Linear,
        k_proj: Linear,
        v_proj: Linear,
        o_proj: Linear,
        head_dim: usize,
    ) -> Self {
        let (q_norm, k_norm) = (None, None);
        Self { q_proj, k_proj, v_proj, o_proj, q_norm, k_norm, prism: None, head_dim }
    }

    /// Normalises the queries and the keys of each head before they are rotated.
    pub fn with_norms(mut self, q_norm: RmsNorm, k_norm: RmsNorm) -> Self {
        (self.q_norm, self.k_norm) = (Some(q_norm), Some(k_norm));
        self
    }

    /// Chooses Prism, or exact attention.
    pub fn set_prism(&mut self, prism: Option<PrismAttention>) {
        self.prism = prism;
    }

    /// Queries `[1, q_heads, n, head_dim]`, keys and values `[1, kv_heads, n, head_dim]`, before the rotary
    /// embedding, of normed hidden states `[1, n, hidden]`.
    ///
    /// # Errors
    /// Another hidden size than the weights'.
    pub fn project(&self, x: Tensor<3>) -> Result<[Tensor<4>; 3]> {
        let [batch, n, _] = x.dims();
        let heads = |layer: &Linear, norm: &Option<RmsNorm>, x: Tensor<3>| {
            let y = project(layer, x, None)?;
            let heads = y.dims()[2] / self.head_dim;
            let y = y.reshape([batch, n, heads, self.head_dim]);
            let y = match norm {
                Some(norm) => norm.forward(y),
                None => y,
            };
            Ok(y.swap_dims(1, 2))
        };
        Ok([
            heads(&self.q_proj, &self.q_norm, x.clone())?,
            heads(&self.k_proj, &self.k_norm, x.clone())?,
            heads(&self.v_proj, &None, x)?,
        ])
    }

    /// Appends rotated K, and V, to the cache and attends over all it holds: output
    /// `[1, q_heads, n, head_dim]` and what was done.
    ///
    /// # Errors
    /// A full cache, or settings that don't fit the heads.
    pub fn attend(
        &self,
        [q, k, v]: [Tensor<4>; 3],
        cache: &mut PrismCache,
        options: &AttentionOptions,
    ) -> Result<(Tensor<4>, Report)> {
        if let Some(prism) = &self.prism {
            let result = prism.forward_cached(q, k, v, cache, options)?;
            return Ok((result.output, result.report));
        }
        cache.append(k, v)?;
        let result = dense_attention(q, cache.keys(), cache.values(), options)?;
        Ok((result.output, exact()))
    }

    /// [`attend`](Self::attend) of Q and K before their rotary embedding, by the angles of `table`.
    ///
    /// # Errors
    /// As [`attend`](Self::attend), and a table with fewer positions than the cache then holds.
    pub fn attend_with_rope(
        &self,
        [q, k, v]: [Tensor<4>; 3],
        table: &RotaryTable,
        cache: &mut PrismCache,
        options: &AttentionOptions,
    ) -> Result<(Tensor<4>, Report)> {
        if let Some(prism) = &self.prism {
            let result = prism.forward_with_rope(q, k, v, table, cache, options)?;
            return Ok((result.output, result.report));
        }
        // Nothing of these settings but the dense path acts.
        let config = PrismConfig::new(Rope::new(1e4)).with_block(cache.block());
        let dense = config.with_dense_below(usize::MAX).init();
        let result = dense.forward_with_rope(q, k, v, table, cache, options)?;
        Ok((result.output, exact()))
    }

    /// Output `[1, n, hidden]` of attended heads `[1, q_heads, n, head_dim]`, plus a residual of its
    /// shape.
    ///
    /// # Errors
    /// Other heads than the weights'.
    pub fn output(&self, attended: Tensor<4>, residual: Tensor<3>) -> Result<Tensor<3>> {
        let [batch, heads, n, head_dim] = attended.dims();
        let x = attended.swap_dims(1, 2).reshape([batch, n, heads * head_dim]);
        project(&self.o_proj, x, Some(residual))
    }
}
