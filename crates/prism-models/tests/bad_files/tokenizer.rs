//! Malformed tokenizers, and texts and ids that they cannot take.

use prism_models::gguf::{GgufFile, MetadataError};
use prism_models::tokenizer::{MAX_PROMPT_BYTES, Tokenizer, TokenizerError};
use serde_json::{Value, json};

use crate::support::{Gguf, file};

/// A valid tokenizer of three tokens with some parts replaced.
fn tokenizer(changes: Value) -> Vec<u8> {
    let mut tokenizer = json!({
        "version": "1.0",
        "added_tokens": [],
        "normalizer": null,
        "pre_tokenizer": { "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true },
        "post_processor": null,
        "decoder": { "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true },
        "model": { "type": "BPE", "vocab": { "a": 0, "b": 1, "ab": 2 }, "merges": ["a b"] },
    });
    for (field, value) in changes.as_object().unwrap() {
        tokenizer[field] = value.clone();
    }
    tokenizer.to_string().into_bytes()
}

fn parse(changes: Value) -> Result<Tokenizer, TokenizerError> {
    Tokenizer::from_json(&tokenizer(changes))
}

#[test]
fn is_a_small_valid_tokenizer_read() {
    let tokenizer = parse(json!({})).unwrap();
    assert_eq!(tokenizer.encode("aab", true).unwrap(), [0, 2]);
    assert_eq!(tokenizer.decode(&[0, 2], true).unwrap(), "aab");
    assert_eq!(tokenizer.vocab_size(), 3);
}

#[test]
fn is_invalid_json_refused() {
    for json in [&b"{"[..], b"", b"\xff", b"[]"] {
        assert!(matches!(Tokenizer::from_json(json), Err(TokenizerError::Json(_))));
    }
    let deep = "[".repeat(1_000_000);
    assert!(matches!(Tokenizer::from_json(deep.as_bytes()), Err(TokenizerError::Json(_))));
}

#[test]
fn is_a_missing_vocabulary_named() {
    let error = parse(json!({ "model": { "type": "BPE", "merges": [] } })).unwrap_err();
    assert!(matches!(error, TokenizerError::MissingField { field: "model.vocab" }));
    let error = parse(json!({ "model": null })).unwrap_err();
    assert!(matches!(error, TokenizerError::MissingField { field: "model" }));
    let empty = json!({ "model": { "type": "BPE", "vocab": {}, "merges": [] } });
    assert!(matches!(parse(empty), Err(TokenizerError::EmptyVocab)));
}

#[test]
fn are_merges_outside_the_vocabulary_refused() {
    // The second is longer than any token.
    for merge in ["a c", "ab ab"] {
        let model = json!({ "type": "BPE", "vocab": { "a": 0, "ab": 1 }, "merges": [merge] });
        assert!(matches!(parse(json!({ "model": model })), Err(TokenizerError::Invalid { .. })));
    }
}

#[test]
fn are_ids_beyond_the_embeddings_refused() {
    let model = json!({ "type": "BPE", "vocab": { "a": 0, "b": 70_000 }, "merges": [] });
    let tokenizer = parse(json!({ "model": model })).unwrap();
    assert!(tokenizer.check_fits(70_001).is_ok());
    let error = tokenizer.check_fits(50_000).unwrap_err();
    assert!(matches!(error, TokenizerError::DoesNotFit { limit: 50_000, got: 70_000 }));

    let model = json!({ "type": "BPE", "vocab": { "a": u32::MAX }, "merges": [] });
    let error = parse(json!({ "model": model })).unwrap_err();
    assert!(matches!(error, TokenizerError::IdTooLarge { got: u32::MAX, .. }));
}

#[test]
fn are_unknown_ids_refused_on_decoding() {
    let model = json!({ "type": "BPE", "vocab": { "a": 0, "b": 5 }, "merges": [] });
    let tokenizer = parse(json!({ "model": model })).unwrap();
    for id in [3, 6, u32::MAX] {
        let error = tokenizer.decode(&[0, id], false).unwrap_err();
        assert!(matches!(error, TokenizerError::UnknownId { got, .. } if got == id));
    }
}

#[test]
fn are_absent_special_tokens_reported() {
    let tokenizer = parse(json!({})).unwrap();
    let error = tokenizer.token_id("<|im_end|>").unwrap_err();
    assert!(matches!(error, TokenizerError::MissingToken { token } if token == "<|im_end|>"));
    let template = json!({ "type": "TemplateProcessing", "special_tokens": {},
        "single": [{ "SpecialToken": { "id": "<s>", "type_id": 0 } },
            { "Sequence": { "id": "A", "type_id": 0 } }], "pair": [] });
    let tokenizer = parse(json!({ "post_processor": template })).unwrap();
    assert_eq!(tokenizer.encode("a", false).unwrap(), [0]);
    let error = tokenizer.encode("a", true).unwrap_err();
    assert!(matches!(error, TokenizerError::Invalid { .. }));
}

fn split_by(regex: &str) -> Value {
    let split = json!({ "type": "Split", "pattern": { "Regex": regex }, "behavior": "Isolated",
        "invert": false });
    json!({ "pre_tokenizer": { "type": "Sequence", "pretokenizers": [split] } })
}

#[test]
fn is_an_enormous_regex_refused() {
    let error = parse(split_by(&"(a|b)*".repeat(100_000))).unwrap_err();
    assert!(matches!(error, TokenizerError::RegexTooLong { limit: 4096, got: 600_000 }));
}

#[test]
fn is_an_invalid_regex_refused() {
    for regex in ["(", "[", &"(".repeat(4000)] {
        assert!(matches!(parse(split_by(regex)), Err(TokenizerError::Invalid { .. })));
    }
}

#[test]
fn does_a_regex_that_backtracks_forever_end() {
    let tokenizer = parse(split_by("(a|a)*(a|a)*$x")).unwrap();
    // Whether the engine gives up or finds an answer is its own affair; it has to return.
    match tokenizer.encode(&"a".repeat(40), false) {
        Ok(ids) => assert_eq!(ids, [0; 40]),
        Err(error) => assert!(matches!(error, TokenizerError::Invalid { .. }), "{error}"),
    }
}

#[test]
fn are_lone_surrogates_refused_in_json() {
    let json = String::from_utf8(tokenizer(json!({}))).unwrap();
    let json = json.replace(r#""ab":2"#, r#""\ud800":2"#);
    assert!(json.contains("ud800"));
    assert!(matches!(Tokenizer::from_json(json.as_bytes()), Err(TokenizerError::Invalid { .. })));
    let json = br#"{"model":{"vocab":{}},"decoder":{"type":"\ud800"}}"#;
    assert!(matches!(Tokenizer::from_json(json), Err(TokenizerError::Json(_))));
}

#[test]
fn are_nuls_and_empty_prompts_taken() {
    let tokenizer = parse(json!({})).unwrap();
    assert!(tokenizer.encode("", true).unwrap().is_empty());
    assert_eq!(tokenizer.decode(&[], true).unwrap(), "");
    // The vocabulary has no byte for them: they have no token.
    assert_eq!(tokenizer.encode("a\0\u{fffd}b", false).unwrap(), [0, 1]);
}

#[test]
fn is_a_prompt_of_10_megabytes_refused() {
    let tokenizer = parse(json!({})).unwrap();
    let error = tokenizer.encode(&"a".repeat(10_000_000), false).unwrap_err();
    assert!(matches!(
        error,
        TokenizerError::PromptTooLong { limit: MAX_PROMPT_BYTES, got: 10_000_000 }
    ));
}

#[test]
fn is_an_unknown_decoder_named() {
    let error = parse(json!({ "decoder": { "type": "WordPiece", "prefix": "#" } })).unwrap_err();
    assert!(matches!(error, TokenizerError::UnsupportedDecoder { got } if got == "WordPiece"));
}

/// The refusal of a GGUF file with these values.
fn gguf_refusal(gguf: Gguf) -> TokenizerError {
    let file = GgufFile::open(&file("model.gguf", &gguf.bytes()).path).unwrap();
    Tokenizer::from_gguf(file.metadata()).unwrap_err()
}

fn gguf(model: &str, pre: &str) -> Gguf {
    Gguf::new()
        .str("tokenizer.ggml.model", model)
        .str("tokenizer.ggml.pre", pre)
        .strings("tokenizer.ggml.tokens", &["a", "b", "ab"])
}

#[test]
fn are_unsupported_gguf_tokenizers_named() {
    let error = gguf_refusal(gguf("llama", "default"));
    assert!(matches!(error, TokenizerError::UnsupportedModel { got } if got == "llama"));
    let error = gguf_refusal(gguf("gpt2", "tekken"));
    assert!(matches!(error, TokenizerError::UnsupportedPreTokenizer { got } if got == "tekken"));
}

#[test]
fn are_gguf_tokenizers_with_bad_parts_refused() {
    let missing = |error| matches!(error, TokenizerError::Metadata(MetadataError::Missing { .. }));
    assert!(missing(gguf_refusal(Gguf::new())));
    assert!(missing(gguf_refusal(gguf("gpt2", "gpt-2"))));
    let error = gguf_refusal(gguf("gpt2", "gpt-2").strings("tokenizer.ggml.merges", &["b a"]));
    assert!(matches!(error, TokenizerError::BadMerge { index: 0, .. }));
    let whole = || gguf("gpt2", "gpt-2").strings("tokenizer.ggml.merges", &["a b"]);
    let error = gguf_refusal(whole().u32("tokenizer.ggml.eos_token_id", 3));
    assert!(matches!(error, TokenizerError::SpecialOutOfRange { limit: 3, got: 3, .. }));
}
