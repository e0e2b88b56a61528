//! Parsing `config.json`.

use serde_json::Value;

use super::architecture::Architecture;
use super::fields::{self, Fields};
use super::{ModelConfig, derived_head_dim, refusals, rope, unsupported};
use crate::error::ConfigError;

impl ModelConfig {
    /// Parses a Hugging Face `config.json`. Its `architectures` alone decide the architecture.
    ///
    /// # Errors
    ///
    /// The text is not a JSON object, a field is missing or out of range, or the model needs
    /// something that is not implemented, down to settings that would be without effect.
    pub fn from_hugging_face(json: &[u8]) -> Result<Self, ConfigError> {
        let object = fields::parse(json)?;
        let fields = Fields(&object);
        let architecture = architecture(fields)?;
        refusals::refuse(fields, architecture)?;

        let hidden_size = fields.usize("hidden_size")?;
        let q_heads = fields.usize("num_attention_heads")?;
        let head_dim = match (fields.find_usize("head_dim")?, architecture) {
            (Some(head_dim), _) => head_dim,
            // Hugging Face has a default here that follows from no size of the model.
            (None, Architecture::Qwen3) => return Err(ConfigError::Missing { field: "head_dim" }),
            (None, _) => derived_head_dim(hidden_size, q_heads)?,
        };
        let kv_heads = match (fields.find_usize("num_key_value_heads")?, architecture) {
            (Some(kv_heads), _) => kv_heads,
            (None, Architecture::Llama) => q_heads,
            (None, _) => return Err(ConfigError::Missing { field: "num_key_value_heads" }),
        };
        let max_positions = fields.usize("max_position_embeddings")?;
        let [qkv_bias, output_bias] = biases(fields, architecture)?;
        Self {
            architecture,
            hidden_size,
            intermediate_size: fields.usize("intermediate_size")?,
            layers: fields.usize("num_hidden_layers")?,
            q_heads,
            kv_heads,
            head_dim,
            vocab_size: fields.usize("vocab_size")?,
            rms_eps: fields.f64("rms_norm_eps")?,
            rope: rope::rope(fields, max_positions)?,
            tie_embeddings: fields.find_bool("tie_word_embeddings")?.unwrap_or(false),
            max_positions,
            bos_ids: fields.token_ids("bos_token_id")?,
            eos_ids: fields.token_ids("eos_token_id")?,
            qkv_bias,
            output_bias,
            qk_norm: architecture.has_qk_norm(),
        }
        .validated()
    }

    /// Adds the end ids of a `generation_config.json`, which for chat models are often more than
    /// those of `config.json`.
    ///
    /// # Errors
    ///
    /// The text is not a JSON object, or its `eos_token_id` is not a valid id or list of ids.
    pub fn with_generation_config(mut self, json: &[u8]) -> Result<Self, ConfigError> {
        for id in Fields(&fields::parse(json)?).token_ids("eos_token_id")? {
            if !self.eos_ids.contains(&id) {
                self.eos_ids.push(id);
            }
        }
        self.validated()
    }
}

fn architecture(fields: Fields<'_>) -> Result<Architecture, ConfigError> {
    let Some(Value::Array(classes)) = fields.find("architectures") else {
        return Err(ConfigError::Missing { field: "architectures" });
    };
    let one = match &classes[..] {
        [Value::String(name)] => Architecture::from_class(name),
        _ => None,
    };
    let Some(architecture) = one else {
        let names = classes.iter().map(|name| match name {
            Value::String(name) => name.clone(),
            other => other.to_string(),
        });
        let got = names.collect::<Vec<_>>().join(", ");
        return Err(ConfigError::UnsupportedArchitecture { got });
    };
    match fields.find_str("model_type")? {
        Some(got) if got != architecture.model_type() => {
            Err(unsupported("model_type", got, architecture.model_type()))
        }
        _ => Ok(architecture),
    }
}

/// Whether the projections to queries, keys and values have biases, and whether the output has one.
fn biases(fields: Fields<'_>, architecture: Architecture) -> Result<[bool; 2], ConfigError> {
    let given = fields.find_bool("attention_bias")?;
    let fixed = match architecture {
        Architecture::Llama | Architecture::Qwen3 => return Ok([given.unwrap_or(false); 2]),
        Architecture::Mistral => false,
        Architecture::Qwen2 => true,
    };
    match given {
        Some(got) if got != fixed => {
            Err(unsupported("attention_bias", got, if fixed { "true" } else { "false" }))
        }
        _ => Ok([fixed, false]),
    }
}

#[cfg(test)]
mod tests {
    use prism_core::{Rope, RopeScaling};
    use serde_json::json;

    use super::*;

    /// A valid configuration with some fields replaced; null removes a field.
    fn parse(changes: Value) -> Result<ModelConfig, ConfigError> {
        let mut config = json!({
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 100,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 256,
        });
        for (field, value) in changes.as_object().unwrap() {
            config[field] = value.clone();
        }
        ModelConfig::from_hugging_face(config.to_string().as_bytes())
    }

