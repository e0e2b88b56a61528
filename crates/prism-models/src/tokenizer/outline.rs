//! Checks on a `tokenizer.json` ahead of the `tokenizers` crate.

use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::{Value, json};

use super::error::TokenizerError;
use super::stream::Alphabet;

/// Real expressions have some hundred bytes; enormous ones compile slowly.
const MAX_REGEX_BYTES: usize = 4096;

/// The parts that are looked at; the vocabulary is skipped over.
#[derive(Deserialize)]
struct Outline {
    #[serde(default)]
    normalizer: Value,
    #[serde(default)]
    pre_tokenizer: Value,
    #[serde(default)]
    decoder: Value,
    model: Option<Model>,
}

#[derive(Deserialize)]
struct Model {
    vocab: Option<IgnoredAny>,
}

/// Refuses what the `tokenizers` crate cannot be trusted with, and finds the alphabet of tokens.
pub(super) fn check(json: &[u8]) -> Result<Alphabet, TokenizerError> {
    let outline: Outline = serde_json::from_slice(json)?;
    let model = outline.model.ok_or(TokenizerError::MissingField { field: "model" })?;
    model.vocab.ok_or(TokenizerError::MissingField { field: "model.vocab" })?;
    for part in [&outline.normalizer, &outline.pre_tokenizer, &outline.decoder] {
        check_regexes(part)?;
    }
    alphabet(&outline.decoder)
}

/// The depth is limited by the JSON parser.
fn check_regexes(part: &Value) -> Result<(), TokenizerError> {
    match part {
        Value::Array(parts) => parts.iter().try_for_each(check_regexes),
        Value::Object(parts) => parts.iter().try_for_each(|(name, part)| match part {
            Value::String(regex) if name == "Regex" && regex.len() > MAX_REGEX_BYTES => {
                Err(TokenizerError::RegexTooLong { limit: MAX_REGEX_BYTES, got: regex.len() })
            }
            part => check_regexes(part),
        }),
        _ => Ok(()),
    }
}

fn alphabet(decoder: &Value) -> Result<Alphabet, TokenizerError> {
    let steps = match decoder["type"].as_str() {
        Some("Sequence") => decoder["decoders"].as_array().map_or(&[][..], Vec::as_slice),
        _ => std::slice::from_ref(decoder),
    };
    let replace = json!({ "type": "Replace", "pattern": { "String": "▁" }, "content": " " });
    let strip = json!({ "type": "Strip", "content": " ", "start": 1, "stop": 0 });
    let kind = |step: &Value, kind: &str| step["type"] == kind;
    match steps {
        [only] if kind(only, "ByteLevel") => Ok(Alphabet::ByteLevel),
        [first, bytes, fuse, rest @ ..]
            if *first == replace && kind(bytes, "ByteFallback") && kind(fuse, "Fuse") =>
        {
            match rest {
                [] => Ok(Alphabet::SentencePiece { strip_first_space: false }),
                [last] if *last == strip => Ok(Alphabet::SentencePiece { strip_first_space: true }),
                _ => Err(unsupported(steps)),
            }
        }
        _ => Err(unsupported(steps)),
    }
}

fn unsupported(steps: &[Value]) -> TokenizerError {
    let names = steps.iter().map(|step| step["type"].as_str().unwrap_or("none"));
    TokenizerError::UnsupportedDecoder { got: names.collect::<Vec<_>>().join(", ") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn are_the_decoders_of_the_llama_family_known() {
        assert_eq!(alphabet(&json!({ "type": "ByteLevel" })).unwrap(), Alphabet::ByteLevel);
        let llama2 = json!({ "type": "Sequence", "decoders": [
            { "type": "Replace", "pattern": { "String": "▁" }, "content": " " },
            { "type": "ByteFallback" },
            { "type": "Fuse" },
            { "type": "Strip", "content": " ", "start": 1, "stop": 0 },
        ] });
        let expected = Alphabet::SentencePiece { strip_first_space: true };
        assert_eq!(alphabet(&llama2).unwrap(), expected);
        for other in [Value::Null, json!({ "type": "WordPiece" })] {
            let error = alphabet(&other).unwrap_err();
            assert!(matches!(error, TokenizerError::UnsupportedDecoder { .. }));
        }
    }
}
