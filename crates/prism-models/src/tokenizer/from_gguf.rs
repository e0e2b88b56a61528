//! Building a byte-level BPE tokenizer from GGUF metadata.

use std::collections::HashSet;

use tokenizers::models::bpe::{BPE, Merges, Vocab};
use tokenizers::normalizers::unicode::NFC;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, SplitDelimiterBehavior};

use super::stream::Alphabet;
use super::{MAX_VOCAB, Tokenizer, TokenizerError, guarded, invalid};
use crate::gguf::Metadata;

// Kinds of tokens in `tokenizer.ggml.token_type`.
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;

/// Words of Llama 3, with numbers in groups of up to three digits.
const LLAMA3_WORDS: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
);
/// Words of Qwen 2, with numbers digit by digit.
const QWEN2_WORDS: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
);

/// How a text is split before the merges, and what comes with it.
struct Rules {
    words: PreTokenizerWrapper,
    nfc: bool,
    /// Whether a whole word that is a token is taken as it is.
    ignore_merges: bool,
    /// Whether a text begins with the beginning-of-text token unless the file says otherwise.
    add_bos: bool,
}

impl Rules {
    fn named(name: &str) -> Result<Self, TokenizerError> {
        let plain = |words| Self { words, nfc: false, ignore_merges: false, add_bos: false };
        Ok(match name {
            "gpt-2" => plain(byte_level(true)),
            "smollm" => {
                plain(Sequence::new(vec![Digits::new(true).into(), byte_level(true)]).into())
            }
            "llama-bpe" => {
                Self { ignore_merges: true, add_bos: true, ..plain(split(LLAMA3_WORDS)?) }
            }
            "qwen2" => Self { nfc: true, ..plain(split(QWEN2_WORDS)?) },
            got => return Err(TokenizerError::UnsupportedPreTokenizer { got: got.into() }),
        })
    }
}

/// Bytes to characters, after splitting into words as in GPT-2 or without.
fn byte_level(split: bool) -> PreTokenizerWrapper {
    ByteLevel::new(false, false, split).into()
}

fn split(words: &str) -> Result<PreTokenizerWrapper, TokenizerError> {
    let pattern = SplitPattern::Regex(words.into());
    let words = Split::new(pattern, SplitDelimiterBehavior::Isolated, false).map_err(invalid)?;
    Ok(Sequence::new(vec![words.into(), byte_level(false)]).into())
}

impl Tokenizer {
    /// Builds the tokenizer of a GGUF file, so that ids are those that Hugging Face Transformers
    /// gives for the same file.
    ///
    /// For files of the `smollm` kind that means splitting as `gpt-2` does. The model's own
    /// `tokenizer.json` (and llama.cpp) split digits off first, which differs where a run of
    /// spaces meets a number; [`Tokenizer::from_gguf_as`] with `smollm` does that.
    ///
    /// # Errors
    ///
    /// A value is missing or malformed, or the tokenizer is not a byte-level BPE with one of the
    /// pre-tokenizers `gpt-2`, `smollm`, `llama-bpe` and `qwen2`.
    pub fn from_gguf(metadata: &Metadata) -> Result<Self, TokenizerError> {
        let name = match metadata.get_str("tokenizer.ggml.pre")? {
            "smollm" => "gpt-2",
            name => name,
        };
        Self::from_gguf_as(metadata, name)
    }

