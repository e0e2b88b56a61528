//! Text to token ids and back.

mod error;
mod from_gguf;
mod outline;
mod special;
mod stream;

use std::panic::{AssertUnwindSafe, catch_unwind};

pub use error::TokenizerError;
pub use special::SpecialTokens;
use stream::Alphabet;
pub use stream::DecodeStream;

/// Largest `tokenizer.json` that is read, in bytes.
pub const MAX_TOKENIZER_BYTES: u64 = 64 << 20;
/// Longest text that [`Tokenizer::encode`] takes, in bytes: several times the longest context.
pub const MAX_PROMPT_BYTES: usize = 4 << 20;
/// Most token ids of a vocabulary.
const MAX_VOCAB: usize = 1 << 22;

/// A tokenizer, from `tokenizer.json` or from GGUF metadata.
#[derive(Clone, Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    alphabet: Alphabet,
    /// One more than the largest id.
    vocab_size: usize,
    /// Id to begin a text with, where `inner` has no post-processor that does it.
    add_bos: Option<u32>,
}

impl Tokenizer {
    /// Parses a `tokenizer.json`.
    ///
    /// # Errors
    ///
    /// The text is not JSON, is not a valid tokenizer, or has a decoder that is not supported.
    pub fn from_json(json: &[u8]) -> Result<Self, TokenizerError> {
        let alphabet = outline::check(json)?;
        let mut inner = guarded(|| tokenizers::Tokenizer::from_bytes(json))?;
        // Ids of the whole text are wanted, whatever the training set-up was.
        inner.with_padding(None);
        inner.with_truncation(None).map_err(invalid)?;
        Self::new(inner, alphabet, None)
    }

    fn new(
        inner: tokenizers::Tokenizer,
        alphabet: Alphabet,
        add_bos: Option<u32>,
    ) -> Result<Self, TokenizerError> {
        let largest = inner.get_vocab(true).into_values().max();
        let largest = largest.ok_or(TokenizerError::EmptyVocab)?;
        if largest as usize >= MAX_VOCAB {
            return Err(TokenizerError::IdTooLarge { limit: MAX_VOCAB - 1, got: largest });
        }
        Ok(Self { inner, alphabet, vocab_size: largest as usize + 1, add_bos })
    }

    /// Encodes a text; the names of special tokens in it become those tokens.
    ///
    /// With `add_special_tokens`, the tokens that the model wants around a text are added, such
    /// as one that begins it. An empty text has no ids but those.
    ///
    /// # Errors
    ///
    /// The text is longer than [`MAX_PROMPT_BYTES`], or the tokenizer's rules fail on it.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, TokenizerError> {
        if text.len() > MAX_PROMPT_BYTES {
            return Err(TokenizerError::PromptTooLong { limit: MAX_PROMPT_BYTES, got: text.len() });
        }
        let encoding = guarded(|| self.inner.encode_fast(text, add_special_tokens))?;
        let bos = self.add_bos.filter(|_| add_special_tokens);
        Ok(bos.into_iter().chain(encoding.get_ids().iter().copied()).collect())
    }

    /// Decodes ids; bytes that are not UTF-8 become replacement characters.
    ///
    /// # Errors
    ///
    /// An id is not in the vocabulary.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String, TokenizerError> {
        let mut stream = self.stream(skip_special_tokens);
        let mut text = String::new();
        for &id in ids {
            text.push_str(&stream.push(id)?);
        }
        text.push_str(&stream.finish());
        Ok(text)
    }

    /// Starts to decode ids one at a time.
    pub fn stream(&self, skip_special_tokens: bool) -> DecodeStream<'_> {
        DecodeStream::new(self, skip_special_tokens)
    }

    /// One more than the largest id.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The id of a token, by its text in the vocabulary.
    ///
    /// # Errors
    ///
    /// The vocabulary has no such token.
    pub fn token_id(&self, token: &str) -> Result<u32, TokenizerError> {
        let missing = || TokenizerError::MissingToken { token: token.into() };
        self.inner.token_to_id(token).ok_or_else(missing)
    }

    /// The text in the vocabulary of a token.
    ///
    /// # Errors
    ///
    /// The vocabulary has no such id.
    pub fn token(&self, id: u32) -> Result<String, TokenizerError> {
        let unknown = || TokenizerError::UnknownId { vocab_size: self.vocab_size, got: id };
        self.inner.id_to_token(id).ok_or_else(unknown)
    }

    /// Whether a token is special: it steers the model and is no part of the text.
    pub fn is_special(&self, id: u32) -> bool {
        let added = self.inner.get_added_vocabulary();
        added.simple_id_to_token(id).is_some_and(|token| added.is_special_token(&token))
    }

    /// Checks that a model with `vocab_size` embeddings has one for every id.
    ///
    /// # Errors
    ///
    /// It has not.
    pub fn check_fits(&self, vocab_size: usize) -> Result<(), TokenizerError> {
        if self.vocab_size > vocab_size {
            let largest = self.vocab_size - 1;
            return Err(TokenizerError::DoesNotFit { limit: vocab_size, got: largest });
        }
        Ok(())
    }
}

/// Runs code of the `tokenizers` crate, and turns its panics into errors: a merge longer than any
/// token, or a regular expression that backtracks too often, ends in one there.
fn guarded<T>(run: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, TokenizerError> {
    match catch_unwind(AssertUnwindSafe(run)) {
        Ok(result) => result.map_err(invalid),
        Err(_) => Err(TokenizerError::Invalid { message: "its rules cannot be applied".into() }),
    }
}

fn invalid(error: tokenizers::Error) -> TokenizerError {
    TokenizerError::Invalid { message: error.to_string() }
}
