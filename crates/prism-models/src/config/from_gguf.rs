//! Reading the configuration from GGUF metadata.

use super::{
    MAX_POSITIONS, ModelConfig, derived_head_dim, out_of_range, positive, stretch_factor, within,
};
use crate::error::ConfigError;
use crate::gguf::Metadata;
use prism_core::{Rope, RopeScaling};

impl ModelConfig {
    /// Reads the metadata of a GGUF file of the architecture `llama`.
    ///
    /// `has_tensor` tells whether the file has a tensor: without `output.weight` the embeddings
    /// are tied, with `blk.0.attn_q.bias` attention has biases. The frequency factors of Llama 3,
    /// which GGUF stores as a tensor, are not looked at here.
    ///
    /// # Errors
    ///
    /// A value is missing, has another type or is out of range, or the model needs something that
    /// is not implemented.
    pub fn from_gguf(
        metadata: &Metadata,
        has_tensor: impl Fn(&str) -> bool,
    ) -> Result<Self, ConfigError> {
        let architecture = metadata.get_str("general.architecture")?;
        if architecture != "llama" {
            return Err(ConfigError::UnsupportedArchitecture { got: architecture.into() });
        }
        let experts = metadata.find_usize("llama.expert_count")?.unwrap_or(0);
        if experts > 0 {
            let (field, got) = ("llama.expert_count", experts.to_string());
            return Err(ConfigError::Unsupported { field, got, supported: "0" });
        }

        let hidden_size = metadata.get_usize("llama.embedding_length")?;
        let q_heads = metadata.get_usize("llama.attention.head_count")?;
        let head_dim = head_dim(metadata, hidden_size, q_heads)?;
        let max_positions = metadata.get_usize("llama.context_length")?;
        let kv_heads = metadata.find_usize("llama.attention.head_count_kv")?.unwrap_or(q_heads);
        let vocab_size = match metadata.find_usize("llama.vocab_size")? {
            Some(size) => size,
            None => metadata.get_str_array("tokenizer.ggml.tokens")?.len(),
        };
        Self {
            hidden_size,
            intermediate_size: metadata.get_usize("llama.feed_forward_length")?,
            layers: metadata.get_usize("llama.block_count")?,
            q_heads,
            kv_heads,
            head_dim,
            vocab_size,
            rms_eps: metadata.get_f64("llama.attention.layer_norm_rms_epsilon")?,
            rope: Rope {
                scaling: rope_scaling(metadata, max_positions)?,
                ..Rope::new(metadata.find_f64("llama.rope.freq_base")?.unwrap_or(10_000.0))
            },
            tie_embeddings: !has_tensor("output.weight"),
            max_positions,
            bos_ids: token_ids(metadata, &["tokenizer.ggml.bos_token_id"])?,
            eos_ids: token_ids(
                metadata,
                &["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"],
            )?,
            attention_bias: has_tensor("blk.0.attn_q.bias"),
            qk_norm: false,
        }
        .validated()
    }
}

fn head_dim(metadata: &Metadata, hidden_size: usize, q_heads: usize) -> Result<usize, ConfigError> {
    let head_dim = match metadata.find_usize("llama.attention.key_length")? {
        Some(head_dim) => head_dim,
        None => derived_head_dim(hidden_size, q_heads)?,
    };
    // Values of another size than keys, or heads that rotate only in part, are other models.
    for field in ["llama.attention.value_length", "llama.rope.dimension_count"] {
        if let Some(got) = metadata.find_usize(field)?
            && got != head_dim
        {
            return Err(out_of_range(field, format!("the head dimension, {head_dim}"), got));
        }
    }
    Ok(head_dim)
}

fn rope_scaling(metadata: &Metadata, max_positions: usize) -> Result<RopeScaling, ConfigError> {
    let kind = metadata.find_str("llama.rope.scaling.type")?.unwrap_or("none");
    let factor = || {
        let field = "llama.rope.scaling.factor";
        stretch_factor(field, metadata.get_f64(field)?)
    };
    let number = |field: &str, default| match metadata.find_f64(field)? {
        Some(got) => positive(field, got),
        None => Ok(default),
    };
    match kind {
        "none" => Ok(RopeScaling::None),
        "linear" => Ok(RopeScaling::Linear { factor: factor()? }),
        "yarn" => {
            let factor = factor()?;
            let field = "llama.rope.scaling.original_context_length";
            let original = metadata.find_usize(field)?.unwrap_or(max_positions);
            within(field, original, 1..=MAX_POSITIONS)?;
            // The file's factor multiplies the usual one instead of replacing it.
            let relative = number("llama.rope.scaling.attn_factor", 1.0)?;
            let attention_factor = relative * (0.1 * factor.ln() + 1.0);
            Ok(RopeScaling::Yarn {
                factor,
                beta_fast: number("llama.rope.scaling.yarn_beta_fast", 32.0)?,
                beta_slow: number("llama.rope.scaling.yarn_beta_slow", 1.0)?,
                original_max_positions: original,
                attention_factor: (relative != 1.0).then_some(attention_factor),
            })
        }
        other => Err(ConfigError::UnsupportedRope { got: other.into() }),
    }
}

fn token_ids(metadata: &Metadata, keys: &[&str]) -> Result<Vec<u32>, ConfigError> {
    let mut ids = Vec::new();
    for key in keys {
        if let Some(id) = metadata.find_u32(key)?
            && !ids.contains(&id)
        {
            ids.push(id);
        }
    }
    Ok(ids)
}