    /// As [`Tokenizer::from_gguf`], with the name of a pre-tokenizer instead of the file's own.
    ///
    /// Old files have none, and some programs ignore it: Hugging Face Transformers splits the
    /// text of every GGUF file of this kind as `gpt-2` does.
    ///
    /// # Errors
    ///
    /// Those of [`Tokenizer::from_gguf`].
    pub fn from_gguf_as(metadata: &Metadata, pre_tokenizer: &str) -> Result<Self, TokenizerError> {
        let model = metadata.get_str("tokenizer.ggml.model")?;
        if model != "gpt2" {
            return Err(TokenizerError::UnsupportedModel { got: model.into() });
        }
        let rules = Rules::named(pre_tokenizer)?;
        let tokens = metadata.get_str_array("tokenizer.ggml.tokens")?;
        let vocab = vocab(tokens)?;
        let merges = merges(metadata.get_str_array("tokenizer.ggml.merges")?, tokens)?;
        let bos = special_id(metadata, "tokenizer.ggml.bos_token_id", tokens.len())?;
        special_id(metadata, "tokenizer.ggml.eos_token_id", tokens.len())?;
        let types = metadata.find_i32_array("tokenizer.ggml.token_type")?;
        let added = added_tokens(tokens, types.as_deref())?;
        let add_bos = metadata.find_bool("tokenizer.ggml.add_bos_token")?.unwrap_or(rules.add_bos);

        let inner = guarded(|| {
            let bpe = BPE::builder().vocab_and_merges(vocab, merges);
            let bpe = bpe.ignore_merges(rules.ignore_merges).build()?;
            let mut inner = tokenizers::Tokenizer::new(bpe);
            inner.with_normalizer(rules.nfc.then_some(NFC))?;
            inner.with_pre_tokenizer(Some(rules.words));
            inner.add_tokens(added)?;
            Ok(inner)
        })?;
        Self::new(inner, Alphabet::ByteLevel, bos.filter(|_| add_bos))
    }
}

fn vocab(tokens: &[String]) -> Result<Vocab, TokenizerError> {
    let mut vocab = Vocab::default();
    for (id, token) in tokens.iter().enumerate() {
        let id = u32::try_from(id).ok().filter(|&id| (id as usize) < MAX_VOCAB);
        let id =
            id.ok_or(TokenizerError::IdTooLarge { limit: MAX_VOCAB - 1, got: MAX_VOCAB as u32 })?;
        if vocab.insert(token.clone(), id).is_some() {
            return Err(TokenizerError::DuplicateToken { got: token.clone() });
        }
    }
    Ok(vocab)
}

/// Splits the merges at their space, which byte-level tokens cannot contain.
fn merges(merges: &[String], tokens: &[String]) -> Result<Merges, TokenizerError> {
    let tokens = tokens.iter().map(String::as_str).collect::<HashSet<_>>();
    let pair = |(index, merge): (usize, &String)| {
        merge
            .split_once(' ')
            .filter(|(left, right)| {
                let joined = [*left, *right].concat();
                [*left, *right, &joined].iter().all(|token| tokens.contains(token))
            })
            .map(|(left, right)| (left.to_owned(), right.to_owned()))
            .ok_or_else(|| TokenizerError::BadMerge { index, got: merge.clone() })
    };
    merges.iter().enumerate().map(pair).collect()
}

/// The tokens that are looked for in a text before it is split.
fn added_tokens(
    tokens: &[String],
    types: Option<&[i32]>,
) -> Result<Vec<AddedToken>, TokenizerError> {
    let types = types.unwrap_or_default();
    if !types.is_empty() && types.len() != tokens.len() {
        return Err(TokenizerError::TokenTypes { expected: tokens.len(), got: types.len() });
    }
    let added = tokens.iter().zip(types).filter_map(|(token, &kind)| match kind {
        CONTROL => Some(AddedToken::from(token.as_str(), true)),
        USER_DEFINED => Some(AddedToken::from(token.as_str(), false).normalized(false)),
        _ => None,
    });
    Ok(added.collect())
}

