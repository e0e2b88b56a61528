//! Reading the configuration from GGUF metadata.

use super::{
    Architecture, MAX_POSITIONS, ModelConfig, derived_head_dim, out_of_range, positive,
    stretch_factor, within,
};
use crate::error::ConfigError;
use crate::gguf::{Metadata, MetadataError};
use prism_core::{Rope, RopeScaling};

/// Settings that change what a model computes and that nothing here does; each is harmless at the
/// value given. The names follow the architecture's prefix.
const REFUSED: [(&str, f64, &str); 7] = [
    ("expert_count", 0.0, "0"),
    ("attention.sliding_window", 0.0, "0"),
    ("attn_logit_softcapping", 0.0, "0"),
    ("final_logit_softcapping", 0.0, "0"),
    ("logit_scale", 1.0, "1"),
    ("residual_scale", 1.0, "1"),
    ("embedding_scale", 1.0, "1"),
];

impl ModelConfig {
    /// Reads the metadata of a GGUF file of the architecture `llama`, `qwen2` or `qwen3`.
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
        let name = metadata.get_str("general.architecture")?;
        let Some(architecture) = Architecture::from_gguf(name) else {
            return Err(ConfigError::UnsupportedArchitecture { got: name.into() });
        };
        let keys = Keys { metadata, prefix: name };
        for (name, neutral, supported) in REFUSED {
            let got = keys.find_f64(name)?.unwrap_or(neutral);
            if got != neutral {
                let (field, got) = (keys.key(name), got.to_string());
                return Err(ConfigError::UnsupportedMetadata { field, got, supported });
            }
        }

        let hidden_size = keys.get_usize("embedding_length")?;
        let q_heads = keys.get_usize("attention.head_count")?;
        let head_dim = head_dim(&keys, hidden_size, q_heads)?;
        let max_positions = keys.get_usize("context_length")?;
        let kv_heads = keys.find_usize("attention.head_count_kv")?.unwrap_or(q_heads);
        let vocab_size = match keys.find_usize("vocab_size")? {
            Some(size) => size,
            None => metadata.get_str_array("tokenizer.ggml.tokens")?.len(),
        };
        Self {
            architecture,
            hidden_size,
            intermediate_size: keys.get_usize("feed_forward_length")?,
            layers: keys.get_usize("block_count")?,
            q_heads,
            kv_heads,
            head_dim,
            vocab_size,
            rms_eps: keys.get_f64("attention.layer_norm_rms_epsilon")?,
            rope: Rope {
                scaling: rope_scaling(&keys, max_positions)?,
                ..Rope::new(keys.find_f64("rope.freq_base")?.unwrap_or(10_000.0))
            },
            tie_embeddings: !has_tensor("output.weight"),
            max_positions,
            bos_ids: token_ids(metadata, &["tokenizer.ggml.bos_token_id"])?,
            eos_ids: token_ids(
                metadata,
                &["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"],
            )?,
            qkv_bias: has_tensor("blk.0.attn_q.bias"),
            output_bias: has_tensor("blk.0.attn_output.bias"),
            qk_norm: architecture.has_qk_norm(),
        }
        .validated()
    }
}

/// The metadata of the architecture, whose keys all begin with its name.
struct Keys<'a> {
    metadata: &'a Metadata,
    prefix: &'a str,
}

impl<'a> Keys<'a> {
    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.prefix)
    }

    fn get_usize(&self, name: &str) -> Result<usize, MetadataError> {
        self.metadata.get_usize(&self.key(name))
    }

    fn find_usize(&self, name: &str) -> Result<Option<usize>, MetadataError> {
        self.metadata.find_usize(&self.key(name))
    }

    fn get_f64(&self, name: &str) -> Result<f64, MetadataError> {
        self.metadata.get_f64(&self.key(name))
    }

    fn find_f64(&self, name: &str) -> Result<Option<f64>, MetadataError> {
        self.metadata.find_f64(&self.key(name))
    }

    fn find_str(&self, name: &str) -> Result<Option<&'a str>, MetadataError> {
        self.metadata.find_str(&self.key(name))
    }
}

fn head_dim(keys: &Keys<'_>, hidden_size: usize, q_heads: usize) -> Result<usize, ConfigError> {
    let head_dim = match keys.find_usize("attention.key_length")? {
        Some(head_dim) => head_dim,
        None => derived_head_dim(hidden_size, q_heads)?,
    };
    // Values of another size than keys, or heads that rotate only in part, are other models.
    for name in ["attention.value_length", "rope.dimension_count"] {
        if let Some(got) = keys.find_usize(name)?
            && got != head_dim
        {
            let allowed = format!("the head dimension, {head_dim}");
            return Err(out_of_range(&keys.key(name), allowed, got));
        }
    }
    Ok(head_dim)
}

fn rope_scaling(keys: &Keys<'_>, max_positions: usize) -> Result<RopeScaling, ConfigError> {
    let kind = keys.find_str("rope.scaling.type")?.unwrap_or("none");
    let factor = || {
        let name = "rope.scaling.factor";
        stretch_factor(&keys.key(name), keys.get_f64(name)?)
    };
    let number = |name: &str, default| match keys.find_f64(name)? {
        Some(got) => positive(&keys.key(name), got),
        None => Ok(default),
    };
    match kind {
        "none" => Ok(RopeScaling::None),
        "linear" => Ok(RopeScaling::Linear { factor: factor()? }),
        "yarn" => {
            let factor = factor()?;
            let name = "rope.scaling.original_context_length";
            let original = keys.find_usize(name)?.unwrap_or(max_positions);
            within(&keys.key(name), original, 1..=MAX_POSITIONS)?;
            // The file's factor multiplies the usual one instead of replacing it.
            let relative = number("rope.scaling.attn_factor", 1.0)?;
            let attention_factor = relative * (0.1 * factor.ln() + 1.0);
            Ok(RopeScaling::Yarn {
                factor,
                beta_fast: number("rope.scaling.yarn_beta_fast", 32.0)?,
                beta_slow: number("rope.scaling.yarn_beta_slow", 1.0)?,
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
