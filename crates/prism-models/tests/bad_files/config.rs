//! Malformed and unsupported configurations.

use prism_models::{Checkpoint, ConfigError, LoadError, ModelConfig};
use serde_json::{Value, json};

use crate::support::safetensors;

/// A valid configuration with some fields replaced; null counts as absent.
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

fn refusal(changes: Value) -> ConfigError {
    parse(changes).unwrap_err()
}

#[test]
fn is_text_that_is_no_json_object_refused() {
    for text in ["", "{", "\"\\ud800\"", "{\"a\":NaN}", "\0"] {
        let error = ModelConfig::from_hugging_face(text.as_bytes()).unwrap_err();
        assert!(matches!(error, ConfigError::Json(_)), "{text}");
    }
    let error = ModelConfig::from_hugging_face(b"[]").unwrap_err();
    assert!(matches!(error, ConfigError::NotAnObject));
}

#[test]
fn is_every_missing_field_named() {
    for field in [
        "architectures",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "vocab_size",
        "rms_norm_eps",
        "max_position_embeddings",
    ] {
        let error = refusal(json!({ field: null }));
        assert!(matches!(error, ConfigError::Missing { field: got } if got == field));
    }
}

#[test]
fn are_zeros_negatives_and_absurd_sizes_refused() {
    for field in [
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "vocab_size",
        "max_position_embeddings",
    ] {
        for value in [json!(0), json!(-1), json!(1e18), json!(1_000_000_000_000_000_000u64)] {
            let error = refusal(json!({ field: value }));
            let sizes = matches!(error, ConfigError::OutOfRange { .. });
            // An absurd size may first fail to divide another.
            assert!(sizes || matches!(error, ConfigError::NotDivisible { .. }), "{error}");
        }
    }
    let error = refusal(json!({ "num_hidden_layers": 1e18 }));
    let message = "field `num_hidden_layers` is 1e+18; it must be a non-negative 64-bit integer";
    assert_eq!(error.to_string(), message);
    let error = refusal(json!({ "num_hidden_layers": 5000 }));
    assert_eq!(error.to_string(), "field `num_hidden_layers` is 5000; it must be 1 to 1024");
}

#[test]
fn are_values_of_another_type_refused() {
    for changes in [
        json!({ "hidden_size": "64" }),
        json!({ "rms_norm_eps": [] }),
        json!({ "tie_word_embeddings": 1 }),
        json!({ "rope_scaling": "linear" }),
        json!({ "eos_token_id": "</s>" }),
        json!({ "hidden_act": 1 }),
    ] {
        assert!(matches!(refusal(changes), ConfigError::WrongType { .. }));
    }
}

#[test]
fn are_heads_that_do_not_divide_refused() {
    let error = refusal(json!({ "num_key_value_heads": 3 }));
    assert!(matches!(error, ConfigError::NotDivisible { got: 4, divisor: 3, .. }));
    let error = refusal(json!({ "hidden_size": 66 }));
    assert!(matches!(error, ConfigError::NotDivisible { got: 66, divisor: 4, .. }));
    let error = refusal(json!({ "num_key_value_heads": 8 }));
    assert!(matches!(error, ConfigError::NotDivisible { .. }));
}

#[test]
fn is_an_odd_head_dim_refused() {
    assert!(matches!(refusal(json!({ "head_dim": 15 })), ConfigError::OddHeadDim { got: 15 }));
}

#[test]
fn is_another_architecture_named() {
    for name in ["Gemma2ForCausalLM", "Qwen3MoeForCausalLM", "LlamaModel"] {
        let error = refusal(json!({ "architectures": [name] }));
        let supported = "llama, mistral, qwen2, qwen3";
        let message = format!("architecture {name} is not supported; supported: {supported}");
        assert!(matches!(&error, ConfigError::UnsupportedArchitecture { .. }));
        assert_eq!(error.to_string(), message);
    }
    for classes in [json!([]), json!([1]), json!(["LlamaForCausalLM", "LlamaForCausalLM"])] {
        let error = refusal(json!({ "architectures": classes }));
        assert!(matches!(error, ConfigError::UnsupportedArchitecture { .. }));
    }
    let error = refusal(json!({ "model_type": "mistral" }));
    let message = "`model_type` = mistral is not supported; supported: llama";
    assert_eq!(error.to_string(), message);
}