fn special_id(
    metadata: &Metadata,
    key: &'static str,
    limit: usize,
) -> Result<Option<u32>, TokenizerError> {
    match metadata.find_u32(key)? {
        Some(got) if got as usize >= limit => {
            Err(TokenizerError::SpecialOutOfRange { key, limit, got })
        }
        id => Ok(id),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// The characters of the bytes in order, so that the id of a token is its byte.
    fn byte_tokens() -> Vec<String> {
        let mut others = (0x100..).filter_map(char::from_u32);
        let mut character = |byte: u8| match byte {
            0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff => char::from(byte),
            _ => others.next().unwrap(),
        };
        (0..=255).map(|byte| character(byte).to_string()).collect()
    }

    /// A tokenizer without merges, whose ids are the bytes, and the special token `<|end|>`, 256.
    pub(crate) fn byte_tokenizer() -> Tokenizer {
        let mut tokens = byte_tokens();
        tokens.push("<|end|>".into());
        let bpe = BPE::builder().vocab_and_merges(vocab(&tokens).unwrap(), vec![]).build().unwrap();
        let mut inner = tokenizers::Tokenizer::new(bpe);
        inner.with_pre_tokenizer(Some(byte_level(true)));
        inner.add_tokens([AddedToken::from("<|end|>", true)]).unwrap();
        Tokenizer::new(inner, Alphabet::ByteLevel, None).unwrap()
    }

    fn words(rules: &str, text: &str) -> Vec<String> {
        use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer};
        let mut string = PreTokenizedString::from(text);
        Rules::named(rules).unwrap().words.pre_tokenize(&mut string).unwrap();
        let splits = string.get_splits(OffsetReferential::Original, OffsetType::Byte);
        splits.into_iter().map(|(word, _, _)| word.to_owned()).collect()
    }

    #[test]
    fn do_the_pre_tokenizers_split_numbers_as_named() {
        assert_eq!(words("gpt-2", "a 1234"), ["a", "Ġ1234"]);
        assert_eq!(words("smollm", "a 1234"), ["a", "Ġ", "1", "2", "3", "4"]);
        assert_eq!(words("llama-bpe", "a 1234"), ["a", "Ġ", "123", "4"]);
        assert_eq!(words("qwen2", "a 1234"), ["a", "Ġ", "1", "2", "3", "4"]);
        assert_eq!(words("llama-bpe", "Don'T\n\n x"), ["Don", "'T", "ĊĊ", "Ġx"]);
        let error = Rules::named("viking").err().unwrap();
        assert!(matches!(error, TokenizerError::UnsupportedPreTokenizer { .. }));
    }

    #[test]
    fn do_nuls_and_replacement_characters_survive() {
        let tokenizer = byte_tokenizer();
        for text in ["", "\0", "a\0b\u{fffd}", "\u{fffd}", "e\u{301} \u{10ffff}"] {
            let ids = tokenizer.encode(text, true).unwrap();
            assert_eq!(ids.iter().map(|&id| id as u8).collect::<Vec<_>>(), text.as_bytes());
            assert_eq!(tokenizer.decode(&ids, false).unwrap(), text);
        }
        assert_eq!(tokenizer.encode("a<|end|>", false).unwrap(), [u32::from(b'a'), 256]);
        assert!(tokenizer.is_special(256) && !tokenizer.is_special(0));
    }

    #[test]
    fn are_bad_merges_and_tokens_refused() {
        let strings = |texts: &[&str]| texts.iter().map(|&text| text.into()).collect::<Vec<_>>();
        let tokens = strings(&["a", "b", "ab"]);
        assert_eq!(merges(&strings(&["a b"]), &tokens).unwrap(), [("a".into(), "b".into())]);
        for bad in ["ab", "b a", "a c", "a b b"] {
            let error = merges(&strings(&["a b", bad]), &tokens).unwrap_err();
            assert!(matches!(error, TokenizerError::BadMerge { index: 1, .. }));
        }
        let error = vocab(&strings(&["a", "a"])).unwrap_err();
        assert!(matches!(error, TokenizerError::DuplicateToken { .. }));
        let error = added_tokens(&tokens, Some(&[1])).unwrap_err();
        assert!(matches!(error, TokenizerError::TokenTypes { expected: 3, got: 1 }));
    }
}
