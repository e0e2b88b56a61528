//! Parsing `config.json`.

use serde_json::{Map, Value};

use super::{
    MAX_POSITIONS, ModelConfig, derived_head_dim, out_of_range, positive, stretch_factor, within,
};
use crate::error::ConfigError;
use prism_core::{Rope, RopeScaling};

impl ModelConfig {
    /// Parses a Hugging Face `config.json` of a `LlamaForCausalLM`.
    ///
    /// # Errors
    ///
    /// The text is not a JSON object, a field is missing or out of range, or the model needs
    /// something that is not implemented.
    pub fn from_hugging_face(json: &[u8]) -> Result<Self, ConfigError> {
        let Value::Object(object) = serde_json::from_slice(json)? else {
            return Err(ConfigError::NotAnObject);
        };
        let fields = Fields(&object);
        refuse_unsupported(&fields)?;

        let hidden_size = fields.usize("hidden_size")?;
        let q_heads = fields.usize("num_attention_heads")?;
        let head_dim = match fields.find_usize("head_dim")? {
            Some(head_dim) => head_dim,
            None => derived_head_dim(hidden_size, q_heads)?,
        };
        let max_positions = fields.usize("max_position_embeddings")?;
        Self {
            hidden_size,
            intermediate_size: fields.usize("intermediate_size")?,
            layers: fields.usize("num_hidden_layers")?,
            q_heads,
            kv_heads: fields.find_usize("num_key_value_heads")?.unwrap_or(q_heads),
            head_dim,
            vocab_size: fields.usize("vocab_size")?,
            rms_eps: fields.f64("rms_norm_eps")?,
            rope: rope(&fields, max_positions)?,
            tie_embeddings: fields.find_bool("tie_word_embeddings")?.unwrap_or(false),
            max_positions,
            bos_ids: fields.token_ids("bos_token_id")?,
            eos_ids: fields.token_ids("eos_token_id")?,
            attention_bias: fields.find_bool("attention_bias")?.unwrap_or(false),
            qk_norm: false,
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
        let Value::Object(object) = serde_json::from_slice(json)? else {
            return Err(ConfigError::NotAnObject);
        };
        for id in Fields(&object).token_ids("eos_token_id")? {
            if !self.eos_ids.contains(&id) {
                self.eos_ids.push(id);
            }
        }
        self.validated()
    }
}

fn refuse_unsupported(fields: &Fields<'_>) -> Result<(), ConfigError> {
    let Some(Value::Array(architectures)) = fields.find("architectures") else {
        return Err(ConfigError::Missing { field: "architectures" });
    };
    if !matches!(&architectures[..], [Value::String(name)] if name == "LlamaForCausalLM") {
        let names = architectures.iter().map(|name| match name {
            Value::String(name) => name.clone(),
            other => other.to_string(),
        });
        let got = names.collect::<Vec<_>>().join(", ");
        return Err(ConfigError::UnsupportedArchitecture { got });
    }
    let activation = fields.find_str("hidden_act")?.unwrap_or("silu");
    if activation != "silu" {
        return Err(unsupported("hidden_act", activation, "silu"));
    }
    for field in ["sliding_window", "quantization_config"] {
        if let Some(value) = fields.find(field) {
            return Err(unsupported(field, value, "null"));
        }
    }
    if fields.find_bool("mlp_bias")?.unwrap_or(false) {
        return Err(unsupported("mlp_bias", true, "false"));
    }
    Ok(())
}

fn unsupported(field: &'static str, got: impl ToString, supported: &'static str) -> ConfigError {
    ConfigError::Unsupported { field, got: got.to_string(), supported }
}

/// Reads both styles: `rope_parameters` with everything in it, or `rope_theta` beside an optional
/// `rope_scaling`.
fn rope(fields: &Fields<'_>, max_positions: usize) -> Result<Rope, ConfigError> {
    let empty = Map::new();
    let parameters = match fields.find_object("rope_parameters")? {
        Some(parameters) => parameters,
        None => fields.find_object("rope_scaling")?.unwrap_or(&empty),
    };
    let parameters = Fields(parameters);
    let theta = match parameters.find_f64("rope_theta")? {
        Some(theta) => theta,
        None => fields.find_f64("rope_theta")?.unwrap_or(10_000.0),
    };
    for fields in [fields, &parameters] {
        if let Some(part) = fields.find_f64("partial_rotary_factor")?
            && part != 1.0
        {
            return Err(unsupported("partial_rotary_factor", part, "1"));
        }
    }
    let scaling = rope_scaling(&parameters, max_positions)?;
    Ok(Rope { scaling, ..Rope::new(theta) })
}

fn rope_scaling(fields: &Fields<'_>, max_positions: usize) -> Result<RopeScaling, ConfigError> {
    let kind = match fields.find_str("rope_type")? {
        Some(kind) => kind,
        None => fields.find_str("type")?.unwrap_or("default"),
    };
    let factor = || stretch_factor("factor", fields.f64("factor")?);
    match kind {
        "default" => Ok(RopeScaling::None),
        "linear" => Ok(RopeScaling::Linear { factor: factor()? }),
        "llama3" => {
            let low = positive("low_freq_factor", fields.f64("low_freq_factor")?)?;
            let high = positive("high_freq_factor", fields.f64("high_freq_factor")?)?;
            if high <= low {
                let allowed = format!("above low_freq_factor = {low}");
                return Err(out_of_range("high_freq_factor", allowed, high));
            }
            Ok(RopeScaling::Llama3 {
                factor: factor()?,
                low_freq_factor: low,
                high_freq_factor: high,
                original_max_positions: fields
                    .find_original_positions()?
                    .ok_or(ConfigError::Missing { field: ORIGINAL_POSITIONS })?,
            })
        }
        "yarn" => yarn(fields, factor()?, max_positions),
        other => Err(ConfigError::UnsupportedRope { got: other.into() }),
    }
}

const ORIGINAL_POSITIONS: &str = "original_max_position_embeddings";

fn yarn(
    fields: &Fields<'_>,
    factor: f64,
    max_positions: usize,
) -> Result<RopeScaling, ConfigError> {
    if fields.find_bool("truncate")? == Some(false) {
        return Err(unsupported("truncate", false, "true"));
    }
    let number = |field: &'static str, default| match fields.find_f64(field)? {
        Some(got) => positive(field, got),
        None => Ok(default),
    };
    let (beta_fast, beta_slow) = (number("beta_fast", 32.0)?, number("beta_slow", 1.0)?);
    if beta_fast <= beta_slow {
        return Err(out_of_range("beta_fast", format!("above beta_slow = {beta_slow}"), beta_fast));
    }
    let attention_factor = match fields.find_f64("attention_factor")? {
        Some(got) => Some(positive("attention_factor", got)?),
        // A pair of temperatures, one for the rotation and one to take back in the scores.
        None => match (fields.find_f64("mscale")?, fields.find_f64("mscale_all_dim")?) {
            (Some(own), Some(all)) if own != 0.0 && all != 0.0 => {
                let temperature = |scale: f64| 0.1 * scale * factor.ln() + 1.0;
                Some(positive("mscale", temperature(own) / temperature(all))?)
            }
            _ => None,
        },
    };
    Ok(RopeScaling::Yarn {
        factor,
        beta_fast,
        beta_slow,
        original_max_positions: fields.find_original_positions()?.unwrap_or(max_positions),
        attention_factor,
    })
}

