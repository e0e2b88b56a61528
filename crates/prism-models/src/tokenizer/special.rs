//! The tokens that begin and end a text, by name.

use serde::Deserialize;

use super::TokenizerError;

/// The texts of the tokens that begin and end a text, where a model has them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SpecialTokens {
    /// Begins a text.
    pub bos: Option<String>,
    /// Ends a text.
    pub eos: Option<String>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct TokenizerConfig {
    bos_token: Option<Token>,
    eos_token: Option<Token>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Token {
    Text(String),
    Described { content: String },
}

impl Token {
    fn text(self) -> String {
        match self {
            Self::Text(text) | Self::Described { content: text } => text,
        }
    }
}

impl SpecialTokens {
    /// Takes `bos_token` and `eos_token` out of a `tokenizer_config.json`: texts, or objects with
    /// their `content`.
    ///
    /// # Errors
    ///
    /// The text is not JSON, or one of them is neither.
    pub fn from_tokenizer_config(json: &[u8]) -> Result<Self, TokenizerError> {
        let config: TokenizerConfig = serde_json::from_slice(json)?;
        Ok(Self { bos: config.bos_token.map(Token::text), eos: config.eos_token.map(Token::text) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn are_names_taken_as_texts_and_as_objects() {
        let json = br#"{"bos_token": null, "eos_token": {"content": "<|end|>", "lstrip": false}}"#;
        let tokens = SpecialTokens::from_tokenizer_config(json).unwrap();
        assert_eq!(tokens, SpecialTokens { bos: None, eos: Some("<|end|>".into()) });
        let tokens = SpecialTokens::from_tokenizer_config(br#"{"bos_token": "<s>"}"#).unwrap();
        assert_eq!(tokens, SpecialTokens { bos: Some("<s>".into()), eos: None });
        assert!(SpecialTokens::from_tokenizer_config(br#"{"bos_token": 1}"#).is_err());
        assert!(SpecialTokens::from_tokenizer_config(b"{").is_err());
    }
}
