//! What a model's makers recommend for sampling: `generation_config.json`, or GGUF metadata.

use serde::Deserialize;

use crate::error::ConfigError;
use crate::gguf::Metadata;
use crate::sample::Sampling;

/// Recommended settings of sampling, `None` where the file says nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct GenerationConfig {
    /// Whether to sample; most probable tokens otherwise.
    pub do_sample: Option<bool>,
    /// As in [`Sampling`].
    pub temperature: Option<f64>,
    /// As in [`Sampling`]; 0 keeps all tokens.
    pub top_k: Option<usize>,
    /// As in [`Sampling`].
    pub top_p: Option<f64>,
    /// As in [`Sampling`].
    pub min_p: Option<f64>,
    /// As in [`Sampling`].
    pub repetition_penalty: Option<f64>,
}

impl GenerationConfig {
    /// Parses a `generation_config.json`.
    ///
    /// # Errors
    ///
    /// The text is not JSON, or a setting has another type. Ranges are checked by
    /// [`Sampling::validate`].
    pub fn from_hugging_face(json: &[u8]) -> Result<Self, ConfigError> {
        Ok(serde_json::from_slice(json)?)
    }

    /// Reads the keys `general.sampling.*`, as llama.cpp's converter writes them.
    ///
    /// # Errors
    ///
    /// A value has another type.
    pub fn from_gguf(metadata: &Metadata) -> Result<Self, ConfigError> {
        let temperature = metadata.find_f64("general.sampling.temp")?;
        Ok(Self {
            // Who gives a temperature means to sample.
            do_sample: temperature.map(|_| true),
            temperature,
            top_k: metadata.find_usize("general.sampling.top_k")?,
            top_p: metadata.find_f64("general.sampling.top_p")?,
            min_p: metadata.find_f64("general.sampling.min_p")?,
            repetition_penalty: metadata.find_f64("general.sampling.penalty_repeat")?,
        })
    }

    /// The settings that it asks for. As in Hugging Face transformers, the most probable token is
    /// taken unless `do_sample` is true, and the temperature is 1 then unless given.
    pub fn sampling(&self) -> Sampling {
        let greedy = Sampling::GREEDY;
        Sampling {
            repetition_penalty: self.repetition_penalty.unwrap_or(greedy.repetition_penalty),
            temperature: match self.do_sample {
                Some(true) => self.temperature.unwrap_or(1.0),
                _ => greedy.temperature,
            },
            top_k: self.top_k.filter(|&k| k > 0),
            top_p: self.top_p.unwrap_or(greedy.top_p),
            min_p: self.min_p.unwrap_or(greedy.min_p),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn are_settings_taken_and_sampling_only_where_asked_for() {
        let json = br#"{"do_sample": true, "temperature": 0.6, "top_k": 20, "top_p": 0.95,
            "eos_token_id": [1, 2], "repetition_penalty": 1.05}"#;
        let sampling = GenerationConfig::from_hugging_face(json).unwrap().sampling();
        let right = Sampling {
            repetition_penalty: 1.05,
            temperature: 0.6,
            top_k: Some(20),
            top_p: 0.95,
            min_p: 0.0,
        };
        assert_eq!(sampling, right);
        let greedy = GenerationConfig::from_hugging_face(br#"{"temperature": 0.6}"#).unwrap();
        assert_eq!(greedy.sampling(), Sampling::GREEDY);
        let json = br#"{"do_sample": true, "top_k": 0, "top_p": null}"#;
        let all = GenerationConfig::from_hugging_face(json).unwrap().sampling();
        assert_eq!((all.temperature, all.top_k, all.top_p), (1.0, None, 1.0));
    }

    #[test]
    fn are_settings_of_another_type_refused() {
        for json in [&br#"{"temperature": "hot"}"#[..], br#"{"top_k": -1}"#, b"[]x", b"{"] {
            let error = GenerationConfig::from_hugging_face(json).unwrap_err();
            assert!(matches!(error, ConfigError::Json(_)), "{error}");
        }
    }
}
