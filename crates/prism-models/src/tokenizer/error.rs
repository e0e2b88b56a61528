//! What can be wrong with a tokenizer, or with what it is given.

use crate::gguf::MetadataError;

/// Why a tokenizer was refused, or refused its input.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// The text is not JSON, or not of the expected form.
    #[error("invalid JSON: {0}")]
    Json(#[from] serde_json::Error),
    /// A required part is absent.
    #[error("the tokenizer has no `{field}`")]
    MissingField {
        /// Path of the part.
        field: &'static str,
    },
    /// A regular expression is longer than any real one.
    #[error("a regular expression has {got} bytes; the limit is {limit}")]
    RegexTooLong {
        /// Most bytes accepted.
        limit: usize,
        /// Bytes of the expression.
        got: usize,
    },
    /// The parts of the tokenizer do not fit together, or fail on a text.
    #[error("invalid tokenizer: {message}")]
    Invalid {
        /// What is wrong.
        message: String,
    },
    /// There are no tokens.
    #[error("the vocabulary is empty")]
    EmptyVocab,
    /// An id is larger than any real vocabulary.
    #[error("the vocabulary has the id {got}; the limit is {limit}")]
    IdTooLarge {
        /// Largest id accepted.
        limit: usize,
        /// Id in the file.
        got: u32,
    },
    /// The ids become text by rules that are not implemented.
    #[error("decoder {got} is not supported; supported: ByteLevel, and the sequence of Llama 2")]
    UnsupportedDecoder {
        /// Decoder in the file.
        got: String,
    },
    /// A GGUF file has another kind of tokenizer.
    #[error("tokenizer model {got} is not supported; supported: gpt2")]
    UnsupportedModel {
        /// Model in the file.
        got: String,
    },
    /// A GGUF file splits words by rules that are not implemented.
    #[error("pre-tokenizer {got} is not supported; supported: gpt-2, smollm, llama-bpe, qwen2")]
    UnsupportedPreTokenizer {
        /// Pre-tokenizer in the file.
        got: String,
    },
    /// A GGUF metadata value is missing or has another type.
    #[error(transparent)]
    Metadata(#[from] MetadataError),
    /// There is not one token type for each token.
    #[error("the tokenizer has {got} token types for {expected} tokens")]
    TokenTypes {
        /// Number of tokens.
        expected: usize,
        /// Number of types.
        got: usize,
    },
    /// Two ids have the same text.
    #[error("token {got:?} occurs twice")]
    DuplicateToken {
        /// The text.
        got: String,
    },
    /// A merge is not a pair of tokens that join to a token.
    #[error("merge {index}, {got:?}, is not a pair of tokens that join to a token")]
    BadMerge {
        /// Position in the list.
        index: usize,
        /// Merge in the file.
        got: String,
    },
    /// A special token is not in the vocabulary.
    #[error("`{key}` is {got}; the vocabulary has {limit} tokens")]
    SpecialOutOfRange {
        /// Key of the id.
        key: &'static str,
        /// Number of tokens.
        limit: usize,
        /// Id in the file.
        got: u32,
    },
    /// The model has no embedding for some ids.
    #[error("the tokenizer has ids up to {got}; the model has {limit} embeddings")]
    DoesNotFit {
        /// Number of embeddings.
        limit: usize,
        /// Largest id.
        got: usize,
    },
    /// A text is too long to encode.
    #[error("the prompt has {got} bytes; the limit is {limit}")]
    PromptTooLong {
        /// Most bytes accepted.
        limit: usize,
        /// Bytes of the text.
        got: usize,
    },
    /// No token has this id.
    #[error("token id {got} is not in the vocabulary of {vocab_size} ids")]
    UnknownId {
        /// One more than the largest id.
        vocab_size: usize,
        /// Id to decode.
        got: u32,
    },
    /// No token has this text.
    #[error("token {token:?} is not in the vocabulary")]
    MissingToken {
        /// Text looked for.
        token: String,
    },
}