#[test]
fn are_unknown_rope_types_refused() {
    for changes in [
        json!({ "rope_scaling": { "rope_type": "longrope", "factor": 2.0 } }),
        json!({ "rope_scaling": { "type": "mrope", "mrope_section": [1] } }),
        json!({ "rope_parameters": { "rope_type": "su", "rope_theta": 1e4 } }),
    ] {
        assert!(matches!(refusal(changes), ConfigError::UnsupportedRope { .. }));
    }
}

#[test]
fn are_rope_settings_without_effect_refused() {
    let old = |scaling: Value| json!({ "rope_scaling": scaling });
    for (changes, name) in [
        (old(json!({ "type": "default", "factor": 2.0 })), "factor"),
        (old(json!({ "factor": 2.0 })), "factor"),
        (old(json!({ "type": "linear", "factor": 2.0, "beta_fast": 32 })), "beta_fast"),
        (old(json!({ "type": "yarn", "factor": 2.0, "long_factor": [1.0] })), "long_factor"),
        (json!({ "rope_parameters": { "full_attention": {} } }), "full_attention"),
    ] {
        let error = refusal(changes);
        assert!(matches!(&error, ConfigError::RopeSetting { field, .. } if field == name));
        assert!(error.to_string().contains("without effect"), "{error}");
    }
    let yarn = |name: &str, value: f64| {
        let mut scaling = json!({ "type": "yarn", "factor": 2.0, "attention_factor": 1.1 });
        scaling[name] = value.into();
        scaling
    };
    for (changes, name) in [
        (old(yarn("mscale", 0.7)), "mscale"),
        (old(yarn("mscale_all_dim", 0.7)), "mscale_all_dim"),
        (old(json!({ "type": "yarn", "factor": 2.0, "mscale": 0.7 })), "mscale"),
        (old(json!({ "type": "yarn", "factor": 2.0, "truncate": false })), "truncate"),
        (old(json!({ "type": "linear", "rope_type": "yarn", "factor": 2.0 })), "type"),
        (
            json!({ "rope_parameters": { "rope_theta": 1e4 }, "rope_scaling": { "factor": 2.0 } }),
            "rope_scaling",
        ),
    ] {
        let error = refusal(changes);
        assert!(matches!(&error, ConfigError::Unsupported { field, .. } if *field == name));
    }
    let two = json!({ "rope_theta": 1e4, "rope_parameters": { "rope_theta": 1e6 } });
    assert!(matches!(refusal(two), ConfigError::OutOfRange { .. }));
    let dynamic = json!({ "type": "dynamic", "factor": 2, "original_max_position_embeddings": 64 });
    let error = refusal(old(dynamic));
    let message = "field `original_max_position_embeddings` is 64; \
                   it must be max_position_embeddings, 256";
    assert_eq!(error.to_string(), message);
}

#[test]
fn is_a_sliding_window_refused_only_where_it_is_in_use() {
    let of = |class: &str, more: Value| {
        let mut changes = json!({ "architectures": [class], "head_dim": 16 });
        for (field, value) in more.as_object().unwrap() {
            changes[field] = value.clone();
        }
        parse(changes)
    };
    let qwen = |more| of("Qwen2ForCausalLM", more);
    assert!(qwen(json!({ "sliding_window": 128, "use_sliding_window": false })).is_ok());
    // The window begins above the last of the two layers.
    let above = json!({ "sliding_window": 8, "use_sliding_window": true, "max_window_layers": 2 });
    assert!(qwen(above).is_ok());
    let full = json!({ "layer_types": ["full_attention", "full_attention"] });
    assert!(qwen(full).is_ok());
    let mistral = |more| of("MistralForCausalLM", more);
    assert!(mistral(json!({ "sliding_window": null })).is_ok());
    for (config, name) in [
        (qwen(json!({ "use_sliding_window": true, "max_window_layers": 1 })), "use_sliding_window"),
        (qwen(json!({ "layer_types": ["full_attention", "sliding_attention"] })), "layer_types"),
        (qwen(json!({ "layer_types": ["full_attention"] })), "layer_types"),
        (mistral(json!({ "sliding_window": 4096 })), "sliding_window"),
        (mistral(json!({})), "sliding_window"),
        (of("LlamaForCausalLM", json!({ "sliding_window": 4096 })), "sliding_window"),
    ] {
        let error = config.unwrap_err();
        assert!(matches!(error, ConfigError::Unsupported { field, .. } if field == name));
    }
}

