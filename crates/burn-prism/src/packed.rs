//! Sequences end to end, without padding, as variable-length kernels take them (`cu_seqlens`).
//!
//! Each sequence is attended by itself, one after the other: so no padding is stored or computed, each takes
//! the path that its own length deserves, and each has its own last blocks and calibration. The price is a
//! call of attention a sequence, and a copy that puts the outputs together. A GPU takes many short sequences
//! in one launch as a padded batch with [`AttentionOptions::lengths`].

use burn::tensor::{DType, Tensor};
use prism_core::error::{PrismError, Result};
use prism_core::{AttentionShape, SequenceLengths};

use crate::attention::{AttentionOptions, prism_attention};
use crate::check;
use crate::config::PrismConfig;
use crate::report::Report;

/// Result of [`prism_attention_packed`].
#[derive(Debug, Clone)]
pub struct PackedOutput {
    /// `[queries, q_heads, head_dim]`, in the element type of Q.
    pub output: Tensor<3>,
    /// `[queries, q_heads]` in f32, natural log; only if asked for.
    pub lse: Option<Tensor<2>>,
    /// Which path each sequence took, why, and what it read.
    pub reports: Vec<Report>,
}

/// [`prism_attention`] of sequences that lie end to end: Q is `[queries, q_heads, head_dim]`, K and V are
/// `[keys, kv_heads, head_dim]`, and sequence `i` owns the queries `q_offsets[i]..q_offsets[i + 1]` and the
/// keys `kv_offsets[i]..kv_offsets[i + 1]`. Both offsets are the same for prompts from their start.
///
/// A sequence may have no queries, which gives no rows, or no keys, which gives rows of 0 with LSE −∞.
///
/// ```
/// use burn::tensor::{Device, Distribution, Tensor};
/// use burn_prism::{AttentionOptions, PrismConfig, prism_attention_packed};
///
/// let random = |heads| Tensor::<3>::random([70, heads, 64], Distribution::Default, &Device::flex());
/// let (q, k, v) = (random(6), random(2), random(2));
/// let (config, options) = (PrismConfig::llama3(), AttentionOptions::default());
/// // A prompt of 50 tokens, and one of 20.
/// let offsets = [0, 50, 70];
/// let got = prism_attention_packed(q, k, v, &offsets, &offsets, &config, &options)?;
/// assert_eq!((got.output.dims(), got.reports.len()), ([70, 6, 64], 2));
/// # Ok::<(), burn_prism::PrismError>(())
/// ```
///
/// # Errors
/// As [`prism_attention`]; offsets that don't begin with 0, decrease, don't end with the number of rows, or
/// name another number of sequences for K than for Q; no sequence; lengths in the options.
pub fn prism_attention_packed(
    q: Tensor<3>,
    k: Tensor<3>,
    v: Tensor<3>,
    q_offsets: &[usize],
    kv_offsets: &[usize],
    config: &PrismConfig,
    options: &AttentionOptions,
) -> Result<PackedOutput> {
    let [q, k, v] = [q, k, v].map(batched);
    let shape = check::inputs(&q, &k, &v)?;
    let refuse = |reason| Err(PrismError::Lengths { reason });
    if options.lengths.is_some() {
        return refuse("packed sequences have offsets in place of lengths, got both".into());
    }
    let lengths = SequenceLengths::from_cumulative(q_offsets, kv_offsets)?;
    for (name, offsets, rows) in
        [("query", q_offsets, shape.q_len), ("key", kv_offsets, shape.kv_len)]
    {
        if let Some(&last) = offsets.last()
            && last != rows
        {
            return refuse(format!(
                "cumulative {name} lengths must end with the number of rows, {rows}, got {last}"
            ));
        }
    }
    let sequences = q_offsets.len() - 1;
    if sequences == 0 {
        return refuse("packed input must hold at least 1 sequence, got 0".into());
    }
    let shape = AttentionShape { batch: sequences, ..shape };
    let lengths = SequenceLengths::resolve(Some(&lengths), &shape)?;

    let (mut outputs, mut lses, mut reports) = (Vec::new(), Vec::new(), Vec::new());
    for (sequence, &(queries, keys)) in lengths.iter().enumerate() {
        let [k, v] = [&k, &v].map(|x| rows(x, kv_offsets[sequence], keys));
        let q = rows(&q, q_offsets[sequence], queries);
        let result = prism_attention(q, k, v, config, options)?;
        reports.push(result.report);
        if queries > 0 {
            outputs.push(result.output.swap_dims(1, 2));
            lses.extend(result.lse.map(|lse| lse.swap_dims(1, 2)));
        }
    }
    if outputs.is_empty() {
        let (device, AttentionShape { q_heads, head_dim, .. }) = (q.device(), shape);
        outputs.push(Tensor::zeros([1, 0, q_heads, head_dim], (&device, q.dtype())));
        lses.push(Tensor::zeros([1, 0, q_heads], (&device, DType::F32)));
    }
    let output = Tensor::cat(outputs, 1).squeeze_dim(0);
    let lse = options.lse.then(|| Tensor::cat(lses, 1).squeeze_dim(0));
    Ok(PackedOutput { output, lse, reports })
}

/// `[rows, heads, head_dim]` as `[1, heads, rows, head_dim]`, another view of the same.
fn batched(x: Tensor<3>) -> Tensor<4> {
    let [rows, heads, head_dim] = x.dims();
    if x.dims().contains(&0) {
        // In a shape to reshape to, Burn reads 0 as "unchanged".
        return Tensor::zeros([1, heads, rows, head_dim], (&x.device(), x.dtype()));
    }
    x.unsqueeze_dim::<4>(0).swap_dims(1, 2)
}

/// `len` rows of `[1, heads, rows, head_dim]`.
fn rows(x: &Tensor<4>, first: usize, len: usize) -> Tensor<4> {
    let [one, heads, _, head_dim] = x.dims();
    if len == 0 {
        return Tensor::zeros([one, heads, 0, head_dim], (&x.device(), x.dtype()));
    }
    x.clone().narrow(2, first, len)
}
