//! The sizes and settings of a model, from a Hugging Face `config.json` or from GGUF metadata.

mod architecture;
mod fields;
mod from_gguf;
mod hugging_face;
mod refusals;
mod rope;

use std::fmt::Display;
use std::ops::RangeInclusive;

use crate::error::ConfigError;
use prism_core::Rope;

pub(crate) use architecture::SUPPORTED as SUPPORTED_ARCHITECTURES;
pub use architecture::{Architecture, architecture_table};

/// Largest `config.json` that is read, in bytes.
pub const MAX_CONFIG_BYTES: u64 = 16 << 20;

// Bounds far above any real model: they stop absurd files before anything is sized by them, and
// their products cannot overflow a 64-bit size.
const MAX_HIDDEN: usize = 1 << 17;
const MAX_INTERMEDIATE: usize = 1 << 20;
const MAX_LAYERS: usize = 1024;
const MAX_HEADS: usize = 1024;
const MAX_HEAD_DIM: usize = 1024;
const MAX_VOCAB: usize = 1 << 22;
const MAX_POSITIONS: usize = 1 << 27;

/// Sizes and settings of a decoder-only transformer of the Llama kind.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// The family.
    pub architecture: Architecture,
    /// Channels of the residual stream.
    pub hidden_size: usize,
    /// Channels inside the feed-forward network.
    pub intermediate_size: usize,
    /// Number of decoder layers.
    pub layers: usize,
    /// Query heads of a layer; a multiple of `kv_heads`.
    pub q_heads: usize,
    /// Key and value heads of a layer.
    pub kv_heads: usize,
    /// Channels of a head; even.
    pub head_dim: usize,
    /// Rows of the embedding table.
    pub vocab_size: usize,
    /// Term that keeps RMS normalisation from dividing by zero.
    pub rms_eps: f64,
    /// Rotary position embedding.
    pub rope: Rope,
    /// Whether the output projection is the embedding table.
    pub tie_embeddings: bool,
    /// Longest sequence, in tokens.
    pub max_positions: usize,
    /// Ids that begin a text; possibly none.
    pub bos_ids: Vec<u32>,
    /// Ids that end generation; possibly none.
    pub eos_ids: Vec<u32>,
    /// Whether the projections to queries, keys and values add a bias.
    pub qkv_bias: bool,
    /// Whether the output projection of attention adds a bias.
    pub output_bias: bool,
    /// Whether queries and keys are normalised head by head.
    pub qk_norm: bool,
}

impl ModelConfig {
    /// Refuses sizes that are out of range or do not fit together.
    fn validated(self) -> Result<Self, ConfigError> {
        within("hidden_size", self.hidden_size, 1..=MAX_HIDDEN)?;
        within("intermediate_size", self.intermediate_size, 1..=MAX_INTERMEDIATE)?;
        within("num_hidden_layers", self.layers, 1..=MAX_LAYERS)?;
        within("num_attention_heads", self.q_heads, 1..=MAX_HEADS)?;
        within("num_key_value_heads", self.kv_heads, 1..=MAX_HEADS)?;
        divides("num_attention_heads", self.q_heads, "num_key_value_heads", self.kv_heads)?;
        within("head_dim", self.head_dim, 1..=MAX_HEAD_DIM)?;
        if !self.head_dim.is_multiple_of(2) {
            return Err(ConfigError::OddHeadDim { got: self.head_dim });
        }
        within("vocab_size", self.vocab_size, 1..=MAX_VOCAB)?;
        within("max_position_embeddings", self.max_positions, 1..=MAX_POSITIONS)?;
        positive("rms_norm_eps", self.rms_eps)?;
        positive("rope_theta", self.rope.theta)?;
        for &id in self.bos_ids.iter().chain(&self.eos_ids) {
            within("special token id", id as usize, 0..=self.vocab_size - 1)?;
        }
        Ok(self)
    }
}

/// The head dimension where the file gives none: the hidden channels shared out over the heads.
fn derived_head_dim(hidden_size: usize, q_heads: usize) -> Result<usize, ConfigError> {
    within("num_attention_heads", q_heads, 1..=MAX_HEADS)?;
    divides("hidden_size", hidden_size, "num_attention_heads", q_heads)?;
    Ok(hidden_size / q_heads)
}

fn within(field: &str, got: usize, allowed: RangeInclusive<usize>) -> Result<(), ConfigError> {
    if allowed.contains(&got) {
        return Ok(());
    }
    Err(out_of_range(field, format!("{} to {}", allowed.start(), allowed.end()), got))
}

fn divides(
    field: &'static str,
    got: usize,
    divisor_field: &'static str,
    divisor: usize,
) -> Result<(), ConfigError> {
    if got.is_multiple_of(divisor) {
        return Ok(());
    }
    Err(ConfigError::NotDivisible { field, got, divisor_field, divisor })
}

fn positive(field: &str, got: f64) -> Result<f64, ConfigError> {
    if got.is_finite() && got > 0.0 {
        return Ok(got);
    }
    Err(out_of_range(field, "finite and above 0", got))
}

/// Checks the ratio of a stretched to the original context.
fn stretch_factor(field: &str, got: f64) -> Result<f64, ConfigError> {
    if got.is_finite() && got >= 1.0 {
        return Ok(got);
    }
    Err(out_of_range(field, "finite and at least 1", got))
}

fn unsupported(field: &'static str, got: impl ToString, supported: &'static str) -> ConfigError {
    ConfigError::Unsupported { field, got: got.to_string(), supported }
}

fn out_of_range(field: &str, allowed: impl Into<String>, got: impl Display) -> ConfigError {
    ConfigError::OutOfRange { field: field.into(), allowed: allowed.into(), got: got.to_string() }
}
