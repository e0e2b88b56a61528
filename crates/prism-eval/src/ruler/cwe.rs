//! Common words: which ten of a numbered list stand there more often than the others.

use std::ops::RangeInclusive;

use rand::seq::SliceRandom;

use crate::task::Draft;
use crate::words::{self, Random};

/// Common words of a list.
const COMMON: usize = 10;

/// Other words that there may be.
pub fn units() -> RangeInclusive<usize> {
    1..=words::pairs() / 2
}

/// A numbered list of the words, the first ten `common` times and the rest `rare` times, shuffled.
fn list(random: &mut Random, vocabulary: &[String], common: usize, rare: usize) -> String {
    let (often, seldom) = vocabulary.split_at(COMMON);
    let mut all: Vec<&str> = Vec::new();
    for _ in 0..common {
        all.extend(often.iter().map(String::as_str));
    }
    for _ in 0..rare {
        all.extend(seldom.iter().map(String::as_str));
    }
    all.shuffle(random);
    numbered(all)
}

fn numbered<'a>(words: impl IntoIterator<Item = &'a str>) -> String {
    let lines = words.into_iter().enumerate().map(|(i, word)| format!("{}. {word}", i + 1));
    lines.collect::<Vec<_>>().join(" ")
}

fn question(list: &str) -> String {
    format!(
        "Below is a numbered list of words. In these words, some appear more often than others. \
         Memorize the ones that appear most often.\n{list}\nQuestion: What are the 10 most common \
         words in the above list?"
    )
}

const PREFIX: &str = " Answer: The top 10 words that appear most often in the list are:";

/// The question with `n` other words than the common ones, after an answered example. Common words stand
/// there 30 times and others 3 times, 10 and 3 times in the example of 40 words; below 4096 tokens 6 times and
/// once, 3 times and once in the example of 20.
pub fn draft(mut random: Random, n: usize, length: usize) -> Draft {
    let random = &mut random;
    let short = length < 4096;
    let (size, example, counts) = if short { (20, (3, 1), (6, 1)) } else { (40, (10, 3), (30, 3)) };
    // One vocabulary, so that no word of the example is in the list.
    let vocabulary = words::vocabulary(random, size + COMMON + n);
    let (shown, asked) = vocabulary.split_at(size);
    let shown_list = list(random, shown, example.0, example.1);
    let answered = numbered(shown[..COMMON].iter().map(String::as_str));
    let example = format!("{}{PREFIX}{answered}", question(&shown_list));
    let list = list(random, asked, counts.0, counts.1);
    Draft {
        user: format!("{example}\n{}", question(&list)),
        prefix: PREFIX.into(),
        references: asked[..COMMON].to_vec(),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    #[test]
    fn are_the_right_words_the_most_common_of_the_list() {
        for (length, common, rare) in [(1000, 6, 1), (4096, 30, 3)] {
            let draft = draft(words::random(9, &[]), 33, length);
            let list = draft.user.rsplit("Memorize the ones that appear most often.\n").next();
            let list = list.unwrap().lines().next().unwrap();
            let mut counts: HashMap<&str, usize> = HashMap::new();
            for word in list.split(' ').skip(1).step_by(2) {
                *counts.entry(word).or_default() += 1;
            }
            assert_eq!(counts.len(), 43);
            for (word, count) in counts {
                let right = draft.references.iter().any(|reference| reference == word);
                assert_eq!(count, if right { common } else { rare }, "{word}");
            }
            assert!(list.starts_with("1. ") && list.contains(" 20. "));
        }
    }
}
