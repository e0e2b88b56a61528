//! Strings within an answer, and the words it is made of.

/// Share of the references that the answer contains, whatever the case; control characters part words.
pub fn share_within(prediction: &str, references: &[String]) -> f64 {
    let plain: String = prediction
        .trim()
        .chars()
        .map(|c| if c.is_control() { '\n' } else { c })
        .collect::<String>()
        .to_lowercase();
    let within = references.iter().filter(|reference| plain.contains(&reference.to_lowercase()));
    within.count() as f64 / references.len().max(1) as f64
}

/// Whether a word of the answer is the reference, once quotes, colons and the like are blanks.
pub fn has_word(prediction: &str, reference: &str) -> bool {
    let blank = |c: char| "\n:\"'.,?!{}".contains(c) || c.is_whitespace();
    prediction.split(blank).any(|word| !word.is_empty() && word == reference)
}

/// The first line that isn't empty.
pub fn line_one(prediction: &str) -> &str {
    prediction.trim_start_matches('\n').split('\n').next().unwrap_or("")
}

/// Lower case, without ASCII punctuation and articles; its words.
pub fn normalised(text: &str) -> Vec<String> {
    let plain: String = text.to_lowercase().chars().filter(|c| !c.is_ascii_punctuation()).collect();
    let article = |word: &&str| !["a", "an", "the"].contains(word);
    plain.split_whitespace().filter(article).map(str::to_string).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owned(words: &[&str]) -> Vec<String> {
        words.iter().map(|word| word.to_string()).collect()
    }

    #[test]
    fn are_references_counted_that_an_answer_holds() {
        let references = owned(&["1234567", "Red-Fox", "7654321", "x"]);
        assert_eq!(share_within(" 1234567 and red-FOX.", &references), 0.75);
        assert_eq!(share_within("1234\u{7}567 ", &references[..1]), 0.0);
        assert_eq!(share_within("", &references), 0.0);
    }

    #[test]
    fn are_words_apart_from_marks() {
        let answer = "{\"key\": \"c5f-1\"}.";
        assert!(has_word(answer, "c5f-1") && has_word(answer, "key"));
        assert!(!has_word(answer, "c5f") && !has_word(answer, ""));
    }

    #[test]
    fn are_articles_and_marks_left_out() {
        assert_eq!(normalised("The cat's  a-Hat, an x."), owned(&["cats", "ahat", "x"]));
        assert_eq!(line_one("\n\nType: a\nQuestion"), "Type: a");
    }
}