#[test]
fn are_sizes_that_follow_from_no_other_asked_for() {
    let qwen3 = json!({ "architectures": ["Qwen3ForCausalLM"] });
    assert!(matches!(refusal(qwen3), ConfigError::Missing { field: "head_dim" }));
    let qwen2 = json!({ "architectures": ["Qwen2ForCausalLM"], "num_key_value_heads": null });
    assert!(matches!(refusal(qwen2), ConfigError::Missing { field: "num_key_value_heads" }));
}

#[test]
fn are_biases_that_an_architecture_lacks_refused() {
    for (class, bias) in [("MistralForCausalLM", true), ("Qwen2ForCausalLM", false)] {
        let error = refusal(json!({
            "architectures": [class], "attention_bias": bias, "sliding_window": null
        }));
        let field = |error: &ConfigError| match error {
            ConfigError::Unsupported { field, .. } => *field,
            other => panic!("{other}"),
        };
        assert_eq!(field(&error), "attention_bias");
    }
}

#[test]
fn is_a_list_longer_than_any_model_needs_refused() {
    let error = refusal(json!({ "eos_token_id": vec![0; 4097] }));
    assert!(matches!(&error, ConfigError::Json(_)));
    assert!(error.to_string().contains("more than 4096 elements"), "{error}");
    assert!(parse(json!({ "eos_token_id": vec![0; 4096] })).is_ok());
}

#[test]
fn are_bad_rope_numbers_refused() {
    let llama3 = json!({ "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64 });
    for changes in [
        json!({ "rope_theta": 0 }),
        json!({ "rope_theta": -1.0 }),
        json!({ "rms_norm_eps": -1e-5 }),
        json!({ "rope_scaling": { "type": "linear", "factor": 0.5 } }),
        json!({ "rope_scaling": llama3 }),
        json!({ "rope_scaling": { "type": "yarn", "factor": 2, "beta_fast": 1, "beta_slow": 1 } }),
        json!({ "rope_scaling": { "type": "yarn", "factor": 2,
            "original_max_position_embeddings": 0 } }),
    ] {
        assert!(matches!(refusal(changes), ConfigError::OutOfRange { .. }));
    }
    let error = refusal(json!({ "rope_scaling": { "type": "linear" } }));
    assert!(matches!(error, ConfigError::Missing { field: "factor" }));
}

#[test]
fn are_unsupported_features_named() {
    for (changes, name) in [
        (json!({ "sliding_window": 4096 }), "sliding_window"),
        (json!({ "hidden_act": "gelu" }), "hidden_act"),
        (json!({ "mlp_bias": true }), "mlp_bias"),
        (json!({ "num_local_experts": 8 }), "num_local_experts"),
        (json!({ "num_experts": 128 }), "num_experts"),
        (json!({ "attn_logit_softcapping": 50.0 }), "attn_logit_softcapping"),
        (json!({ "final_logit_softcapping": 30.0 }), "final_logit_softcapping"),
        (json!({ "residual_multiplier": 0.22 }), "residual_multiplier"),
        (json!({ "dual_chunk_attention_config": {} }), "dual_chunk_attention_config"),
        (json!({ "quantization_config": {} }), "quantization_config"),
        (json!({ "partial_rotary_factor": 0.5 }), "partial_rotary_factor"),
    ] {
        let error = refusal(changes);
        assert!(matches!(error, ConfigError::Unsupported { field, .. } if field == name));
    }
    let off = json!({ "num_experts": 0, "use_mrope": false, "residual_multiplier": 1.0,
        "attn_logit_softcapping": null });
    assert!(parse(off).is_ok());
}

#[test]
fn are_special_tokens_outside_the_vocabulary_refused() {
    for changes in [
        json!({ "eos_token_id": 100 }),
        json!({ "bos_token_id": -1 }),
        json!({ "eos_token_id": [2, 1u64 << 40] }),
    ] {
        assert!(matches!(refusal(changes), ConfigError::OutOfRange { .. }));
    }
}

#[test]
fn is_a_file_of_more_than_16_mebibytes_refused() {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("model.safetensors"), safetensors("{}", 0)).unwrap();
    let config = std::fs::File::create(directory.path().join("config.json")).unwrap();
    config.set_len((16 << 20) + 1).unwrap();
    let error = Checkpoint::open(directory.path()).unwrap_err();
    assert!(matches!(error, LoadError::FileTooLarge { limit: 16_777_216, got: 16_777_217, .. }));
}
