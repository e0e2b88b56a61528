//! Token ids to bytes, and bytes to text as they come.

use super::{Tokenizer, TokenizerError};

/// How the text of a token stands for bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Alphabet {
    /// One character for each byte, as in GPT-2.
    ByteLevel,
    /// Plain text with `▁` for a space and `<0xNN>` for a byte, as in Llama 2.
    SentencePiece { strip_first_space: bool },
}

impl Alphabet {
    fn bytes(self, token: &str) -> Vec<u8> {
        match self {
            // A token outside the alphabet can only be meant as it is.
            Self::ByteLevel => token
                .chars()
                .map(byte_of_char)
                .collect::<Option<_>>()
                .unwrap_or_else(|| token.into()),
            Self::SentencePiece { .. } => match byte_of_name(token) {
                Some(byte) => vec![byte],
                None => token.replace('▁', " ").into_bytes(),
            },
        }
    }
}

/// The byte that a character stands for: printable Latin-1 characters stand for themselves, and
/// the characters from U+0100 on for the other bytes in turn.
fn byte_of_char(character: char) -> Option<u8> {
    let code = u32::from(character);
    let byte = match code {
        0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff => code,
        0x100..=0x120 => code - 0x100,
        0x121..=0x142 => code - 0x121 + 0x7f,
        0x143 => 0xad,
        _ => return None,
    };
    u8::try_from(byte).ok()
}

/// The byte that `<0xNN>` names.
fn byte_of_name(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    let plain = digits.len() == 2 && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
    plain.then(|| u8::from_str_radix(digits, 16).ok())?
}

/// Decodes ids one at a time. A character whose bytes are spread over several tokens comes out
/// with the last of them.
#[derive(Clone, Debug)]
pub struct DecodeStream<'a> {
    tokenizer: &'a Tokenizer,
    skip_special_tokens: bool,
    /// The start of a character whose other bytes are still to come.
    pending: Vec<u8>,
    at_start: bool,
}

impl<'a> DecodeStream<'a> {
    pub(super) fn new(tokenizer: &'a Tokenizer, skip_special_tokens: bool) -> Self {
        Self { tokenizer, skip_special_tokens, pending: Vec::new(), at_start: true }
    }

    /// Takes the next id and returns the text that it completes, possibly none.
    ///
    /// # Errors
    ///
    /// The id is not in the vocabulary.
    pub fn push(&mut self, id: u32) -> Result<String, TokenizerError> {
        let token = self.tokenizer.token(id)?;
        let added = self.tokenizer.inner.get_added_vocabulary();
        if added.simple_id_to_token(id).is_some() {
            if !(self.skip_special_tokens && added.is_special_token(&token)) {
                self.pending.extend(token.as_bytes());
                self.at_start = false;
            }
            return Ok(self.take_complete());
        }
        let bytes = self.tokenizer.alphabet.bytes(&token);
        let strip = self.at_start
            && self.tokenizer.alphabet == Alphabet::SentencePiece { strip_first_space: true };
        self.pending.extend(bytes.strip_prefix(b" ").filter(|_| strip).unwrap_or(&bytes));
        self.at_start = false;
        Ok(self.take_complete())
    }

    /// Ends the text: the start of a character that was never completed becomes a replacement
    /// character.
    pub fn finish(self) -> String {
        String::from_utf8_lossy(&self.pending).into_owned()
    }

    /// Takes the complete characters off the front of the pending bytes.
    fn take_complete(&mut self) -> String {
        let mut text = String::new();
        let mut rest = self.pending.as_slice();
        for chunk in self.pending.utf8_chunks() {
            text.push_str(chunk.valid());
            rest = &rest[chunk.valid().len()..];
            let invalid = chunk.invalid();
            if invalid.is_empty() {
                continue;
            }
            if invalid.len() == rest.len() && is_incomplete(invalid) {
                break;
            }
            text.push(char::REPLACEMENT_CHARACTER);
            rest = &rest[invalid.len()..];
        }
        self.pending = rest.to_vec();
        text
    }
}

/// Whether bytes that are not UTF-8 could become so with more of them.
fn is_incomplete(bytes: &[u8]) -> bool {
    std::str::from_utf8(bytes).is_err_and(|error| error.error_len().is_none())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokenizer::from_gguf::tests::byte_tokenizer;

    #[test]
    fn does_every_byte_have_one_character() {
        let mut bytes = (0..0x144).filter_map(char::from_u32).filter_map(byte_of_char);
        let mut seen = [false; 256];
        assert!(bytes.all(|byte| !std::mem::replace(&mut seen[usize::from(byte)], true)));
        assert_eq!(seen, [true; 256]);
        assert_eq!(byte_of_char('Ġ'), Some(b' '));
        assert_eq!(byte_of_char('Ċ'), Some(b'\n'));
        assert_eq!(byte_of_char('\u{144}'), None);
    }

    #[test]
    fn do_sentencepiece_tokens_become_bytes() {
        let alphabet = Alphabet::SentencePiece { strip_first_space: true };
        assert_eq!(alphabet.bytes("▁hi"), b" hi");
        assert_eq!(alphabet.bytes("<0xE2>"), [0xe2]);
        assert_eq!(alphabet.bytes("<0x+1>"), b"<0x+1>");
    }

    #[test]
    fn does_a_character_wait_for_its_last_byte() {
        let tokenizer = byte_tokenizer();
        let mut stream = tokenizer.stream(false);
        let pieces = "a€😀".bytes().map(|byte| stream.push(byte.into()).unwrap());
        assert_eq!(pieces.collect::<Vec<_>>(), ["a", "", "", "€", "", "", "", "😀"]);
        assert_eq!(stream.finish(), "");
    }

    #[test]
    fn do_broken_bytes_become_replacement_characters_without_delay() {
        let tokenizer = byte_tokenizer();
        for bytes in [&b"\xe2\x82a\xffb"[..], b"\xf0\x9f", b"\x80\x80", b"\xe2\xe2\x82\xac"] {
            let ids = bytes.iter().map(|&byte| byte.into()).collect::<Vec<u32>>();
            assert_eq!(tokenizer.decode(&ids, false).unwrap(), String::from_utf8_lossy(bytes));
        }
        let mut stream = tokenizer.stream(false);
        assert_eq!(stream.push(0xe2).unwrap(), "");
        assert_eq!(stream.push(b'a'.into()).unwrap(), "\u{fffd}a");
    }

    #[test]
    fn are_special_tokens_skipped_on_request_only() {
        let tokenizer = byte_tokenizer();
        assert_eq!(tokenizer.decode(&[b'a'.into(), 256], true).unwrap(), "a");
        assert_eq!(tokenizer.decode(&[b'a'.into(), 256], false).unwrap(), "a<|end|>");
        let error = tokenizer.decode(&[257], true).unwrap_err();
        assert!(matches!(error, TokenizerError::UnknownId { vocab_size: 257, got: 257 }));
    }
}
