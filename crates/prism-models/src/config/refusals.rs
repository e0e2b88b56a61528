//! Settings of a `config.json` that would change what a model computes, and that no architecture
//! here has: refused by name unless they say that they are off.

use serde_json::Value;

use super::architecture::Architecture;
use super::fields::Fields;
use super::unsupported;
use crate::error::ConfigError;

/// Names, and the value besides null that leaves a model as it is.
const SETTINGS: [(&str, &str); 36] = [
    // Mixtures of experts.
    ("num_experts", "0"),
    ("num_local_experts", "0"),
    ("n_routed_experts", "0"),
    ("moe_intermediate_size", "0"),
    // Caps and factors on scores, logits and residuals.
    ("attn_logit_softcapping", "null"),
    ("final_logit_softcapping", "null"),
    ("logits_soft_cap", "null"),
    ("query_pre_attn_scalar", "null"),
    ("attention_multiplier", "null"),
    ("embedding_multiplier", "1"),
    ("residual_multiplier", "1"),
    ("logits_scaling", "1"),
    ("logit_scale", "1"),
    ("scale_emb", "1"),
    ("scale_depth", "null"),
    ("clip_qkv", "null"),
    // Other attention.
    ("attention_chunk_size", "null"),
    ("dual_chunk_attention_config", "null"),
    ("attn_temperature_tuning", "false"),
    ("no_rope_layers", "null"),
    ("no_rope_layer_interval", "null"),
    ("cross_attention_layers", "null"),
    ("add_cross_attention", "false"),
    ("is_encoder_decoder", "false"),
    ("use_qk_norm", "false"),
    ("qk_layernorm", "false"),
    ("use_mrope", "false"),
    ("rope_interleaved", "false"),
    ("rope_ratio", "1"),
    // Other layers and weights.
    ("mlp_bias", "false"),
    ("use_parallel_residual", "false"),
    ("quantization_config", "null"),
    ("compression_config", "null"),
    ("text_config", "null"),
    ("vision_config", "null"),
    ("audio_config", "null"),
];

/// Refuses whatever of a configuration isn't implemented.
pub(super) fn refuse(fields: Fields<'_>, architecture: Architecture) -> Result<(), ConfigError> {
    let activation = fields.find_str("hidden_act")?.unwrap_or("silu");
    if activation != "silu" {
        return Err(unsupported("hidden_act", activation, "silu"));
    }
    for (field, off) in SETTINGS {
        if let Some(got) = fields.find(field)
            && !is(got, off)
        {
            return Err(unsupported(field, got, off));
        }
    }
    refuse_windows(fields, architecture)
}

fn is(value: &Value, off: &str) -> bool {
    match value {
        Value::Bool(value) => value.to_string() == off,
        Value::Number(value) => off.parse().is_ok_and(|off: f64| value.as_f64() == Some(off)),
        _ => false,
    }
}

/// Refuses a sliding window in use. Files of Qwen name one that is switched off.
fn refuse_windows(fields: Fields<'_>, architecture: Architecture) -> Result<(), ConfigError> {
    let layers = fields.usize("num_hidden_layers")?;
    if let Some(kinds) = fields.find_list("layer_types")? {
        if let Some(got) = kinds.iter().find(|kind| kind.as_str() != Some(FULL)) {
            return Err(unsupported("layer_types", got, FULL));
        }
        if kinds.len() != layers {
            let got = format!("{} layers", kinds.len());
            return Err(unsupported("layer_types", got, "one for each of num_hidden_layers"));
        }
    }
    let window = fields.find("sliding_window");
    match architecture {
        Architecture::Llama => {}
        // Hugging Face's default is a window of 4096.
        Architecture::Mistral if fields.0.contains_key("sliding_window") => {}
        Architecture::Mistral => {
            return Err(unsupported("sliding_window", "absent, which means 4096", "null"));
        }
        Architecture::Qwen2 | Architecture::Qwen3 => {
            let used = fields.find_bool("use_sliding_window")?.unwrap_or(false);
            let first = fields.find_usize("max_window_layers")?.unwrap_or(28);
            let listed = fields.find("layer_types").is_some();
            if used && !listed && first < layers {
                return Err(unsupported("use_sliding_window", true, "false"));
            }
            return Ok(());
        }
    }
    match window {
        None => Ok(()),
        Some(got) => Err(unsupported("sliding_window", got, "null")),
    }
}

const FULL: &str = "full_attention";
