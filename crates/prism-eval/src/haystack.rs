//! Text to hide things in.

use crate::error::{EvalError, Result};

/// The sentences that RULER repeats.
pub const NOISE: &str =
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.";

/// Words of a text, repeated as often as is needed.
#[derive(Debug, Clone)]
pub struct Haystack {
    words: Vec<String>,
}

impl Haystack {
    /// From any text.
    ///
    /// # Errors
    /// A text without words.
    pub fn new(text: &str) -> Result<Self> {
        let words: Vec<String> = text.split_whitespace().map(str::to_string).collect();
        if words.is_empty() {
            return Err(EvalError::argument("haystack", "a text with words", "none"));
        }
        Ok(Self { words })
    }

    /// The sentences of the first `n` words. A sentence ends with `.`, `!` or `?`, and the quotes and
    /// brackets that follow.
    pub fn sentences(&self, n: usize) -> Vec<String> {
        let mut sentences = Vec::new();
        let mut sentence = String::new();
        for word in self.words.iter().cycle().take(n) {
            if !sentence.is_empty() {
                sentence.push(' ');
            }
            sentence += word;
            let bare = word.trim_end_matches(['"', '\'', ')', ']', '”', '’']);
            if bare.ends_with(['.', '!', '?']) {
                sentences.push(std::mem::take(&mut sentence));
            }
        }
        if !sentence.is_empty() {
            sentences.push(sentence);
        }
        sentences
    }
}

/// Inserts each needle before the sentence that stands at its depth, in percent, and joins all by blanks;
/// the depths are in order.
pub fn hide(sentences: &[String], needles: &[String], depths: &[f64]) -> String {
    let place = |depth: f64| (sentences.len() as f64 * depth / 100.0) as usize;
    let mut parts: Vec<&str> = Vec::new();
    let mut from = 0;
    for (needle, &depth) in needles.iter().zip(depths) {
        let to = place(depth).clamp(from, sentences.len());
        parts.extend(sentences[from..to].iter().map(String::as_str));
        parts.push(needle);
        from = to;
    }
    parts.extend(sentences[from..].iter().map(String::as_str));
    parts.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn does_a_short_text_repeat_in_sentences() {
        let haystack = Haystack::new("One two.  \"Three!\"\nfour").unwrap();
        assert_eq!(haystack.sentences(3), ["One two.", "\"Three!\""]);
        assert_eq!(haystack.sentences(6), ["One two.", "\"Three!\"", "four One two."]);
        assert!(haystack.sentences(0).is_empty());
        assert!(Haystack::new(" \n").is_err());
    }

    #[test]
    fn are_needles_at_their_depths() {
        let sentences: Vec<String> = (0..4).map(|i| format!("S{i}.")).collect();
        let hidden = |needles: &[&str], depths: &[f64]| {
            let needles: Vec<String> = needles.iter().map(|n| n.to_string()).collect();
            hide(&sentences, &needles, depths)
        };
        assert_eq!(hidden(&["N."], &[0.0]), "N. S0. S1. S2. S3.");
        assert_eq!(hidden(&["N."], &[50.0]), "S0. S1. N. S2. S3.");
        assert_eq!(hidden(&["N.", "M."], &[26.0, 100.0]), "S0. N. S1. S2. S3. M.");
    }
}