    #[test]
    fn do_absent_fields_take_the_defaults_of_hugging_face() {
        let config = parse(json!({ "num_key_value_heads": null })).unwrap();
        let expected = ModelConfig {
            architecture: Architecture::Llama,
            hidden_size: 64,
            intermediate_size: 96,
            layers: 2,
            q_heads: 4,
            kv_heads: 4,
            head_dim: 16,
            vocab_size: 100,
            rms_eps: 1e-5,
            rope: Rope::new(10_000.0),
            tie_embeddings: false,
            max_positions: 256,
            bos_ids: vec![],
            eos_ids: vec![],
            qkv_bias: false,
            output_bias: false,
            qk_norm: false,
        };
        assert_eq!(config, expected);
    }

    #[test]
    fn may_the_head_dim_be_explicit_and_the_end_ids_a_list() {
        let config = parse(json!({
            "head_dim": 32, "eos_token_id": [2, 7], "bos_token_id": 1, "tie_word_embeddings": true
        }))
        .unwrap();
        assert_eq!((config.head_dim, config.rope.rotary_dim), (32, None));
        assert_eq!((config.bos_ids, config.eos_ids), (vec![1], vec![2, 7]));
        assert!(config.tie_embeddings);
    }

    #[test]
    fn does_the_generation_config_add_end_ids() {
        let config = parse(json!({ "eos_token_id": 2 })).unwrap();
        let config = config.with_generation_config(br#"{"eos_token_id": [2, 9]}"#).unwrap();
        assert_eq!(config.eos_ids, [2, 9]);
        assert!(config.with_generation_config(br#"{"eos_token_id": 100}"#).is_err());
    }

    #[test]
    fn do_both_styles_of_rope_parse_alike() {
        let scaling = json!({
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64
        });
        let mut parameters = scaling.clone();
        parameters["rope_theta"] = json!(5e5);
        let old = parse(json!({ "rope_theta": 5e5, "rope_scaling": scaling })).unwrap();
        let new = parse(json!({ "rope_parameters": parameters })).unwrap();
        assert_eq!(old, new);
        assert_eq!(old.rope.theta, 5e5);
        let expected = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_positions: 64,
        };
        assert_eq!(old.rope.scaling, expected);
    }

    #[test]
    fn do_linear_and_yarn_parse() {
        let linear = parse(json!({ "rope_scaling": { "type": "linear", "factor": 2 } })).unwrap();
        assert_eq!(linear.rope.scaling, RopeScaling::Linear { factor: 2.0 });
        let yarn = parse(json!({ "rope_scaling": { "type": "yarn", "factor": 4.0 } })).unwrap();
        let expected = RopeScaling::Yarn {
            factor: 4.0,
            beta_fast: 32.0,
            beta_slow: 1.0,
            original_max_positions: 256,
            attention_factor: None,
        };
        assert_eq!(yarn.rope.scaling, expected);
    }

    #[test]
    fn does_dynamic_scaling_start_at_the_models_own_context() {
        let dynamic = json!({ "rope_scaling": { "type": "dynamic", "factor": 2.0 } });
        let expected =
            RopeScaling::Dynamic { factor: 2.0, original_max_positions: 256, length: 256 };
        assert_eq!(parse(dynamic).unwrap().rope.scaling, expected);
    }

    #[test]
    fn does_the_attention_factor_come_from_the_file_or_its_temperatures() {
        let factor = |more: Value| {
            let mut scaling = json!({ "type": "yarn", "factor": 4.0 });
            for (field, value) in more.as_object().unwrap() {
                scaling[field] = value.clone();
            }
            parse(json!({ "rope_scaling": scaling })).map(|config| config.rope.attention_factor())
        };
        assert!((factor(json!({})).unwrap() - 1.138_629).abs() < 1e-6);
        assert_eq!(factor(json!({ "attention_factor": 1.5 })).unwrap(), 1.5);
        assert_eq!(factor(json!({ "mscale": 0.7, "mscale_all_dim": 0.7 })).unwrap(), 1.0);
        let two = factor(json!({ "mscale": 1.0, "mscale_all_dim": 0.5 })).unwrap();
        assert!((two - 1.138_629 / 1.069_315).abs() < 1e-6, "{two}");
    }

    #[test]
    fn do_the_architectures_differ_in_biases_and_norms() {
        let traits = |changes| {
            let config = parse(changes).unwrap();
            (config.architecture, config.qkv_bias, config.output_bias, config.qk_norm)
        };
        let of = |name: &str| json!({ "architectures": [name], "head_dim": 16 });
        let with = |name: &str, field: &str, value: Value| {
            let mut changes = of(name);
            changes[field] = value;
            changes
        };
        use Architecture::{Llama, Mistral, Qwen2, Qwen3};
        assert_eq!(traits(of("LlamaForCausalLM")), (Llama, false, false, false));
        let biased = with("LlamaForCausalLM", "attention_bias", json!(true));
        assert_eq!(traits(biased), (Llama, true, true, false));
        let mistral = with("MistralForCausalLM", "sliding_window", Value::Null);
        assert_eq!(traits(mistral), (Mistral, false, false, false));
        assert_eq!(traits(of("Qwen2ForCausalLM")), (Qwen2, true, false, false));
        assert_eq!(traits(of("Qwen3ForCausalLM")), (Qwen3, false, false, true));
    }
}
