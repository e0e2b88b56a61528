//! Sizes of known models, as their makers' `config.json` files state them: for measurements and plans that need
//! no weights.

use crate::config::ModelConfig;
use crate::error::ConfigError;

/// A model's name and its `config.json`, as far as it says something of the sizes.
const SHAPES: [(&str, &str); 5] = [
    (
        "llama-3.1-8b",
        r#"{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256,
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "hidden_act": "silu",
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072, "tie_word_embeddings": false, "bos_token_id": 128000,
        "eos_token_id": 128001, "rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", "factor": 8.0,
        "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}}"#,
    ),
    (
        "llama-3.2-1b",
        r#"{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256,
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "hidden_act": "silu",
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072, "tie_word_embeddings": true, "bos_token_id": 128000,
        "eos_token_id": 128001, "rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", "factor": 32.0,
        "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}}"#,
    ),
    (
        "qwen3-8b",
        r#"{"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 151936,
        "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "hidden_act": "silu",
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-6,
        "max_position_embeddings": 40960, "tie_word_embeddings": false, "attention_bias": false,
        "bos_token_id": 151643, "eos_token_id": 151645, "rope_theta": 1000000.0}"#,
    ),
    (
        "qwen2.5-7b",
        r#"{"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 152064,
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "hidden_act": "silu",
        "num_attention_heads": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-6,
        "max_position_embeddings": 131072, "tie_word_embeddings": false, "use_sliding_window": false,
        "bos_token_id": 151643, "eos_token_id": 151643, "rope_theta": 1000000.0}"#,
    ),
    (
        "smollm2-135m",
        r#"{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 49152,
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "hidden_act": "silu",
        "num_attention_heads": 9, "num_key_value_heads": 3, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192, "tie_word_embeddings": true, "bos_token_id": 1, "eos_token_id": 2,
        "rope_theta": 100000.0}"#,
    ),
];

/// The names that [`shape`] knows.
pub fn names() -> impl Iterator<Item = &'static str> {
    SHAPES.iter().map(|(name, _)| *name)
}

/// The config of a known model, such as `llama-3.1-8b`.
///
/// # Errors
/// A name that isn't among [`names`].
pub fn shape(name: &str) -> Result<ModelConfig, ConfigError> {
    match SHAPES.iter().find(|(known, _)| *known == name) {
        Some((_, json)) => ModelConfig::from_hugging_face(json.as_bytes()),
        None => {
            let known = names().collect::<Vec<_>>().join(", ");
            Err(ConfigError::UnknownShape { name: name.into(), known })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_shape_is_a_model_and_others_are_refused() {
        for name in names() {
            assert!(shape(name).unwrap().layers > 0, "{name}");
        }
        let error = shape("gpt-2").unwrap_err().to_string();
        assert!(error.contains("\"gpt-2\"") && error.contains("llama-3.1-8b"), "{error}");
    }
}
