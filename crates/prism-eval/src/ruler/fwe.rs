//! Frequent words: coded words whose counts fall with the square of their rank (Zipf, α = 2).

use std::f64::consts::PI;
use std::ops::RangeInclusive;

use rand::seq::SliceRandom;

use crate::task::Draft;
use crate::words::{self, Random};

/// Words asked for, after the most frequent one, which is dots.
const ASKED: usize = 3;
/// Words drawn that there may be: with so many the four most frequent have counts of their own.
pub const UNITS: RangeInclusive<usize> = 100..=1 << 24;

/// The question of about `n` words, of a vocabulary of a fiftieth of the length.
pub fn draft(mut random: Random, n: usize, length: usize) -> Draft {
    let random = &mut random;
    let size = (length / 50).max(2 * ASKED);
    let mut vocabulary = words::distinct(random, size, |random| words::letters(random, b'a', 6));
    vocabulary[0] = "...".into();
    let zeta = PI * PI / 6.0;
    let mut all: Vec<&str> = Vec::new();
    for (rank, word) in vocabulary.iter().enumerate() {
        let count = n as f64 / ((rank + 1) as f64).powi(2) / zeta;
        all.extend(std::iter::repeat_n(word.as_str(), count as usize));
    }
    all.shuffle(random);
    let context = all.join(" ");
    Draft {
        user: format!(
            "Read the following coded text and track the frequency of each coded word. Find the \
             three most frequently appeared coded words. {context}\nQuestion: Do not provide any \
             explanation. Please ignore the dots '....'. What are the three most frequently \
             appeared words in the above coded text?"
        ),
        prefix: " Answer: According to the coded text above, the three most frequently appeared \
                 words are:"
            .into(),
        references: vocabulary[1..=ASKED].to_vec(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn are_the_right_words_the_most_frequent_after_the_dots() {
        for n in [100, 1000] {
            let draft = draft(words::random(5, &[]), n, 4096);
            let count = |word: &str| draft.user.split(' ').filter(|&other| other == word).count();
            let counts: Vec<usize> = draft.references.iter().map(|word| count(word)).collect();
            assert!(count("...") > counts[0]);
            assert!(counts.is_sorted_by(|a, b| a > b), "{counts:?}");
            let text = draft.user.split("coded words. ").nth(1).unwrap();
            let text = text.split('\n').next().unwrap();
            let others = text.split(' ').filter(|word| {
                *word != "..." && !draft.references.iter().any(|reference| reference == word)
            });
            assert!(others.clone().all(|word| count(word) < counts[2] && word.len() == 6));
            assert!(others.count() > 0);
        }
    }
}
