//! What an answer and a reference have in common.

use std::collections::HashMap;
use std::hash::Hash;

use super::words::normalised;

/// F1 of what two have in common, each counted as often as it occurs in both.
fn f1_of<T: Hash + Eq>(prediction: &[T], reference: &[T]) -> f64 {
    let mut counts: HashMap<&T, usize> = HashMap::new();
    for one in reference {
        *counts.entry(one).or_default() += 1;
    }
    let mut common = 0;
    for one in prediction {
        if let Some(left) = counts.get_mut(one).filter(|left| **left > 0) {
            *left -= 1;
            common += 1;
        }
    }
    harmonic(common, prediction.len(), reference.len())
}

/// F1 from how many of so many and so many agree.
fn harmonic(common: usize, prediction: usize, reference: usize) -> f64 {
    if common == 0 { 0.0 } else { 2.0 * common as f64 / (prediction + reference) as f64 }
}

/// Of normalised words.
pub fn f1(prediction: &str, reference: &str) -> f64 {
    f1_of(&normalised(prediction), &normalised(reference))
}

/// Of characters, without blanks and marks.
pub fn character_f1(prediction: &str, reference: &str) -> f64 {
    let characters = |text: &str| -> Vec<char> {
        text.to_lowercase().chars().filter(|c| c.is_alphanumeric()).collect()
    };
    f1_of(&characters(prediction), &characters(reference))
}

/// ROUGE-L: F1 of the longest common subsequence of words, in lower case, letters and digits only. The
/// benchmarks' own packages work sentence by sentence, and differ a little on summaries of several.
pub fn rouge_l(prediction: &str, reference: &str) -> f64 {
    let (prediction, reference) = (rouge_words(prediction), rouge_words(reference));
    harmonic(longest_common(&prediction, &reference), prediction.len(), reference.len())
}

fn rouge_words(text: &str) -> Vec<String> {
    let text = text.to_lowercase();
    let words = text.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty());
    words.map(str::to_string).collect()
}

/// Length of the longest common subsequence.
pub fn longest_common<T: PartialEq>(a: &[T], b: &[T]) -> usize {
    let mut row = vec![0; b.len() + 1];
    for x in a {
        let mut diagonal = 0;
        for (j, y) in b.iter().enumerate() {
            let above = row[j + 1];
            row[j + 1] = if x == y { diagonal + 1 } else { above.max(row[j]) };
            diagonal = above;
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn near(got: f64, right: f64) {
        assert!((got - right).abs() < 1e-12, "{got}, not {right}");
    }

    #[test]
    fn is_f1_that_of_shared_words() {
        // 2 of 3 and 2 of 4 words: precision 2/3, recall 1/2.
        near(f1("The big red fox", "a red fox ran away"), 4.0 / 7.0);
        near(f1("yes yes yes", "yes no"), 2.0 / 5.0);
        near(f1("", "x"), 0.0);
        near(character_f1("北京市。", "北京"), 4.0 / 5.0);
    }

    #[test]
    fn is_rouge_that_of_common_words_in_order() {
        // The longest common subsequence of words is "the fox ran": 3 of 5 and of 4.
        near(rouge_l("The quick fox, it ran", "the fox ran home"), 6.0 / 9.0);
        near(rouge_l("ran fox the", "the fox ran"), 2.0 / 6.0);
        assert_eq!(longest_common(b"abcbdab", b"bdcaba"), 4);
    }
}