/// Typed access to the fields of a JSON object; null counts as absent.
struct Fields<'a>(&'a Map<String, Value>);

impl<'a> Fields<'a> {
    fn find(&self, field: &str) -> Option<&'a Value> {
        self.0.get(field).filter(|value| !value.is_null())
    }

    fn find_usize(&self, field: &str) -> Result<Option<usize>, ConfigError> {
        let Some(value) = self.find(field) else {
            return Ok(None);
        };
        let Value::Number(number) = value else {
            return Err(wrong_type(field, "a number"));
        };
        match number.as_u64().and_then(|number| usize::try_from(number).ok()) {
            Some(size) => Ok(Some(size)),
            // Negative, fractional, or beyond 64 bits.
            None => Err(out_of_range(field, "a non-negative 64-bit integer", number)),
        }
    }

    fn usize(&self, field: &'static str) -> Result<usize, ConfigError> {
        self.find_usize(field)?.ok_or(ConfigError::Missing { field })
    }

    fn find_f64(&self, field: &str) -> Result<Option<f64>, ConfigError> {
        let Some(value) = self.find(field) else {
            return Ok(None);
        };
        value.as_f64().map(Some).ok_or_else(|| wrong_type(field, "a number"))
    }

    fn f64(&self, field: &'static str) -> Result<f64, ConfigError> {
        self.find_f64(field)?.ok_or(ConfigError::Missing { field })
    }

    fn find_bool(&self, field: &str) -> Result<Option<bool>, ConfigError> {
        let Some(value) = self.find(field) else {
            return Ok(None);
        };
        value.as_bool().map(Some).ok_or_else(|| wrong_type(field, "a boolean"))
    }

    fn find_str(&self, field: &str) -> Result<Option<&'a str>, ConfigError> {
        let Some(value) = self.find(field) else {
            return Ok(None);
        };
        value.as_str().map(Some).ok_or_else(|| wrong_type(field, "a string"))
    }

    fn find_object(&self, field: &str) -> Result<Option<&'a Map<String, Value>>, ConfigError> {
        let Some(value) = self.find(field) else {
            return Ok(None);
        };
        value.as_object().map(Some).ok_or_else(|| wrong_type(field, "an object"))
    }

    fn find_original_positions(&self) -> Result<Option<usize>, ConfigError> {
        let positions = self.find_usize(ORIGINAL_POSITIONS)?;
        if let Some(positions) = positions {
            within(ORIGINAL_POSITIONS, positions, 1..=MAX_POSITIONS)?;
        }
        Ok(positions)
    }

    /// A token id, a list of them, or none.
    fn token_ids(&self, field: &str) -> Result<Vec<u32>, ConfigError> {
        let values = match self.find(field) {
            None => return Ok(Vec::new()),
            Some(Value::Array(values)) => values.as_slice(),
            Some(value) => std::slice::from_ref(value),
        };
        let id = |value: &Value| match value {
            Value::Number(number) => number
                .as_u64()
                .and_then(|id| u32::try_from(id).ok())
                .ok_or_else(|| out_of_range(field, "a non-negative 32-bit integer", number)),
            _ => Err(wrong_type(field, "a token id or a list of them")),
        };
        values.iter().map(id).collect()
    }
}

fn wrong_type(field: &str, expected: &'static str) -> ConfigError {
    ConfigError::WrongType { field: field.into(), expected }
}

#[cfg(test)]
mod tests {
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
            attention_bias: false,
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
}
